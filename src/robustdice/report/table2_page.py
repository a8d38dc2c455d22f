"""The report of Table II: one HTML file that needs nothing else, and the table that the command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from robustdice.markup import html_table
from robustdice.report import paper
from robustdice.report.page import as_page, described_as, heading
from robustdice.report.sheet import Sheet
from robustdice.report.table2_rows import Row, Table2

UNKNOWN = '<span class="missing">not in our notes</span>'


def render(table: Table2, figure: str, about: Mapping[str, str]) -> str:
    """The whole page. Everything is measured; what the paper says stands beside it where it is known."""
    models: dict[str, list[Row]] = {}
    for row in table.rows:
        models.setdefault(row["model"], []).append(row)
    parts = [
        "<h1>RobustDiCE: the paper's Table II, measured</h1>",
        *(f"<p>{escape(line)}</p>" for line in [*_intro(table), *(f"Warning: {each}." for each in table.warnings())]),
        described_as(about),
        "<h2>Over full replication</h2>",
        figure[figure.index("<svg") :],
        *(f"<h2>{escape(model)}</h2>{_table(rows)}" for model, rows in models.items()),
    ]
    return as_page(parts)


def _intro(table: Table2) -> list[str]:
    rows = table.rows
    busy = sorted(row["processors_busy_elsewhere"] for row in rows)
    energy = dict.fromkeys(row["energy"] for row in rows if row["joules_per_image"] is None)
    untrained = dict.fromkeys(row["model"] for row in rows if not row["trained"])
    commits = ", ".join(dict.fromkeys(row["commit"] or "an unknown commit" for row in rows))
    return [
        "Each device is a process of its own on one core of this machine (device k on core k modulo their number), "
        f"behind {table.network}. So these are not the speeds of devices with processors of their own: where there are "
        "more devices than cores, they share them. A client beside them keeps 4 frames in flight, encrypted as always.",
        *(f"{model} has random weights, which speed and memory hardly depend on." for model in untrained),
        "Memory is what the largest device's process itself reports: the most that was ever resident (VmHWM: with "
        "Python, libraries, and what loading took), and the bytes of its weights.",
        "Hot spares are computed on every frame, as in the paper: with full replication every device computes every "
        "frame. Standby spares are computed when their device has to stand in: with full replication devices take "
        "frames in turn. Ratios are over full replication on as many devices with the same kind of spares.",
        f"Load: while they were measured, other programs kept {busy[0]:.1f} to {busy[-1]:.1f} processors busy "
        f"(median {busy[len(busy) // 2]:.1f}), starts and ends of the devices included. Measured at {commits}, "
        f"{min(row['date'] for row in rows)} to {max(row['date'] for row in rows)}.",
        *(f"No energy: {reason}." for reason in energy),
        paper.OF_TABLE2,
    ]


def _table(rows: Sequence[Row]) -> str:
    """A row per number of devices, kind of spares and method; the ratio below each figure."""
    measures_energy = any(row["joules_per_image"] is not None for row in rows)
    head = ["Devices", "Spares", "Method", "Frames/s", "Median latency, ms", "Peak memory, MB", "Weights, MB"]
    head += ["J/image"] if measures_energy else []
    head += ["The paper's memory", "Processors busy elsewhere"]
    cells = []
    for row in rows:
        line = [str(row["devices"]), row["spares"], escape(heading(row["method"]))]
        line += [_with_ratio(row, "frames_per_second", 1, ".2f"), f"{row['latency_p50_ms']:.0f}"]
        line += [_with_ratio(row, key, 1e-6, ".1f") for key in ("peak_rss_bytes", "weights_bytes")]
        line += [_with_ratio(row, "joules_per_image", 1, ".3g")] if measures_energy else []
        line += [_of_paper(row), f"{row['processors_busy_elsewhere']:.1f}"]
        cells.append(line)
    return html_table(head, cells)


def _with_ratio(row: Row, key: str, unit: float, form: str) -> str:
    if row[key] is None:
        return '<span class="missing">not measured</span>'
    ratio = row[f"{key}_ratio"]
    return f"{row[key] * unit:{form}}" + ("" if ratio is None else f"<small>{100 * ratio:.1f} % of full</small>")


def _of_paper(row: Row) -> str:
    if row["method"] == "full":
        return "100 %"
    return UNKNOWN if row["paper_memory_ratio"] is None else f"{100 * row['paper_memory_ratio']:.1f} % of full"


def sheet(table: Table2) -> Sheet:
    """What the command prints."""
    headings = ["model", "devices", "spares", "method", "frames/s", "of full", "peak memory", "of full", "the paper"]
    found = Sheet("Table II, measured", *headings, caption=f"Devices are processes behind {table.network}.")
    for row in table.rows:
        ratios = [row["frames_per_second_ratio"], row["peak_rss_bytes_ratio"], row["paper_memory_ratio"]]
        rate, memory, known = ("" if ratio is None else f"{100 * ratio:.1f} %" for ratio in ratios)
        cells = [
            row["model"],
            str(row["devices"]),
            row["spares"],
            row["method"],
            f"{row['frames_per_second']:.2f}",
            rate,
        ]
        found.add_row(*cells, f"{row['peak_rss_bytes'] / 1e6:.1f} MB", memory, known)
    return found
