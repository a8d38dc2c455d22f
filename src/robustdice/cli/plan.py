"""Plans: making one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

import robustdice as rd
from robustdice.cli.app import app
from robustdice.cli.options import (
    S3,
    Classes,
    Json,
    Mean,
    ModelArgument,
    Plot,
    RandomWeights,
    Scheduler,
    Seed,
    Size,
    SkipBad,
    Std,
    Use,
    load_data,
    load_model,
    read_thresholds,
    score_with,
)
from robustdice.cli.planned import show_plan
from robustdice.cli.usage import number, one_of
from robustdice.cost.model import Judge, parse_link
from robustdice.cost.profile import TYPICAL, Profile
from robustdice.cost.purpose import PURPOSES, Purpose
from robustdice.errors import PlanError, RobustdiceError
from robustdice.importance.values import NORMALISATIONS, SCORING_SAMPLES
from robustdice.partitioning import METHODS, SPLITS, WITHOUT_SCORES, check_split
from robustdice.plan import check_wire
from robustdice.progress import silent
from robustdice.report import plots
from robustdice.representation import ACTIVATIONS, REPRESENTATIONS, ROUNDING_SAMPLES, TRIAL_SAMPLES
from robustdice.terminal import out, progress, waiting
from robustdice.wire_format import WIRES


@app.command(epilog="Example: robustdice plan resnet20.pt2 --devices 4 --memory 0.6 --scores scores.npz -o plan.json")
def plan(
    model: ModelArgument,
    devices: Annotated[int, number("--devices", "number of devices, 2 to 16")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN", help="where to write the plan (.json)")],
    method: Annotated[
        str,
        typer.Option(
            help="robustdice, lop (slices), cdc (slices and their sum), full (replicas of everything), auto (what "
            "keeps most of the accuracy within --memory, or is best --for something), or your own, "
            "package.module:function",
            autocompletion=one_of(*METHODS, "auto"),
        ),
    ] = "robustdice",
    memory: Annotated[
        str | None,
        typer.Option(
            help="the most that a device may hold: a share of the model (0.5) or bytes (80MB); for auto also each "
            "device's own (40MB,40MB,80MB)"
        ),
    ] = None,
    survive: Annotated[
        int | None, number("--survive", "for auto: devices down at once that it is made for (all but one)", least=0)
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(metavar="T", help="cluster threshold, not --memory: a number, or a file with one per layer"),
    ] = None,
    normalisation: Annotated[
        str, typer.Option(metavar="HOW", help="of the scores in each layer before distances: minmax, rank or none")
    ] = "minmax",
    precision: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="what primaries are kept in: " + ", ".join(REPRESENTATIONS),
            autocompletion=one_of(*REPRESENTATIONS),
        ),
    ] = "float32",
    spare_precision: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="what spares are kept in (as primaries)", autocompletion=one_of(*REPRESENTATIONS)
        ),
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="what layers read: float32, or int8 where all copies are in int8, which takes half the time",
            autocompletion=one_of(*ACTIVATIONS),
        ),
    ] = "float32",
    split: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="neurons (their outputs are gathered); hidden: where that hands over less, a layer together with "
            "the one that reads it, and partial sums are added up; rows: early layers with few weights are held by "
            "all and computed in strips of the map; auto: each layer as is modelled to be fastest",
            autocompletion=one_of(*SPLITS),
        ),
    ] = "neurons",
    wire: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="what devices hand each other values as: " + ", ".join(WIRES),
            autocompletion=one_of(*WIRES),
        ),
    ] = "float32",
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="what 'robustdice profile' measured on a device (else typical figures)"),
    ] = None,
    link: Annotated[
        str | None, typer.Option(metavar="RATE", help="of a device's link, for modelled figures: 1Gbit, 100Mbit (none)")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="GOAL",
            help="throughput (several frames in flight) or latency (one alone): what --split auto or rows (throughput "
            "unless said otherwise) and --method auto choose for; for --method auto also memory (the least). It takes "
            "the best of all plans that keep nearly as much as the most accurate one",
            autocompletion=one_of(*PURPOSES),
        ),
    ] = None,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="what 'robustdice score' wrote")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="unlabelled images to score with, and to round coarse copies by"),
    ] = None,
    use: Use = "s1,s2,s3",
    s3: S3 = "auto",
    scheduler: Scheduler = None,
    plot: Plot = None,
    samples: Annotated[
        int | None, number("--samples", f"images of DATA to score with ({SCORING_SAMPLES})", least=1)
    ] = None,
    skip_bad: SkipBad = False,
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
    if normalisation not in NORMALISATIONS:
        raise PlanError(f"unknown normalisation {normalisation!r}; known: {', '.join(NORMALISATIONS)}")
    auto = method == "auto"
    check_split(split, method, None if auto else goal)
    check_wire(wire, sums=method == "cdc")
    _check_activations(activations, data, method, {precision, spare_precision or precision})
    given = {"--scores": scores, "--threshold": threshold, "--survive": survive, "--spare-precision": spare_precision}
    given["--precision"] = None if precision == "float32" else precision
    given["--samples"] = samples
    given["--split"] = None if split == "neurons" else split
    _check_of_use(method, {option for option, value in given.items() if value is not None})
    judge, purpose = _judge_and_purpose(profile, link, goal, auto)
    source = "typical figures" if profile is None else str(profile)
    if auto and (data is None or (memory is None and purpose is None)):
        raise RobustdiceError(
            "auto needs unlabelled images, --data DATA, and --memory, what each device may hold, unless it chooses "
            "--for something"
        )
    with waiting("loading the model"):
        network = load_model(model, random_weights, seed, size, mean, std, classes)
    judge.profile.check_fits(network.reference)
    importance = columns = images = None
    thresholds = None if threshold is None else read_thresholds(threshold)
    if method not in WITHOUT_SCORES and not auto:
        columns = use.split(",")
        if scores is not None:
            importance = rd.Importance.load(scores)
        elif data is not None:
            count = samples or SCORING_SAMPLES
            images = load_data(data, network, count, seed, "train", labelled=False, skip_bad=skip_bad)
            importance = score_with(network, images, columns, s3, scheduler)
        elif method == "robustdice":
            raise RobustdiceError("robustdice plans by importance: give --scores FILE, or --data DATA to score with")
    if auto and data is not None:
        count = ROUNDING_SAMPLES + TRIAL_SAMPLES
        both = load_data(data, network, count, seed, "train", labelled=False, skip_bad=skip_bad)
        images, others = both.divide(ROUNDING_SAMPLES, seed)
        with progress("choosing") as advance:
            considered = rd.choose_plan(
                network,
                images.images(),
                devices=devices,
                memory=memory,
                others=others.images() if len(others) else None,
                survive=survive,
                wire=wire,
                profile=judge.profile,
                link=link,
                goal=goal,
                on_progress=advance,
            )
        show_plan(network, considered[0].plan, output, plot, as_json, images, judge, source, considered, purpose)
        return
    coarse = {precision, spare_precision or precision} != {"float32"}
    seen = None
    if coarse and data is not None:
        images = load_data(data, network, ROUNDING_SAMPLES, seed, "train", labelled=False, skip_bad=skip_bad)
        seen = images.images()
    with progress("rounding") if coarse else contextlib.nullcontext(silent) as advance:
        made = rd.partition(
            network,
            importance,
            devices=devices,
            method=method,
            memory=memory,
            threshold=thresholds,
            columns=columns,
            normalisation=normalisation,
            precision=precision,
            spare_precision=spare_precision,
            images=seen,
            split=split,
            wire=wire,
            profile=judge.profile,
            link=link,
            goal=goal,
            on_progress=advance,
        )
    made = _with_activations(activations, network, made, seen)
    show_plan(network, made, output, plot, as_json, images, judge, source)
    if coarse and seen is None and not as_json:
        out.print("Coarse weights are rounded to the nearest: with --data DATA they are fitted to images.")


def _check_of_use(method: str, given: set[str]) -> None:
    """PlanError for options that the method has no use for."""
    if method != "auto" and "--survive" in given:
        raise PlanError("--survive is for --method auto: other methods make plans for any number of failures")
    if method == "auto" and (chosen := sorted(given - {"--survive"})):
        raise PlanError(f"auto chooses by itself; leave out {', '.join(chosen)}, or choose another --method")
    if method in WITHOUT_SCORES and "--scores" in given:
        raise PlanError(f"method {method} looks at no scores: leave out --scores, or choose another --method")


def _judge_and_purpose(
    profile: Path | None, link: str | None, goal: str | None, auto: bool
) -> tuple[Judge, Purpose | None]:
    """By what speeds are modelled, and what method auto chooses for; other methods choose by the judge's own goal."""
    measured = TYPICAL if profile is None else Profile.load(profile)
    rate = None if link is None else parse_link(link)
    purpose = None if goal is None or not auto else Purpose.of(goal, measured, rate)
    return Judge(measured, rate, goal or "throughput") if purpose is None else purpose.judge, purpose


def _check_activations(activations: str, data: str | None, method: str, kinds: set[str]) -> None:
    if activations not in ACTIVATIONS:
        raise PlanError(f"unknown activations {activations!r}; known: {', '.join(ACTIVATIONS)}")
    if activations == "float32":
        return
    if data is None:
        raise RobustdiceError("activations in 8 bits are fitted to unlabelled images: give --data DATA")
    if method == "auto" or kinds != {"int8"}:
        raise PlanError(
            "8 bits are multiplied where all copies are in int8: give --precision int8, and no --method auto"
        )


def _with_activations(
    activations: str, network: rd.Network, made: rd.Plan, images: NDArray[np.float32] | None
) -> rd.Plan:
    return made if activations == "float32" or images is None else rd.round_activations(network, made, images)
