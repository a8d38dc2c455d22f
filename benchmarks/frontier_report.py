"""What `frontier.py` has measured, as pictures and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustdice.report.picture import Picture
from robustdice.report.plots import COLOURS, save

GOALS = {
    0.25: (99.9, 99.9, 99.9),
    0.125: (99.7, 99.7, 99.7),
    0.1: (99.3, 99.3, 99.3),
    0.08: (99, 98, 96),
    0.06: (98, 95, 88),
    0.05: (97, 90, 75),
    0.04: (95, 80, 50),
    0.03: (90, 65, 35),
}
"""By budget, what share of the clean accuracy (per cent) is to be kept with one, two and three of four devices down."""
SIZES = (1, 2, 3)
AUTO, REFINED = "auto", "auto, refined"
"""What ``plan --method auto`` answers with, and the same after ``calibrate --passes``."""


def expecting(down: int) -> str:
    """The variant of ``auto`` that is told (``--survive``) how many devices may be down; it is none when any may."""
    return f"for up to {down} down"


STYLES: dict[str, dict[str, Any]] = {
    "whole, nearest": {"color": COLOURS[5], "marker": "v", "linestyle": ":"},
    "whole, GPTQ": {"color": COLOURS[0], "marker": "o", "linestyle": "--"},
    "whole, mixed by sensitivity": {"color": COLOURS[2], "marker": "s", "linestyle": "--"},
    "the paper's method, float32": {"color": COLOURS[1], "marker": "^", "linestyle": "-"},
    "the paper's method, int8": {"color": COLOURS[1], "marker": "x", "linestyle": "--"},
    "LOP": {"color": COLOURS[3], "marker": "D", "linestyle": ""},
    "CDC": {"color": COLOURS[4], "marker": "P", "linestyle": ""},
}
"""Of the competitors."""


@dataclass(frozen=True)
class Point:
    """One plan's accuracy (fractions) with ``down`` devices down, in the worst failure set, and its 95 % interval."""

    model: str
    method: str
    variant: str
    budget: float | None
    share: float
    device_bytes: int
    down: int
    worst: float
    low: float
    high: float
    clean: float
    images: int
    commit: str
    machine: str

    @property
    def told(self) -> bool:
        """Whether ``auto`` was told to expect so many failures and no more."""
        return self.method == AUTO and self.variant != ""

    @property
    def name(self) -> str:
        """The method, and in which variant."""
        return f"{self.method} ({self.variant})" if self.variant else self.method


def point(row: dict[str, Any]) -> Point:
    """A row of ``points.csv``."""
    return Point(
        model=row["model"],
        method=row["method"],
        variant=row["variant"],
        budget=float(row["budget"]) if row["budget"] else None,
        share=float(row["share"]),
        device_bytes=int(row["device_bytes"]),
        down=int(row["down"]),
        worst=float(row["worst"]),
        low=float(row["low"]),
        high=float(row["high"]),
        clean=float(row["clean"]),
        images=int(row["images"]),
        commit=row["commit"],
        machine=row["machine"],
    )


@dataclass(frozen=True)
class Comparison:
    """The plan that ``auto`` makes for a budget, and a competitor's best that fits it, with as many devices down."""

    auto: Point
    rival: Point

    @property
    def gap(self) -> float:
        """By how much the rival is better."""
        return self.rival.worst - self.auto.worst

    @property
    def certain(self) -> bool:
        """Whether the rival is better beyond sampling error: by the 95 % interval of the difference of two shares
        (Newcombe 1998, of Wilson's intervals; that both see the same images would make it narrower)."""
        return self.gap > math.hypot(self.rival.worst - self.rival.low, self.auto.high - self.auto.worst)


def comparisons(points: Sequence[Point], told: bool = False) -> Iterator[Comparison]:
    """Every budget and number of failures, each with every competitor of which something fits. ``told``: with the plan
    that ``auto`` makes for so many failures, else with the one for any number."""
    for auto in points:
        if auto.method != AUTO or auto.budget is None:
            continue
        if auto.variant != (expecting(auto.down) if told and auto.down < max(SIZES) else ""):
            continue
        for method in STYLES:
            fitting = [
                each
                for each in points
                if (each.model, each.method, each.down) == (auto.model, method, auto.down)
                and each.share <= auto.budget
                and each.images == auto.images
            ]
            if fitting:
                yield Comparison(auto, max(fitting, key=lambda each: each.worst))


def write_report(rows: Sequence[dict[str, Any]], residents: Sequence[dict[str, Any]], out: Path) -> None:
    """Pictures and ``tables.md`` into a directory; ``residents`` are the rows of ``resident.csv``."""
    points = [point(row) for row in rows]
    models = list(dict.fromkeys(each.model for each in points))
    sections = [_measured_on(points)]
    for model in models:
        of_model = [each for each in points if each.model == model]
        for down in SIZES:
            save(picture([each for each in of_model if each.down == down]), out / f"{model}-{down}-down.png")
        sections += [f"## {model}", goals_table(of_model), comparison_table(of_model)]
    if residents:
        sections += ["## Resident memory", resident_table(residents)]
    (out / "tables.md").write_text("\n\n".join(["# Tables", *sections]) + "\n", encoding="utf-8")


def picture(points: Sequence[Point]) -> Picture:
    """Accuracy in the worst failure set of one size against the largest device's share of the float32 bytes."""
    figure = Picture(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    first = points[0]
    axes.axhline(100 * first.clean, color="black", linewidth=0.8, linestyle=":", label="the model alone")
    goals = [(100 * budget, first.clean * kept[first.down - 1]) for budget, kept in sorted(GOALS.items())]
    axes.plot(*zip(*goals, strict=True), color="grey", linewidth=0.8, marker="_", label="goal")
    for method, style in STYLES.items():
        found = sorted((100 * each.share, 100 * each.worst) for each in points if each.method == method)
        if found:
            axes.plot(*zip(*found, strict=True), label=method, markersize=4, linewidth=1, **style)
    auto = sorted((each for each in points if each.method == AUTO and not each.told), key=lambda each: each.share)
    if auto:
        shares = [100 * each.share for each in auto]
        axes.fill_between(
            shares,
            [100 * each.low for each in auto],
            [100 * each.high for each in auto],
            color="black",
            alpha=0.12,
            linewidth=0,
        )
        axes.plot(shares, [100 * each.worst for each in auto], "ko-", markersize=4, label="auto, and its 95 % interval")
    refined = [each for each in points if each.method == REFINED]
    if refined:
        axes.plot([100 * each.share for each in refined], [100 * each.worst for each in refined], "k*", label="refined")
    axes.set_xscale("log")
    ticks = (3, 4, 5, 6, 8, 10, 12.5, 16, 25, 33, 50)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(2.5, 53)
    axes.set_ylim(0, 100 * min(1.0, first.clean + 0.08))
    axes.set_xlabel("bytes of the largest device over the model's float32 bytes, %")
    axes.set_ylabel("top-1 accuracy in the worst case, %")
    axes.set_title(f"{first.model}, {first.down} of 4 devices down, {first.images} images", fontsize=9, loc="left")
    figure.legend(fontsize=8, frameon=False, ncols=3, loc="outside lower center")
    return figure


def goals_table(points: Sequence[Point]) -> str:
    """What share of the clean accuracy is kept, beside the goals: bold where these are met, with the goal in brackets
    where they are not, and with ~ where that is within the sampling error; and what competitors that fit keep."""
    lines = [
        "Kept of what the model alone has, per cent (*refined*: `calibrate --passes` after `auto`); last, what the "
        "best competitor that fits keeps with one, two and three down:",
        "",
        "| budget | held | images | the model alone | none down | one down | two down | three down | competitors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for budget, goals in GOALS.items():
        for method in (AUTO, REFINED):
            by_size = {
                each.down: each for each in points if each.method == method and each.budget == budget and not each.told
            }
            if not by_size:
                continue
            kept = [_kept(by_size[down], goal) for down, goal in zip(SIZES, goals, strict=True)]
            healthy = by_size[0]
            lines.append(
                f"| {100 * budget:g}{' refined' if method == REFINED else ''} | {100 * healthy.share:.2f} "
                f"| {healthy.images} | {100 * healthy.clean:.1f} | {100 * healthy.worst:.1f} | {' | '.join(kept)} "
                f"| {_best_competitors(points, [by_size[down] for down in SIZES])} |"
            )
    done = {each.budget for each in points if each.method == AUTO and not each.told}
    if missing := [f"{100 * budget:g}" for budget in GOALS if budget not in done]:
        lines += ["", f"Not measured: the budgets {', '.join(missing)}."]
    return "\n".join(lines)


def _kept(found: Point, goal: float) -> str:
    kept = f"{100 * found.worst / found.clean:.1f}"
    if 100 * found.worst >= goal * found.clean:
        return f"**{kept}**"
    return f"{kept} ({goal:g}){' ~' if 100 * found.high >= goal * found.clean else ''}"


def _best_competitors(points: Sequence[Point], autos: Sequence[Point]) -> str:
    """Of the competitors that fit, what the best one keeps with as many down as each of ``autos``; which that is."""
    rivals = [each for each in points if each.method in STYLES]
    found = [[each.rival for each in comparisons([replace(auto, method=AUTO, variant=""), *rivals])] for auto in autos]
    if not all(found):
        return "none fits"
    best = [max(each, key=lambda rival: rival.worst) for each in found]
    kept = [f"{100 * each.worst / each.clean:.1f}" for each in best]
    names = [each.name for each in best]
    if len(set(names)) == 1:
        return f"{' / '.join(kept)} ({names[0]})"
    return " / ".join(f"{share} ({name})" for share, name in zip(kept, names, strict=True))


def comparison_table(points: Sequence[Point]) -> str:
    """Where ``auto`` is below a competitor that fits the same budget."""
    counted = [f"{method}: {sum(each.method == method and not each.down for each in points)}" for method in STYLES]
    told = {each.budget for each in points if each.told}
    return "\n\n".join(
        [
            f"Plans of competitors: {'; '.join(counted)}.",
            "One plan for any number of failures: " + _below(list(comparisons(points))),
            "A plan for each number of failures (`--survive`): "
            + _below([each for each in comparisons(points, told=True) if each.auto.budget in told]),
        ]
    )


def _below(found: Sequence[Comparison]) -> str:
    if not found:
        return "not measured."
    below = [each for each in found if each.gap > 0]
    certain = [each for each in below if each.certain]
    budgets = len({each.auto.budget for each in found})
    lines = [
        f"{len(found)} comparisons with competitors that fit, at {budgets} budgets and 0 to 3 devices down; `auto` is "
        f"below in {len(below)}, beyond the sampling error in {len(certain)}."
    ]
    if below:
        most = max(below, key=lambda each: each.gap)
        lines.append(
            f"The largest gap is {100 * most.gap:.1f} points ({most.rival.name}, {most.auto.down} down, at "
            f"{100 * (most.auto.budget or 0):g} %), the median {100 * statistics.median(b.gap for b in below):.1f}."
        )
    if certain:
        lines += [
            "",
            "| budget, % | down | auto, % | competitor | its share, % | its accuracy, % |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {100 * (each.auto.budget or 0):g} | {each.auto.down} | {100 * each.auto.worst:.1f} | {each.rival.name} "
            f"| {100 * each.rival.share:.2f} | {100 * each.rival.worst:.1f} |"
            for each in certain
        ]
    return "\n".join(lines)


def resident_table(rows: Sequence[dict[str, Any]]) -> str:
    """What device processes take beside what a plan says."""
    lines = ["| model | plan | bytes of the largest device, MB | resident, MB | at most, MB |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['model']} | {row['plan']} | "
        + " | ".join(f"{int(row[key]) / 1e6:.2f}" for key in ("device_bytes", "resident_bytes", "peak_bytes"))
        + " |"
        for row in rows
    ]
    return "\n".join(lines)


def _measured_on(points: Sequence[Point]) -> str:
    commits = ", ".join(dict.fromkeys(each.commit for each in points))
    return f"Commits: {commits}; machines: {'; '.join(dict.fromkeys(each.machine for each in points))}."
