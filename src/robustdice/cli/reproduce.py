"""The paper's evaluation, and the demo."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from robustdice.cost.model import parse_link
from robustdice.errors import ClusterError, DataError, ModelError, PlanError, RobustdiceError
from robustdice.importance.values import SCORING_SAMPLES
from robustdice.model.folders import archive_above
from robustdice.provenance import commit, processor, versions
from robustdice.report import tables
from robustdice.terminal import err, interrupt_on_sigterm, out, print_json, progress

if TYPE_CHECKING:
    from robustdice.model.network import Network
    from robustdice.report.comparison import Choices, Subject


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
    more: Annotated[list[str] | None, typer.Argument(metavar="MODEL", hidden=True)] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help="images for --models")] = None,
    scoring_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="score with these images, not with some that are evaluated on")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="what to compare (robustdice,lop,cdc,full; with --table2 full,cdc,robustdice); "
            "package.module:function is one of your own",
        ),
    ] = None,
    devices: Annotated[str, typer.Option(metavar="N,...", help="numbers of devices")] = "4,3,2",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="what a device may hold on the largest number of devices (0.5), or on each: 4=0.48,3=0.53,2=0.66; "
            "the paper's, for --imagenet, when nothing is said",
        ),
    ] = None,
    table2: Annotated[
        bool, typer.Option("--table2", help="run all of Table II on this machine instead; needs no images")
    ] = False,
    link: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="with --table2: of each port of the switch (1Gbit), or 'loopback'"),
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
    """The paper's Table I, Figure 2 and Table II: with its models on ImageNet, or with others.

    Writes figure2.csv, table1.csv, table2.csv, figure2.png and .svg, and report.html with the paper's numbers beside
    ours. With --table2: frames per second, memory and energy of processes that run, 1,000 images (or --samples) through
    every method, in table2-measured.csv and .json, table2.png and .svg, and table2.html. After an interruption the same
    command goes on where it was.
    """
    from robustdice.model.data import random_images  # noqa: PLC0415 -- needs the workshop
    from robustdice.report import paper  # noqa: PLC0415
    from robustdice.report.comparison import METHODS, Choices, Subject  # noqa: PLC0415
    from robustdice.report.table2 import METHODS as METHODS_OF_TABLE2  # noqa: PLC0415

    interrupt_on_sigterm()
    given = [*(models or ()), *(more or ())]
    sources = list(paper.MODELS) if imagenet is not None or (table2 and not given) else given
    images = imagenet if imagenet is not None else data
    if imagenet is not None and (Path(imagenet) / "val").is_dir():
        images = str(Path(imagenet) / "val")
    if (images is None and not table2) or not sources or (imagenet is not None and (given or data)):
        raise RobustdiceError("give either --imagenet DIR, or --models MODEL... and --data DATA")
    if table2 and scoring_data is not None:
        raise RobustdiceError("--table2 measures no accuracy: give the images to score with and to stream with --data")
    if link is not None and not table2:
        raise RobustdiceError(
            "--link is of the switch that --table2 puts devices behind: add --table2, or leave it out"
        )
    megabits = None if link == "loopback" else parse_link(link or "1Gbit") / 1e6
    compared = (METHODS_OF_TABLE2 if table2 else METHODS) if methods is None else methods.split(",")
    counts = list(map(int, numbers(devices, "--devices", int)))
    choices = Choices(compared, counts, None if memory is None else amounts(memory), s3, seed)
    absent = [
        f"there is no image folder or zip file {where}: it has a folder for each class (WNID)"
        for where in dict.fromkeys((images, scoring_data))
        if where not in {None, "digits"} and not Path(where).exists() and archive_above(Path(where)) is None
    ]

    def to_evaluate(name: str, network: Network, images: str) -> Subject:
        scored_with = images if scoring_data is None else scoring_data
        scoring = load_data(scored_with, network, SCORING_SAMPLES, seed + 1, "train", labelled=False, skip_bad=skip_bad)
        dataset = load_data(images, network, samples, seed, skip_bad=skip_bad)
        # The digits that come with scikit-learn are divided: "train" and "test".
        apart = images == "digits" or Path(scored_with).resolve() != Path(images).resolve()
        return Subject(name, network, scoring, dataset, imagenet is not None, apart)

    def to_run(name: str, network: Network, images: str | None) -> Subject:
        if images is None:
            shown = random_images(network.input_shape, seed)
        else:
            shown = load_data(images, network, SCORING_SAMPLES, seed, labelled=False, skip_bad=skip_bad)
        return Subject(name, network, shown, shown, network.reference.source in paper.MODELS)

    subjects, missing = [], list(absent)
    for source in sources:
        name = Path(source).stem if source.endswith((".pt2", ".onnx")) else source.rpartition(":")[2]
        try:
            network = load_model(source, random_weights, seed, size, mean, std, classes)
            if absent:
                continue
            subjects.append(to_run(name, network, images) if table2 else to_evaluate(name, network, str(images)))
        except ModelError as error:
            missing.append(str(error))
        except DataError as error:
            missing.append(f"{name}: {error}")
    if missing:
        raise RobustdiceError("\n".join(dict.fromkeys(missing)))
    if table2:
        _measure(subjects, output, choices, samples, megabits, scheduler, as_json)
    else:
        _evaluate(subjects, output, choices, scheduler, as_json)


def _evaluate(
    subjects: Sequence[Subject], output: Path, choices: Choices, scheduler: str | None, as_json: bool
) -> None:
    from robustdice.report.reproduce import reproduce as run  # noqa: PLC0415 -- needs the workshop
    from robustdice.report.results import trends  # noqa: PLC0415

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


def _measure(
    subjects: Sequence[Subject],
    output: Path,
    choices: Choices,
    samples: int | None,
    megabits: float | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    from robustdice.report import table2, table2_page  # noqa: PLC0415 -- needs the workshop

    with resumable(output / "work-table2"), progress("running devices") as advance:
        found = table2.reproduce_table2(
            subjects,
            output,
            choices,
            samples=samples or table2.SAMPLES,
            megabits=megabits,
            scheduler=scheduler,
            about=_about(),
            on_progress=advance,
        )
    for warning in found.warnings():
        err.print(f"warning: {warning}", soft_wrap=True)
    if as_json:
        print_json({"output": str(output), **found.document()})
    else:
        out.print(table2_page.sheet(found))
        out.print(f"The report is {output / 'table2.html'}.", soft_wrap=True)
    if found.failed:
        raise ClusterError(f"{len(found.failed)} could not be measured: the same command tries them again")


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
