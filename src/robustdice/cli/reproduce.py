"""The paper's evaluation, and the demo."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robustdice.cli.app import app
from robustdice.cli.options import (
    S3,
    Classes,
    Json,
    Mean,
    RandomWeights,
    Samples,
    Scheduler,
    Seed,
    Size,
    SkipBad,
    Std,
    load_data,
    load_model,
    resumable,
)
from robustdice.cli.usage import number
from robustdice.errors import DataError, ModelError, RobustdiceError
from robustdice.importance.values import SCORING_SAMPLES
from robustdice.model.folders import archive_above
from robustdice.partitioning.robust import DEFAULT_MEMORY
from robustdice.report import tables
from robustdice.terminal import interrupt_on_sigterm, out, print_json, progress


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
    skip_bad: SkipBad = False,
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
    from robustdice.report.reproduce import Subject  # noqa: PLC0415
    from robustdice.report.reproduce import reproduce as run  # noqa: PLC0415
    from robustdice.report.results import trends  # noqa: PLC0415

    sources = list(paper.MODELS) if imagenet is not None else [*(models or ()), *(more or ())]
    images = imagenet if imagenet is not None else data
    if imagenet is not None and (Path(imagenet) / "val").is_dir():
        images = str(Path(imagenet) / "val")
    if not sources or images is None or (imagenet is not None and (models or more or data)):
        raise RobustdiceError("give either --imagenet DIR, or --models MODEL... and --data DATA")
    if imagenet is not None and memory is not None:
        raise RobustdiceError("the paper's models get the paper's memory: --memory is for --models")
    here = images == "digits" or Path(images).exists() or archive_above(Path(images)) is not None
    subjects = []
    missing = [] if here else [f"there is no image folder or zip file {images}: it has a folder for each class (WNID)"]
    for source in sources:
        name = Path(source).stem if source.endswith((".pt2", ".onnx")) else source.rpartition(":")[2]
        try:
            network = load_model(source, random_weights, seed, size, mean, std, classes)
            if here:
                scoring = load_data(
                    images, network, SCORING_SAMPLES, seed + 1, "train", labelled=False, skip_bad=skip_bad
                )
                dataset = load_data(images, network, samples, seed, skip_bad=skip_bad)
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
        print_json({"output": str(output), "trends": verdicts, "notes": subjects[0].dataset.notes.as_json()})
    else:
        out.print(tables.trends_table(verdicts))
        out.print(f"The report is {output / 'report.html'}.", soft_wrap=True)


@app.command(epilog="Example: robustdice demo --memory 0.6")
def demo(
    memory: Annotated[str, typer.Option(help="the most that a device may hold, as for 'plan'")] = "0.5",
    frames: Annotated[int, number("--frames", "test images that are streamed in each phase", least=8)] = 250,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The whole story on this machine, on scikit-learn's digits, in about a minute."""
    from robustdice.demo.story import run_demo  # noqa: PLC0415 -- needs the workshop

    interrupt_on_sigterm()
    result = run_demo(memory, frames, seed, Console(quiet=True) if as_json else out)
    if as_json:
        print_json(result)
