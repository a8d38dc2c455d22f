"""Arguments that several commands take, and what they turn into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import robustdice as rd
from robustdice.cli.usage import number, one_of
from robustdice.errors import DataError, PlanError
from robustdice.terminal import err, progress

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="torchvision:NAME, timm:NAME, a .pt2 or .onnx file, or package.module:factory"
    ),
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="seeded random weights, not pretrained ones")]
Size = Annotated[str | None, typer.Option(metavar="C,H,W", help="input size, where the model's source does not say it")]
Mean = Annotated[str | None, typer.Option(metavar="X,...", help="mean of each channel, for pixels from 0 to 1")]
Std = Annotated[str | None, typer.Option(metavar="X,...", help="standard deviation of each channel")]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="class folders in the order of the outputs, the first word of each line"),
]
Data = Annotated[str, typer.Option(metavar="DATA", help="a folder or zip file with class folders, or 'digits'")]
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
        try:
            lines = classes.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot read {classes}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DataError(f"{classes} is not UTF-8 text; --classes takes a class a line") from None
        declared["classes"] = [line.split()[0] for line in lines if line.strip()]
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
    """Says on Ctrl-C where what is finished is kept: in a directory, or in a checkpoint behind its header."""
    try:
        yield
    except KeyboardInterrupt:
        if kept is not None and kept.exists() and (kept.is_dir() or kept.read_bytes().count(b"\n") > 1):
            err.print(f"What is finished is kept in {kept}: the same command goes on from there.", soft_wrap=True)
        raise


def load_data(source: str, network: rd.Network, samples: int | None, seed: int, split: Any = "test") -> rd.Dataset:
    """The images that DATA and --samples name."""
    return rd.load_data(source, network.preprocessing, network.outputs, split=split).sample(samples, seed)


def score_with(
    network: rd.Network,
    data: str,
    samples: int | None,
    seed: int,
    columns: list[str],
    s3: str,
    scheduler: str | None,
    checkpoint: Path | None = None,
) -> rd.Importance:
    """Scores from the images that DATA and --samples name."""
    images = load_data(data, network, samples, seed, "train")
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
