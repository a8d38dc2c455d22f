"""What plans leave of the accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import robustdice as rd
from robustdice.cli.app import app
from robustdice.cli.options import (
    Classes,
    Data,
    Json,
    MovedModel,
    Plot,
    Samples,
    Scheduler,
    Seed,
    SkipBad,
    load_data,
    numbers,
    resumable,
)
from robustdice.cli.usage import number
from robustdice.errors import OutputError, PlanError, RobustdiceError
from robustdice.failure.availability import for_each
from robustdice.failure.chance import doubt_about
from robustdice.files import write_csv
from robustdice.plan import Certificate, check_max_failed
from robustdice.report import plots, tables
from robustdice.terminal import err, out, print_json, progress, waiting


@app.command(epilog="Example: robustdice evaluate plan.json --data cifar10-test.zip --samples 1000 --availability 0.99")
def evaluate(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="what 'robustdice plan' wrote, of one model")],
    data: Data,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.csv", help="also write a row for each failure set")
    ] = None,
    max_failed: Annotated[
        int | None, number("--max-failed", "most devices down at once (all but one)", least=0)
    ] = None,
    availability: Annotated[
        str | None, typer.Option(metavar="P,...", help="how likely each device is up: what accuracy to expect")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="keep what is finished there; the same command goes on from it")
    ] = None,
    model: MovedModel = None,
    scheduler: Scheduler = None,
    plot: Plot = None,
    samples: Samples = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Accuracy for every set of failed devices, before anything is deployed.

    Where there are more than a few hundred sets, some are drawn, and the table says so. Several plans of one model are
    evaluated on the same images, which costs less than one after the other. What was measured is written into each
    plan: a cluster that is built from it says with every answer what accuracy to expect.
    """
    plots.check_name(plot)
    up = None if availability is None else numbers(availability, "--availability")
    made = [rd.Plan.load(path) for path in plans]
    if up is not None and max_failed is not None:
        raise RobustdiceError("--availability needs every number of failed devices: leave out --max-failed")
    for path, each in zip(plans, made, strict=True):
        if each.model.digest != made[0].model.digest:
            raise PlanError(f"{path} and {plans[0]} are plans of different models: evaluate them one after the other")
        check_max_failed(each.devices, max_failed)
        if up is not None:
            for_each(each.devices, up)
    with waiting("loading the model"):
        network = rd.reload_model(made[0].model, model, plans[0].parent)
    if network.activation == "sigmoid":
        err.print(
            "The model's outputs are labels of their own (a sigmoid): what is counted is how often the likeliest one "
            "is the image's class.",
            soft_wrap=True,
        )
    dataset = load_data(data, network, samples, seed, skip_bad=skip_bad, classes=classes)
    with resumable(checkpoint), progress("evaluating") as advance:
        results = rd.evaluate_plans(
            network,
            made,
            dataset,
            max_failed=max_failed,
            seed=seed,
            scheduler=scheduler,
            checkpoint=checkpoint,
            on_progress=advance,
        )
    expectations = [None if up is None else rd.expect(result, up) for result in results]
    doubt = doubt_about(results[0], network.outputs, network.reference.random_weights_seed is not None)
    if doubt is not None:
        err.print(f"warning: {doubt}", soft_wrap=True)
    notes = {"notes": {**dataset.notes.as_json(), "doubt": doubt}}
    documents = [
        {"plan": str(path), "plan_digest": plan.digest, **tables.evaluation_json(result, expectation), **notes}
        for path, plan, result, expectation in zip(plans, made, results, expectations, strict=True)
    ]
    for path, plan, result in zip(plans, made, results, strict=True):
        _certify(path, plan, result, dataset.digest)
    if as_json:
        print_json(documents[0] if len(plans) == 1 else {"plans": documents})
    else:
        _show(plans, results, expectations)
    if plot is not None:
        plots.save(plots.accuracy(results), plot)
    if output is not None:
        named = zip(plans, results, strict=True)
        write_csv(output, [{"plan": str(path), **row} for path, result in named for row in result.to_rows()])
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def _certify(path: Path, plan: rd.Plan, result: rd.Evaluation, data_digest: str) -> None:
    """Write into the plan what was measured of it: bundles built from it then say what accuracy to expect."""
    certificate = Certificate(result.data, data_digest, result.samples, result.clean, dict(result.accuracy))
    try:
        replace(plan, certificate=certificate).save(path)
    except OutputError as error:  # it is measured all the same
        err.print(f"warning: the plan is not certified: {error}", soft_wrap=True)


def _show(
    plans: Sequence[Path], results: Sequence[rd.Evaluation], expectations: Sequence[rd.Expectation | None]
) -> None:
    names = [path.stem for path in plans]
    if len(set(names)) < len(names):
        names = list(map(str, plans))
    out.print(tables.comparison_table(names, results) if len(plans) > 1 else tables.evaluation_table(results[0]))
    for name, expectation in zip(names, expectations, strict=True):
        if expectation is not None:
            out.print(tables.expectation_table(expectation, name if len(plans) > 1 else ""))
