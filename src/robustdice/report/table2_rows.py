"""What running devices gave, by method: rows for Table II."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustdice.report import paper

COMPARED = ("frames_per_second", "peak_rss_bytes", "weights_bytes", "joules_per_image")
"""What is shown as a ratio over full replication, on as many devices and with spares of the same kind."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Table2:
    """``rows`` as ``table2-measured.csv`` has them (docs/formats.md), the ``network`` that the devices ran behind, why
    there was ``no_switch`` where one was wanted, and what could not be measured: its name, and why."""

    network: str
    no_switch: str | None
    rows: Sequence[Row]
    failed: Mapping[str, str]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "network": self.network,
            "no_switch": self.no_switch,
            "rows": list(self.rows),
            "failed": dict(self.failed),
        }

    def warnings(self) -> list[str]:
        """What a reader of the figures must know."""
        found = [] if self.no_switch is None else [f"not behind a switch: {self.no_switch}"]
        found += [f"not measured: {name}: {reason}" for name, reason in self.failed.items()]
        for row in self.rows:
            if row["unanswered"] or row["coverage"] < 1:
                said = f"{row['unanswered']} of {row['samples']} frames were not answered"
                found.append(f"{name_of(row)}: {said}; the others' mean coverage is {100 * row['coverage']:.1f} %")
        return found


def name_of(row: Row) -> str:
    """What tells a row from all others, for people."""
    return f"{row['model']}, {row['devices']} devices, {row['method']}, {row['spares']} spares"


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with what is compared over full replication's, and the paper's memory over full replication's; None
    where there is nothing to compare."""
    full = {(row["model"], row["devices"], row["spares"]): row for row in rows if row["method"] == "full"}
    found = []
    for row in rows:
        base = full.get((row["model"], row["devices"], row["spares"]), {})
        ratios = {
            f"{key}_ratio": row[key] / base[key] if row[key] is not None and base.get(key) else None for key in COMPARED
        }
        known = paper.MEMORY.get(row["source"], {}) if row["method"] == "robustdice" else {}
        found.append({**row, **ratios, "paper_memory_ratio": known.get(row["devices"])})
    return found
