"""The paper's evaluation, and the demo."""

from __future__ import annotations

import re
import sys
from datetime import datetime, timezone
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
    numbers,
    resumable,
)
from robustdice.cli.usage import number
from robustdice.errors import DataError, ModelError, PlanError, RobustdiceError
from robustdice.importance.values import SCORING_SAMPLES
from robustdice.model.folders import archive_above
from robustdice.provenance import commit, processor, versions
from robustdice.report import tables
from robustdice.terminal import err, interrupt_on_sigterm, out, print_json, progress


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
    scoring_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="score with these images, not with some that are evaluated on")
    ] = None,
    methods: Annotated[
        str, typer.Option(metavar="NAME,...", help="what to compare; package.module:function is one of your own")
    ] = "robustdice,lop,cdc,full",
    devices: Annotated[str, typer.Option(metavar="N,...", help="numbers of devices")] = "4,3,2",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="what a device may hold on the largest number of devices (0.5), or on each: 4=0.48,3=0.53,2=0.66; "
            "the paper's, for --imagenet, when nothing is said",
        ),
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
    from robustdice.report.comparison import Choices, Subject  # noqa: PLC0415
    from robustdice.report.reproduce import reproduce as run  # noqa: PLC0415
    from robustdice.report.results import trends  # noqa: PLC0415

    sources = list(paper.MODELS) if imagenet is not None else [*(models or ()), *(more or ())]
    images = imagenet if imagenet is not None else data
    if imagenet is not None and (Path(imagenet) / "val").is_dir():
        images = str(Path(imagenet) / "val")
    if not sources or images is None or (imagenet is not None and (models or more or data)):
        raise RobustdiceError("give either --imagenet DIR, or --models MODEL... and --data DATA")
    counts = list(map(int, numbers(devices, "--devices", int)))
    choices = Choices(methods.split(","), counts, None if memory is None else amounts(memory), s3, seed)
    scored_with = images if scoring_data is None else scoring_data
    wanted = dict.fromkeys((images, scored_with))
    missing = [
        f"there is no image folder or zip file {where}: it has a folder for each class (WNID)"
        for where in wanted
        if where != "digits" and not Path(where).exists() and archive_above(Path(where)) is None
    ]
    here = not missing
    subjects = []
    for source in sources:
        name = Path(source).stem if source.endswith((".pt2", ".onnx")) else source.rpartition(":")[2]
        try:
            network = load_model(source, random_weights, seed, size, mean, std, classes)
            if here:
                scoring = load_data(
                    scored_with, network, SCORING_SAMPLES, seed + 1, "train", labelled=False, skip_bad=skip_bad
                )
                dataset = load_data(images, network, samples, seed, skip_bad=skip_bad)
                # The digits that come with scikit-learn are divided: "train" and "test".
                apart = images == "digits" or Path(scored_with).resolve() != Path(images).resolve()
                subjects.append(Subject(name, network, scoring, dataset, imagenet is not None, apart))
        except ModelError as error:
            missing.append(str(error))
        except DataError as error:
            missing.append(f"{name}: {error}")
    if missing:
        raise RobustdiceError("\n".join(dict.fromkeys(missing)))
    with resumable(output / "work"), progress("reproducing") as advance:
        results = run(subjects, output, choices, scheduler=scheduler, about=_about(), on_progress=advance)
    verdicts = trends(results)
    doubts = {result.name: result.doubt for result in results if result.doubt is not None}
    for name, doubt in doubts.items():
        err.print(f"warning: {name}: {doubt}", soft_wrap=True)
    if as_json:
        notes = {**subjects[0].dataset.notes.as_json(), "doubts": doubts}
        print_json({"output": str(output), "trends": verdicts, "notes": notes})
    else:
        out.print(tables.trends_table(verdicts))
        out.print(f"The report is {output / 'report.html'}.", soft_wrap=True)


def _about() -> dict[str, str]:
    """What the report says that it was made with: when, from which source, on what, and by which command."""
    import torch  # noqa: PLC0415 -- heavy

    threads = torch.get_num_threads()
    used = ", ".join(f"{name} {number}" for name, number in versions("torch", "numpy").items())
    return {
        "Date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "Commit": commit() or "not known: this package does not run from a git checkout",
        "Processor": f"{processor()}, {threads} thread{'s' if threads > 1 else ''}",
        "Versions": used,
        # Paths are nobody's business, names are.
        "Command": " ".join(["robustdice", *(re.sub(r"[^=]*/(?=[^/])", "", word) for word in sys.argv[1:])]),
    }


def amounts(text: str) -> str | float | dict[int, str | float]:
    """What --memory says: an amount, or one for each number of devices (4=0.48,3=80MB); PlanError when it does not."""
    if "=" not in text:
        return text
    found: dict[int, str | float] = {}
    for part in text.split(","):
        devices, _, amount = part.partition("=")
        if not devices.strip().isdecimal() or not amount:
            raise PlanError(
                f"--memory takes an amount (0.5), or one for each number of devices (4=0.48,3=0.53), not {text!r}"
            )
        found[int(devices)] = amount.strip()
    return found


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
