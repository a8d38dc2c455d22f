"""Which device holds which neurons (NumPy only)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from robustdice.errors import PlanError
from robustdice.importance.values import Importance
from robustdice.partitioning.cdc import cdc
from robustdice.partitioning.lop import lop
from robustdice.partitioning.replicate import full
from robustdice.partitioning.request import Answer, Request
from robustdice.partitioning.robust import robustdice
from robustdice.plan import MAX_DEVICES, Layer, ModelReference, Plan
from robustdice.provenance import versions

__all__ = ["METHODS", "partition"]

METHODS: dict[str, Callable[[Request], Answer]] = {"robustdice": robustdice, "lop": lop, "cdc": cdc, "full": full}
"""The ways to partition, by name."""


def partition(
    layers: Sequence[Layer],
    importance: Importance | None,
    *,
    devices: int,
    method: str = "robustdice",
    memory: float | str | None = None,
    threshold: float | Sequence[float] | None = None,
    columns: Sequence[str] | None = None,
    normalisation: str = "minmax",
    shared_weights: int,
    model: ModelReference,
) -> Plan:
    """A plan for ``layers`` on ``devices`` devices (2 to 16).

    ``method`` is one of :data:`METHODS`. ``robustdice`` needs the layers' ``importance`` and takes either
    ``memory``, what the largest device may hold (a share of the model such as 0.5, or an amount such as
    ``"80MB"``; 0.5 when nothing is said), or ``threshold``, the distance in scores below which neurons count as
    similar (one for all layers or one per layer). ``columns`` are the scores that distances are taken over
    (all there are), after ``normalisation`` (``minmax``, ``rank`` or ``none``) within each layer.
    ``shared_weights`` counts the parameters outside of all layers. PlanError when no such plan exists.
    """
    if method not in METHODS:
        raise PlanError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if not 2 <= devices <= MAX_DEVICES:
        raise PlanError(f"a plan is for 2 to {MAX_DEVICES} devices, not {devices}")
    if not layers:
        raise PlanError("the model has no layer that can be partitioned: no convolution, no linear layer")
    request = Request(
        layers=layers,
        importance=importance,
        devices=devices,
        memory=memory,
        threshold=threshold,
        columns=columns,
        normalisation=normalisation,
        shared_weights=shared_weights,
        model=model,
    )
    answer = METHODS[method](request)
    return Plan(
        devices=devices,
        layers=tuple(layers),
        shards=answer.shards,
        shared_weights=shared_weights,
        method=method,
        model=model,
        settings=answer.settings,
        provenance={**answer.provenance, "versions": versions("numpy")},
    )
