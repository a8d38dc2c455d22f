"""Arguments that several commands take, and what they turn into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

import robustdice as rd
from robustdice.cli.usage import number, one_of
from robustdice.errors import DataError, PlanError
from robustdice.model.classes import read_classes
from robustdice.terminal import err, progress

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="torchvision:NAME, timm:NAME, a .pt2 or .onnx file, or package.module:factory"
    ),
]
MovedModel = Annotated[
    str | None, typer.Option("--model", metavar="PATH", help="where the plan's model is now, when it has moved")
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="seeded random weights, not pretrained ones")]
Size = Annotated[str | None, typer.Option(metavar="C,H,W", help="input size, where the model's source does not say it")]
Mean = Annotated[str | None, typer.Option(metavar="X,...", help="mean of each channel, for pixels from 0 to 1")]
Std = Annotated[str | None, typer.Option(metavar="X,...", help="standard deviation of each channel")]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="names of the classes in the order of the outputs, one a line"),
]
# A metavar that is the option's own name in capitals changes the name in some versions of typer (0.27): it is said.
Data = Annotated[
    str, typer.Option("--data", metavar="DATA", help="a folder or zip file with class folders, or 'digits'")
]
Images = Annotated[
    str, typer.Option("--data", metavar="DATA", help="a folder or zip file of images, or one, or 'digits'; no labels")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="go on without images that cannot be read, and name them")]
Use = Annotated[str, typer.Option(metavar="S,...", help="which of the scores s1, s2, s3")]
S3 = Annotated[
    str,
    typer.Option(
        "--s3",
        metavar="HOW",
        help="exact, fisher (seconds instead of minutes) or auto",
        autocompletion=one_of("auto", "exact", "fisher"),
    ),
]
Scheduler = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="compute on a Dask cluster, such as tcp://10.0.0.1:8786")
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="also draw it: a .png, .svg or .pdf file")]
Samples = Annotated[int | None, number("--samples", "use a seeded, class-balanced subset of this many images", least=1)]
Seed = Annotated[int, number("--seed", "of everything random", least=0)]
Provider = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="what of ONNX Runtime computes, where it can: auto, cpu, cuda, tensorrt, openvino, ...",
        autocompletion=one_of("auto", "cpu", "cuda", "openvino", "tensorrt"),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead of tables")]
BuildDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="what 'robustdice build' wrote")]


def load_model(
    source: str,
    random_weights: bool,
    seed: int,
    size: str | None,
    mean: str | None,
    std: str | None,
    classes: Path | None,
) -> rd.Network:
    """The model that MODEL and the options beside it name; DataError when an option is not of its form."""
    declared: dict[str, Any] = {}
    for key, text, kind in (("input_size", size, int), ("mean", mean, float), ("std", std, float)):
        if text is not None:
            declared[key] = [kind(number) for number in numbers(text, "--size" if kind is int else f"--{key}", kind)]
    if classes is not None:
        declared["classes"] = read_classes(classes)
    return rd.load_model(source, random_weights=random_weights, seed=seed, preprocessing=declared)


def numbers(text: str, option: str, kind: type[int] | type[float] = float) -> list[float]:
    """The numbers of an option that takes several; DataError when they are none."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise DataError(f"{option} takes numbers with commas between them, not {text!r}") from None


def read_thresholds(text: str) -> float | list[float]:
    """The threshold that --threshold says, or those in the file that it names, a number a line for each layer."""
    with contextlib.suppress(ValueError):
        return float(text)
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise PlanError(f"--threshold takes a number or a file with one for each layer, not {text!r} ({why})") from None
    try:
        return [float(line) for line in lines]
    except ValueError as error:
        raise PlanError(f"{text}: {error}; --threshold takes a file with a number a line, one for each layer") from None


@contextlib.contextmanager
def resumable(kept: Path | None) -> Iterator[None]:
    """Says on Ctrl-C, or when an image is bad after all, where what is finished is kept: in a directory, or in a
    checkpoint behind its header."""
    try:
        yield
    except (KeyboardInterrupt, DataError):
        if kept is not None and kept.exists() and (kept.is_dir() or kept.read_bytes().count(b"\n") > 1):
            err.print(f"What is finished is kept in {kept}: the same command goes on from there.", soft_wrap=True)
        raise


def load_data(
    source: str,
    network: rd.Network,
    samples: int | None,
    seed: int,
    split: Any = "test",
    *,
    labelled: bool = True,
    skip_bad: bool = False,
    classes: Path | None = None,
) -> rd.Dataset:
    """The images that DATA and --samples name, checked; what is to be known about them is said."""
    named = {} if classes is None else {"classes": read_classes(classes)}
    preprocessing = {**network.preprocessing, **named}
    found = rd.load_data(source, preprocessing, network.outputs, split=split, labelled=labelled)
    with progress("checking the images") as advance:
        dataset = found.sample(samples, seed).checked(skip_bad, advance)
    for sentence in dataset.notes.sentences():
        _note(sentence)
    return dataset


@cache
def _note(sentence: str) -> None:
    """Says what is to be known, once: several models may be asked about the same images."""
    err.print(f"note: {sentence}", soft_wrap=True)


def score_with(
    network: rd.Network,
    images: rd.Dataset,
    columns: list[str],
    s3: str,
    scheduler: str | None,
    checkpoint: Path | None = None,
) -> rd.Importance:
    """Scores from images, with a bar that shows how far it is."""
    with progress("scoring") as advance:
        return rd.score(
            network,
            images,
            columns=columns,
            s3=s3,
            scheduler=scheduler,
            checkpoint=checkpoint,
            on_progress=advance,
        )
