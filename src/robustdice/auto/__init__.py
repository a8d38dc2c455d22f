"""The best plan for a budget: a table of what choices cost, what they add up to, and plans that are tried."""

from __future__ import annotations

from robustdice.auto.choice import check_room
from robustdice.auto.plans import (
    LEARNED,
    Candidate,
    best_first,
    candidates,
    corrected,
    least_to_matter,
    tried_out,
)
from robustdice.auto.table import MEASURED, ROUNDING_IMAGES, Table, affordable, tabulate

__all__ = [
    "LEARNED",
    "MEASURED",
    "ROUNDING_IMAGES",
    "Candidate",
    "Table",
    "affordable",
    "best_first",
    "candidates",
    "check_room",
    "corrected",
    "least_to_matter",
    "tabulate",
    "tried_out",
]
