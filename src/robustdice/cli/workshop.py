"""The commands of the workshop: from a model to verified bundles."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import robustdice as rd
from robustdice.cli.app import app
from robustdice.cli.options import (
    S3,
    BuildDirectory,
    Classes,
    Data,
    Json,
    Mean,
    ModelArgument,
    Plot,
    RandomWeights,
    Samples,
    Scheduler,
    Seed,
    Size,
    Std,
    UnusedSeed,
    Use,
    load_data,
    load_model,
    numbers,
    resumable,
    score_with,
)
from robustdice.errors import DataError, ModelError, OutputError, PlanError, RobustdiceError
from robustdice.failure.availability import for_each
from robustdice.importance.values import SCORING_SAMPLES
from robustdice.partitioning.robust import DEFAULT_MEMORY
from robustdice.plan import check_max_failed
from robustdice.report import plots, tables
from robustdice.terminal import interrupt_on_sigterm, out, print_json, progress, waiting


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
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="where to write the scores (.npz)")],
    use: Use = "s1,s2,s3",
    s3: S3 = "auto",
    scheduler: Scheduler = None,
    plot: Plot = None,
    samples: Samples = SCORING_SAMPLES,
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
    kept = output.with_name(f"{output.name}.partial")
    with resumable(kept):
        importance = score_with(network, data, samples, seed, use.split(","), s3, scheduler, kept)
    importance.save(output)
    kept.unlink(missing_ok=True)
    if plot is not None:
        plots.save(plots.importance(importance), plot)
    if as_json:
        print_json({"output": str(output), "columns": importance.columns, "settings": importance.settings})
    else:
        out.print(tables.importance_table(importance))
        out.print(f"Scores of {len(importance.names)} layers are in {output}.")


@app.command(epilog="Example: robustdice plan resnet20.pt2 --devices 4 --memory 0.6 --scores scores.npz -o plan.json")
def plan(
    model: ModelArgument,
    devices: Annotated[int, typer.Option(help="number of devices, 2 to 16")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN", help="where to write the plan (.json)")],
    method: Annotated[
        str, typer.Option(help="robustdice, lop (slices), cdc (slices and their sum) or full (replicas of everything)")
    ] = "robustdice",
    memory: Annotated[
        str | None, typer.Option(help="the most that a device may hold: a share of the model (0.5) or bytes (80MB)")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="cluster threshold, instead of --memory")] = None,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="what 'robustdice score' wrote")] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="score with these images first")] = None,
    use: Use = "s1,s2,s3",
    s3: S3 = "auto",
    scheduler: Scheduler = None,
    plot: Plot = None,
    samples: Samples = SCORING_SAMPLES,
    random_weights: RandomWeights = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Which device holds which neurons, and which are copied."""
    plots.check_name(plot)
    with waiting("loading the model"):
        network = load_model(model, random_weights, seed, size, mean, std, classes)
    importance = columns = None
    if method == "robustdice":
        columns = use.split(",")
        if scores is not None:
            importance = rd.Importance.load(scores)
        elif data is not None:
            importance = score_with(network, data, samples, seed, columns, s3, scheduler)
        else:
            raise RobustdiceError("robustdice plans by importance: give --scores FILE, or --data DATA to score with")
    with waiting("clustering and distributing"):
        made = rd.partition(
            network, importance, devices=devices, method=method, memory=memory, threshold=threshold, columns=columns
        )
    made.save(output)
    if plot is not None:
        plots.save(plots.holders(made), plot)
    if as_json:
        print_json(tables.plan_json(made))
    else:
        out.print(tables.plan_table(made))
        out.print(tables.plan_summary(made))
        out.print(f"The plan is in {output}.")


@app.command(epilog="Example: robustdice evaluate plan.json --data cifar10-test.zip --samples 1000 --availability 0.99")
def evaluate(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="what 'robustdice plan' wrote, of one model")],
    data: Data,
    max_failed: Annotated[int | None, typer.Option(min=0, help="most devices down at once (all but one)")] = None,
    availability: Annotated[
        str | None, typer.Option(metavar="P,...", help="how likely each device is up: what accuracy to expect")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="keep what is finished there; the same command goes on from it")
    ] = None,
    scheduler: Scheduler = None,
    plot: Plot = None,
    samples: Samples = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Accuracy for every set of failed devices, before anything is deployed.

    Where there are more than a few hundred sets, some are drawn, and the table says so. Several plans of one model are
    evaluated on the same images, which costs less than one after the other.
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
        network = rd.reload_model(made[0].model)
    dataset = load_data(data, network, samples, seed)
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
    documents = [tables.evaluation_json(r, e) for r, e in zip(results, expectations, strict=True)]
    if as_json:
        print_json(documents[0] if len(documents) == 1 else {"plans": documents})
    else:
        for result, expectation in zip(results, expectations, strict=True):
            out.print(tables.evaluation_table(result))
            if expectation is not None:
                out.print(tables.expectation_table(expectation))
    if plot is not None:
        plots.save(plots.accuracy(results), plot)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


@app.command(epilog="Example: robustdice build plan.json -o build --spares standby")
def build(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="what 'robustdice plan' wrote")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="where to write the bundles")],
    spares: Annotated[
        str, typer.Option(help="standby (computed when needed) or hot (computed on every frame)")
    ] = "standby",
    host: Annotated[str, typer.Option(help="address of the devices in cluster.toml, to be edited")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="device K listens on this port + K (default: free ones)")] = None,
    seed: UnusedSeed = 0,  # noqa: ARG001
    as_json: Json = False,
) -> None:
    """One self-contained bundle per device, and DIR/cluster.toml."""
    made = rd.Plan.load(plan)
    with waiting("loading the model"):
        network = rd.reload_model(made.model)
    with waiting("writing the bundles"):
        rd.build(network, made, output, spares=spares, host=host, base_port=port)
    if as_json:
        print_json({"directory": str(output), "bytes_per_device": made.bytes_per_device})
    else:
        for device, size in enumerate(made.bytes_per_device):
            out.print(f"{output / f'device-{device}'}  {size / 1e6:.2f} MB of weights", soft_wrap=True)
        out.print(f"Next: robustdice verify {output}, then robustdice up {output} to try it here.", soft_wrap=True)


@app.command(epilog="Example: robustdice verify build")
def verify(directory: BuildDirectory, seed: Seed = 0, as_json: Json = False) -> None:
    """Run the bundles in one process and compare them with the model, for every failure set.

    Above 8 devices for 256 of the failure sets, and the table says so.
    """
    with progress("verifying") as advance:
        result = rd.verify(directory, seed=seed, on_progress=advance)
    if as_json:
        print_json(tables.verification_json(result))
    else:
        out.print(tables.verification_table(result))
    if result.max_relative_error > 1e-4:
        raise RobustdiceError(
            f"the bundles differ from the model by {result.max_relative_error:.1e}, more than 1e-4; build them again"
        )


@app.command(
    epilog="Example: robustdice reproduce --models resnet20.pt2 alexnet.pt2 --data cifar10-test.zip -o results"
)
def reproduce(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="directory for results and work")],
    imagenet: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="ImageNet's validation images in WNID folders, or a folder with val"),
    ] = None,
    models: Annotated[list[str] | None, typer.Option(metavar="MODEL...", help="other models, with --data")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="images for --models")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="share on 4 devices, for --models (0.5)")
    ] = None,
    s3: S3 = "auto",
    scheduler: Scheduler = None,
    samples: Samples = None,
    random_weights: RandomWeights = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The paper's Table I, Figure 2 and Table II (memory): with its models on ImageNet, or with others.

    Writes figure2.csv, table1.csv, table2.csv, figure2.png and .svg, and report.html with the paper's numbers beside
    ours. After an interruption the same command goes on where it was.
    """
    from robustdice.report import paper  # noqa: PLC0415 -- needs the workshop
    from robustdice.report.reproduce import Subject, trends  # noqa: PLC0415
    from robustdice.report.reproduce import reproduce as run  # noqa: PLC0415

    sources = list(paper.MODELS) if imagenet is not None else [*(models or ()), *(more or ())]
    images = imagenet if imagenet is not None else data
    if imagenet is not None and (Path(imagenet) / "val").is_dir():
        images = str(Path(imagenet) / "val")
    if not sources or images is None or (imagenet is not None and (models or more or data)):
        raise RobustdiceError("give either --imagenet DIR, or --models MODEL... and --data DATA")
    if imagenet is not None and memory is not None:
        raise RobustdiceError("the paper's models get the paper's memory: --memory is for --models")
    here = images == "digits" or Path(images).exists()
    subjects = []
    missing = [] if here else [f"there is no image folder or zip file {images}: it has a folder for each class (WNID)"]
    for source in sources:
        name = Path(source).stem if source.endswith((".pt2", ".onnx")) else source.rpartition(":")[2]
        try:
            network = load_model(source, random_weights, seed, size, mean, std, classes)
            if here:
                scoring = load_data(images, network, SCORING_SAMPLES, seed + 1, "train")
                dataset = load_data(images, network, samples, seed)
                subjects.append(Subject(name, network, scoring, dataset, as_in_paper=imagenet is not None))
        except ModelError as error:
            missing.append(str(error))
        except DataError as error:
            missing.append(f"{name}: {error}")
    if missing:
        raise RobustdiceError("\n".join(dict.fromkeys(missing)))
    command = " ".join(["robustdice", *(re.sub(r"[^=]*/(?=[^/])", "", word) for word in sys.argv[1:])])
    with resumable(output / "work"), progress("reproducing") as advance:
        results = run(
            subjects,
            output,
            memory=memory or DEFAULT_MEMORY,
            s3=s3,
            seed=seed,
            scheduler=scheduler,
            command=command,
            on_progress=advance,
        )
    verdicts = trends(results)
    if as_json:
        print_json({"directory": str(output), "trends": verdicts})
    else:
        out.print(tables.trends_table(verdicts))
        out.print(f"The report is {output / 'report.html'}.", soft_wrap=True)


@app.command(epilog="Example: robustdice demo --memory 0.6")
def demo(
    memory: Annotated[str, typer.Option(help="the most that a device may hold, as for 'plan'")] = "0.5",
    frames: Annotated[int, typer.Option(min=8, help="test images that are streamed in each phase")] = 250,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The whole story on this machine, on scikit-learn's digits, in about a minute."""
    from robustdice.demo.story import run_demo  # noqa: PLC0415 -- needs the workshop

    interrupt_on_sigterm()
    result = run_demo(memory, frames, seed, Console(quiet=True) if as_json else out)
    if as_json:
        print_json(result)
