"""The commands about a model: what is in it, and which of its neurons matter."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from robustdice.bundle.read import load_bundle
from robustdice.cli.app import app
from robustdice.cli.options import (
    S3,
    Classes,
    Images,
    Json,
    Mean,
    ModelArgument,
    Plot,
    RandomWeights,
    Samples,
    Scheduler,
    Seed,
    Size,
    SkipBad,
    Std,
    Use,
    load_data,
    load_model,
    resumable,
    score_with,
)
from robustdice.errors import ModelError, OutputError
from robustdice.importance.values import SCORING_SAMPLES
from robustdice.meter.held import measure_held
from robustdice.report import cost_tables, plots, tables
from robustdice.terminal import out, print_json, progress, waiting


@app.command(epilog="Example: robustdice inspect torchvision:resnet18 --random-weights")
def inspect(
    model: ModelArgument,
    random_weights: RandomWeights = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Layers, neurons, parameters, exchanges and their sizes."""
    with waiting("loading the model"):
        network = load_model(model, random_weights, seed, size, mean, std, classes)
    if as_json:
        print_json(tables.network_json(network))
    else:
        out.print(tables.network_table(network))


@app.command(epilog="Example: robustdice score resnet20.pt2 --data cifar10-train.zip --samples 64 -o scores.npz")
def score(
    model: ModelArgument,
    data: Images,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="where to write the scores (.npz)")],
    use: Use = "s1,s2,s3",
    s3: S3 = "auto",
    scheduler: Scheduler = None,
    plot: Plot = None,
    samples: Samples = SCORING_SAMPLES,
    skip_bad: SkipBad = False,
    random_weights: RandomWeights = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Importance of every neuron: L1 norm (s1), connection sensitivity (s2), removal divergence (s3).

    s3 is exact where that takes about a minute, with a forward pass per neuron and image from the neuron's layer on;
    else a few backward passes say to first order how every removal moves the answer (fisher). --s3 chooses. What is
    finished when the work is interrupted is kept beside FILE, and the same command goes on from there.
    """
    plots.check_name(plot)
    if output.is_dir():
        raise OutputError(f"{output} is a directory; name a file with -o")
    with waiting("loading the model"):
        network = load_model(model, random_weights, seed, size, mean, std, classes)
    images = load_data(data, network, samples, seed, "train", labelled=False, skip_bad=skip_bad)
    kept = output.with_name(f"{output.name}.partial")
    with resumable(kept):
        importance = score_with(network, images, use.split(","), s3, scheduler, kept)
    importance.save(output)
    kept.unlink(missing_ok=True)
    if plot is not None:
        plots.save(plots.importance(importance), plot)
    if as_json:
        made = {"output": str(output), "columns": importance.columns, "settings": importance.settings}
        print_json({**made, "notes": images.notes.as_json()})
    else:
        out.print(tables.importance_table(importance))
        out.print(f"Scores of {len(importance.names)} layers are in {output}.")


BUNDLE_NAME = re.compile(r"device-\d+")
"""What a build calls bundles: that one is not there is no matter of models."""


@app.command(epilog="Example: robustdice profile build/device-0 -o here.json")
def profile(
    model: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="a device's bundle (build/device-0), or a model, as for inspect")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="where to write the profile (.json)")],
    random_weights: RandomWeights = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What this machine takes for each layer on one thread, and for handing over: what plans are modelled from.

    Of a device's bundle, which needs no workshop, it measures what the device computes, and scales each layer by the
    share of its neurons that is there; what handing over takes is typical then. Of a MODEL that is measured, too. What
    unpacking coarse weights takes is measured in both.
    """
    said = ""
    if Path(model).is_dir() or BUNDLE_NAME.fullmatch(Path(model).name):
        if random_weights or any(each is not None for each in (size, mean, std, classes)):
            raise ModelError(f"{model} is a bundle, which has its weights and sizes: leave out options of models")
        bundle = load_bundle(model)
        with progress("measuring") as advance:
            measured = measure_held(bundle, advance)
        said = cost_tables.held_summary(measured, len(bundle.manifest.layers))
    else:
        from robustdice.meter.handing import measure_profile  # noqa: PLC0415 -- it needs the workshop

        with waiting("loading the model"):
            network = load_model(model, random_weights, seed, size, mean, std, classes)
        with progress("measuring") as advance:
            measured = measure_profile(network, advance)
    measured.save(output)
    if as_json:
        print_json({"output": str(output), **asdict(measured)})
    else:
        out.print(cost_tables.profile_table(measured))
        out.print(f"{said}The profile is in {output}; 'robustdice plan --profile {output}' models from it.")
