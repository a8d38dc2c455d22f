"""Pictures of results: functions from data to a figure, and one that writes it. Needs matplotlib, and no display."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robustdice.errors import OutputError
from robustdice.files import write_atomically
from robustdice.importance.values import Importance, normalise
from robustdice.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from robustdice.failure.evaluate import Evaluation

# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SUFFIXES = (".png", ".svg", ".pdf")


def accuracy(evaluations: Sequence[Evaluation]) -> Figure:
    """Top-1 accuracy against the number of failed devices: a line (mean) and a band (worst to best) per plan."""
    figure = _figure(7.0, 4.2)
    axes = figure.add_subplot()
    draw_accuracy(axes, evaluations)
    axes.set_xlabel("devices down")
    axes.set_ylabel("top-1 accuracy, %")
    figure.legend(fontsize=8, frameon=False, ncols=2, loc="outside lower center")
    first = evaluations[0]
    sampled = any(summary.sampled for result in evaluations for summary in result.by_size.values())
    axes.set_title(
        f"Measured on {first.samples:,} images of {first.data}: mean, and worst to best failure set"
        + (" (of a sample)" if sampled else ""),
        fontsize=9,
        loc="left",
    )
    return figure


def plot_accuracy(evaluations: Evaluation | Sequence[Evaluation], path: str | os.PathLike[str] | None = None) -> Figure:
    """Accuracy against the number of failed devices, a line and a band for each plan; see :func:`accuracy`.

    A matplotlib figure, which notebooks show; with ``path`` also a .png, .svg or .pdf file. OutputError when it cannot
    be written.
    """
    several = evaluations if isinstance(evaluations, Sequence) else [evaluations]
    return _kept(accuracy(several), path)


def plot_plan(plan: Plan, path: str | os.PathLike[str] | None = None) -> Figure:
    """How many devices hold the neurons of each layer, as :func:`plot_accuracy`; see :func:`holders`."""
    return _kept(holders(plan), path)


def plot_scores(scores: Importance, path: str | os.PathLike[str] | None = None) -> Figure:
    """Every neuron's scores, as :func:`plot_accuracy`; see :func:`importance`."""
    return _kept(importance(scores), path)


def _kept(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        save(figure, Path(path))
    return figure


def draw_accuracy(axes: Axes, evaluations: Sequence[Evaluation]) -> None:
    """The lines and bands of :func:`accuracy`, and the intact model's accuracy."""
    for number, result in enumerate(evaluations):
        sizes = list(result.by_size)
        worst, mean, best = (
            [100 * getattr(result.by_size[size], key) for size in sizes] for key in ("worst", "mean", "best")
        )
        colour = COLOURS[number % len(COLOURS)]
        label = f"{result.method}, at most {100 * result.memory_share:.0f} % of the model each"
        axes.fill_between(sizes, worst, best, color=colour, alpha=0.15, linewidth=0)
        axes.plot(sizes, mean, color=colour, marker="os^Dvx"[number % 6], markersize=4, label=label)
    axes.axhline(100 * evaluations[0].clean, color="black", linewidth=0.8, linestyle=":", label="the model alone")
    axes.set_xticks(range(max(max(result.by_size) for result in evaluations) + 1))
    axes.set_ylim(0, 100)


def scenarios(models: Mapping[str, Mapping[int, Sequence[Evaluation]]], names: Mapping[int, str]) -> Figure:
    """The paper's Figure 2: a row per model, a column per number of devices, a line and a band per method."""
    figure = _figure(10.0, 0.8 + 2.6 * len(models))
    panels: Any = figure.subplots(len(models), len(names), squeeze=False, sharey=True)
    for row, (model, by_devices) in zip(panels, models.items(), strict=True):
        for axes, (devices, evaluations) in zip(row, by_devices.items(), strict=True):
            draw_accuracy(axes, evaluations)
            axes.set_title(f"{names[devices]}: {model}", fontsize=8)
        row[0].set_ylabel("top-1 accuracy, %", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("devices down", fontsize=8)
    compared = list(next(iter(models.values())).values())
    fullest = max(range(len(compared)), key=lambda column: len(compared[column]))
    handles, _ = panels[0][fullest].get_legend_handles_labels()
    labels = [*(result.method for result in compared[fullest]), "the model alone"]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def running(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Table II as bars over full replication's: a row per model, a panel for frames per second and one for memory."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "full"]
    groups = list(dict.fromkeys((row["devices"], row["spares"]) for row in rows))
    by_name = {(row["model"], row["devices"], row["spares"], row["method"]): row for row in rows}
    shown = {"frames_per_second": "frames/s", "peak_rss_bytes": "memory"}
    figure = _figure(10.0, 0.8 + 2.6 * len(models))
    panels: Any = figure.subplots(len(models), len(shown), squeeze=False)
    for of_model, model in zip(panels, models, strict=True):
        for axes, (key, title) in zip(of_model, shown.items(), strict=True):
            for number, method in enumerate(methods):
                heights = [by_name.get((model, *group, method), {}).get(f"{key}_ratio") or 0 for group in groups]
                places = np.arange(len(groups)) + (number + 0.5 - len(methods) / 2) * 0.8 / len(methods)
                axes.bar(places, heights, 0.8 / len(methods), color=COLOURS[number % len(COLOURS)], label=method)
            axes.axhline(1, color="black", linewidth=0.8, linestyle=":", label="full replication")
            axes.set_xticks(range(len(groups)), [f"{devices}\n{spares}" for devices, spares in groups], fontsize=7)
            axes.set_title(f"{model}: {title} over full replication's", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def holders(plan: Plan) -> Figure:
    """For every layer, a bar: its neurons by how many devices hold them; hatched where a parity shard backs them."""
    figure = _figure(7.0, 1.6 + 0.17 * len(plan.layers))
    axes = figure.add_subplot()
    shades = _shades(plan.devices)
    for row, (layer, shards) in enumerate(zip(plan.layers, plan.shards, strict=True)):
        hatch = "///" if plan.exchanged_before_tail(row) else None
        start = 0.0
        for copies in range(1, plan.devices + 1):
            held = sum(len(shard.neurons) for shard in shards if len(shard.holders) == copies)
            width = 100 * held / layer.neurons
            axes.barh(row, width, left=start, color=shades[copies - 1], height=0.85, hatch=hatch, edgecolor="white")
            start += width
    for copies, shade in enumerate(shades, start=1):
        axes.barh(0, 0, color=shade, label=f"held by {copies}")
    if any(map(plan.exchanged_before_tail, range(len(plan.layers)))):
        axes.barh(0, 0, color=shades[0], hatch="///", edgecolor="white", label="and part of a sum")
    names = [f"{layer.name} ({layer.neurons})" for layer in plan.layers]
    axes.set_yticks(range(len(names)), names, fontsize=min(8, 6 + 60 / len(names)))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("neurons of the layer, %")
    figure.legend(ncols=6, fontsize=8, frameon=False, loc="outside lower center")
    axes.set_title(
        f"{plan.method} on {plan.devices} devices: at most {100 * plan.memory_share:.0f} % of the model on each",
        fontsize=9,
        loc="left",
    )
    return figure


def importance(scores: Importance) -> Figure:
    """Every neuron's scores, each brought to 0..1 within its layer and sorted: a row per layer, a panel per score."""
    rows = len(scores.names)
    figure = _figure(2.2 + 2.6 * len(scores.columns), 1.4 + 0.17 * rows)
    panels: Any = figure.subplots(1, len(scores.columns), squeeze=False, sharey=True)[0]
    scaled = [normalise(layer) for layer in scores.scores]
    for column, (name, axes) in enumerate(zip(scores.columns, panels, strict=True)):
        # A layer has as many neurons as it has: all are stretched over the same width.
        table = np.array(
            [
                np.interp(np.linspace(0, 1, 200), np.linspace(0, 1, len(layer)), np.sort(layer[:, column])[::-1])
                if len(layer) > 1
                else np.full(200, layer[0, column])
                for layer in scaled
            ]
        )
        image = axes.imshow(
            table,
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0, 100, rows - 0.5, -0.5),
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("neurons, most important first, %", fontsize=8)
    names = [f"{name} ({len(layer)})" for name, layer in zip(scores.names, scores.scores, strict=True)]
    panels[0].set_yticks(range(rows), names, fontsize=min(8, 6 + 60 / rows))
    figure.colorbar(image, ax=list(panels), label="score, 0..1 within its layer", fraction=0.04)
    return figure


def check_name(path: Path | None) -> None:
    """OutputError when a picture is wanted under a name that is no picture's, or by somebody without matplotlib."""
    if path is not None:
        if path.suffix.lower() not in SUFFIXES:
            raise OutputError(f"a picture's name ends with {', '.join(SUFFIXES)}, not {path.name!r}")
        _figure(1, 1)


def save(figure: Figure, path: Path) -> None:
    """Write a picture; its kind follows from the suffix. OutputError when that is no picture's, or on a full disk."""
    check_name(path)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower()[1:], dpi=150)
    write_atomically(path, content.getvalue())


def _figure(width: float, height: float) -> Figure:
    try:
        from robustdice.report.picture import Picture  # noqa: PLC0415 -- heavy, and not on devices
    except ModuleNotFoundError:
        raise OutputError("pictures need matplotlib: pip install 'robustdice[workshop]'") from None
    return Picture(figsize=(width, height), layout="constrained")


def _shades(count: int) -> list[tuple[float, float, float]]:
    """From light (one holder) to dark (all)."""
    light, dark = np.array([0.80, 0.88, 0.95]), np.array([0.03, 0.19, 0.42])
    steps = np.linspace(0, 1, count)
    return [tuple(float(part) for part in light + (dark - light) * step) for step in steps]  # type: ignore[misc]
