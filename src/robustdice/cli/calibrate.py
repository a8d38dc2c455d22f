"""What survivors do about what is lost, fitted beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import robustdice as rd
from robustdice.cli.app import app
from robustdice.cli.options import Images, Json, MovedModel, Samples, Seed, SkipBad, load_data
from robustdice.cli.usage import number
from robustdice.report import tables
from robustdice.representation import CALIBRATION_SAMPLES
from robustdice.terminal import out, print_json, progress, waiting


@app.command(epilog="Example: robustdice calibrate plan.json --data cifar10-train.zip -o calibrated.json")
def calibrate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="what 'robustdice plan' wrote")],
    data: Images,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PLAN", help="where to write it (over the plan)")
    ] = None,
    max_failed: Annotated[
        int | None, number("--max-failed", "most devices down at once (all but one)", least=1)
    ] = None,
    passes: Annotated[
        int,
        number("--passes", "fit each set further: how often to go over the images", least=0),
    ] = 0,
    model: MovedModel = None,
    samples: Samples = CALIBRATION_SAMPLES,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Failure calibration: what the survivors of each failure scale and shift their neurons by.

    From unlabelled images, without retraining: each neuron that is left gets back the mean and the deviation that it
    has in the intact network. With --passes (5, say, and --samples 1024) all scales and shifts of a failure set are
    then fitted further, together, to what the intact network answers: this takes minutes, and brings most where most
    is lost. Devices apply a failure set's corrections from the next stage on; a larger set that has none takes those of
    the nearest set within it. Measure with 'robustdice evaluate' what it brings: where little is left of a layer, it
    may bring nothing.
    """
    made = rd.Plan.load(plan)
    with waiting("loading the model"):
        network = rd.reload_model(made.model, model, plan.parent)
    images = load_data(data, network, samples, seed, "train", labelled=False, skip_bad=skip_bad).images()
    with progress("calibrating") as advance:
        calibrated = rd.calibrate(
            network, made, images, max_failed=max_failed, passes=passes, seed=seed, on_progress=advance
        )
    calibrated.save(output or plan)
    added = max(calibrated.bytes_per_device) - max(replace(made, corrections={}).bytes_per_device)
    if as_json:
        print_json({"output": str(output or plan), "correction_bytes": added, **tables.plan_json(calibrated)})
    else:
        share = added / max(calibrated.bytes_per_device)
        out.print(
            f"{len(calibrated.corrections)} failure sets have corrections: {added:,} bytes on the largest device, "
            f"{share:.1%} of what it holds."
        )
        out.print(f"The plan is in {output or plan}.")
