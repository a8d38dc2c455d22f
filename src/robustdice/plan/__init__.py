"""Who holds what: NumPy only. The workshop writes plans, the device side reasons with the same functions."""

from __future__ import annotations

from robustdice.plan.certificate import Certificate
from robustdice.plan.check import check_wire
from robustdice.plan.file import shard_from_json, shard_to_json
from robustdice.plan.pairs import added_up, column_weights, folded
from robustdice.plan.plan import ModelReference, Plan
from robustdice.plan.shards import (
    MAX_DEVICES,
    MAX_SETS,
    FailureSet,
    Holder,
    Layer,
    Shard,
    check_devices,
    check_layer,
    check_max_failed,
    failure_sets,
    nearest_calibrated,
    parity_problem,
    publishers,
    shard_width,
)
from robustdice.plan.strips import Strips

__all__ = [
    "MAX_DEVICES",
    "MAX_SETS",
    "Certificate",
    "FailureSet",
    "Holder",
    "Layer",
    "ModelReference",
    "Plan",
    "Shard",
    "Strips",
    "added_up",
    "check_devices",
    "check_layer",
    "check_max_failed",
    "check_wire",
    "column_weights",
    "failure_sets",
    "folded",
    "nearest_calibrated",
    "parity_problem",
    "publishers",
    "shard_from_json",
    "shard_to_json",
    "shard_width",
]
