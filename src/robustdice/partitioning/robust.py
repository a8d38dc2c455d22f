"""RobustDiCE: similar neurons far from each other, and copies where a group does not divide evenly.

Paper, Algorithm 1: neurons of similar importance form groups (lines 10-20), and each group is dealt out over all
devices (lines 21-29). So no device holds everything of one kind, and a neuron that has no like is on
every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from robustdice.errors import PlanError
from robustdice.importance.values import Scores, normalise
from robustdice.partitioning.budget import parse_memory, solve_threshold
from robustdice.partitioning.cluster import cluster
from robustdice.partitioning.distribute import distribute, order_holders, to_shards
from robustdice.partitioning.replicate import whole
from robustdice.partitioning.request import Answer, Request
from robustdice.plan import Layer, Shard

DEFAULT_MEMORY = 0.5
"""The memory share that is aimed at when neither memory nor thresholds are given."""


def robustdice(request: Request) -> Answer:
    """The paper's method, from thresholds or from the memory that a device may use; PlanError when the
    request contradicts itself, the scores are not those of the layers, or the memory does not suffice."""
    if request.memory is not None and request.threshold is not None:
        raise PlanError(
            f"memory {request.memory!r} and threshold {request.threshold!r} are two ways to say the same; give one"
        )
    importance = request.importance
    if importance is None:
        raise PlanError("method robustdice needs importance scores; make them with score, or take method lop or full")
    scores = [normalise(layer_scores, request.normalisation) for layer_scores in importance.scores]
    settings: dict[str, Any] = {
        "columns": list(importance.columns),
        "normalisation": request.normalisation,
    }
    if request.threshold is None:
        memory = DEFAULT_MEMORY if request.memory is None else request.memory
        weights = request.shared_weights + sum(layer.neurons * layer.neuron_weights for layer in request.layers)
        budget = parse_memory(memory, 4 * weights)
        solved = solve_threshold(request.layers, scores, request.devices, budget, request.shared_weights, request.kinds)
        thresholds = [solved] * len(request.layers)
        settings["memory"] = memory
    else:
        thresholds = _thresholds(request.threshold, request.layers)
    # JSON knows no infinity.
    settings["thresholds"] = [t if math.isfinite(t) else "inf" for t in thresholds]
    shards = tuple(
        _shards(layer, layer_scores, threshold, request.devices, first=index)
        for index, (layer, layer_scores, threshold) in enumerate(zip(request.layers, scores, thresholds, strict=True))
    )
    return Answer(shards=shards, settings=settings)


def _shards(layer: Layer, scores: Scores, threshold: float, devices: int, first: int) -> tuple[Shard, ...]:
    holders = distribute(cluster(scores, threshold), devices)
    if all(len(of_unit) == devices for of_unit in holders):
        return whole(layer, devices)
    return to_shards(order_holders(holders, devices, first), layer.group)


def _thresholds(threshold: float | Sequence[float], layers: Sequence[Layer]) -> list[float]:
    values = [float(t) for t in np.atleast_1d(threshold)]
    if np.ndim(threshold) == 0:
        values *= len(layers)
    if len(values) != len(layers):
        raise PlanError(f"{len(values)} thresholds for {len(layers)} layers; give one for each, or one for all")
    if bad := [t for t in values if not t >= 0]:
        raise PlanError(f"a threshold is a distance, 0 or larger; got {bad[0]}")
    return values
