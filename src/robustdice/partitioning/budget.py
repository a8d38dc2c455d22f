"""From memory to a threshold: people know how much their devices can hold, not how far apart neurons are."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from robustdice.errors import PlanError
from robustdice.importance.values import Scores
from robustdice.partitioning.cluster import cluster
from robustdice.partitioning.distribute import distribute, entries_per_device, order_holders
from robustdice.partitioning.precision import Kinds, bytes_of
from robustdice.plan import Layer

MAX_CLUSTERINGS = 40
"""How many thresholds are tried at most."""
PRECISION = 1e-6
"""The relative width of the interval at which the search ends."""

MOST_BYTES = 2**60
"""No device has more: an amount above it is as good as this one."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MEMORY = re.compile(r"\s*(?P<number>\d+\.?\d*|\.\d+)\s*(?P<unit>[KMG]?B)?\s*", re.IGNORECASE)


def parse_memory(memory: float | str, total_bytes: int) -> int:
    """The bytes that ``memory`` allows each device, for a model of ``total_bytes``.

    A number without a unit is a share in (0, 1] of the model's parameters in float32; with one
    (``"500KB"``, ``"80MB"``, ``"1.5GB"``, decimal) it is an amount. PlanError for anything else.
    """
    number, unit = memory, None
    if isinstance(memory, str):
        if "," in memory:
            raise PlanError(
                f"memory {memory!r} is an amount for each device, which only method auto plans for; give one amount, "
                "which every device has, or take method auto"
            )
        match = _MEMORY.fullmatch(memory)
        if match is None:
            raise PlanError(f"memory {memory!r} is not an amount; give a share such as 0.5, or bytes such as '80MB'")
        number, unit = float(match["number"]), match["unit"]
    number = float(number)
    if unit is not None:
        return math.floor(min(number * _UNITS[unit.upper()], MOST_BYTES))
    if not 0 < number <= 1:
        raise PlanError(
            f"memory {memory!r} is not a share of the model between 0 and 1; for an amount give its unit, as in '80MB'"
        )
    # The product may be rounded either way; what counts is the quotient, which is a plan's memory share.
    budget = math.floor(number * total_bytes) + 1
    while budget / total_bytes > number:
        budget -= 1
    return budget


def parse_memories(memory: float | str, total_bytes: int, devices: int) -> tuple[int, ...]:
    """The bytes that ``memory`` allows each of the ``devices``: one amount as :func:`parse_memory` takes it, or one for
    each device with commas between them (``"40MB,40MB,80MB,80MB"``). PlanError for anything else."""
    amounts = memory.split(",") if isinstance(memory, str) else [memory]
    if len(amounts) not in (1, devices):
        raise PlanError(
            f"memory {memory!r} has {len(amounts)} amounts for {devices} devices; give one for each, or one for all"
        )
    found = tuple(parse_memory(amount, total_bytes) for amount in amounts)
    return found * devices if len(found) == 1 else found


def share_of(needed_bytes: int, total_bytes: int) -> str:
    """The least share of the model, in four digits, that :func:`parse_memory` takes for ``needed_bytes`` or more."""
    units = math.ceil(10_000 * needed_bytes / total_bytes)
    while parse_memory(f"{units / 10_000:.4f}", total_bytes) < needed_bytes:
        units += 1
    return f"{units / 10_000:.4f}"


def solve_threshold(
    layers: Sequence[Layer],
    scores: Sequence[Scores],
    devices: int,
    budget: int,
    shared_weights: int,
    kinds: Sequence[Kinds],
) -> float:
    """The threshold whose plan uses as much of ``budget`` (bytes per device) as possible, and not more.

    ``scores`` are the layers' normalised scores, [units, columns] each, ``kinds`` what their copies are kept in. What
    a device holds falls as the threshold grows, in steps and almost but not quite always; so the threshold is bisected
    to where the budget is first kept, and the best of all that were tried is taken. Deterministic. 0 (everything
    everywhere) where that fits; PlanError, naming what is needed, where even one group per layer does not.
    """

    def held(threshold: float) -> int:
        return _bytes_per_device(layers, scores, devices, threshold, shared_weights, kinds)

    full = 4 * (shared_weights + sum(layer.neurons * layer.neuron_weights for layer in layers))
    if held(0.0) <= budget:
        return 0.0
    # Above the largest distance in any layer, one group per layer is left.
    high = float(np.nextafter(max(_extent(layer_scores) for layer_scores in scores), math.inf))
    best, least = high, held(high)
    if least > budget:
        raise PlanError(
            f"a plan for {devices} devices needs {share_of(least, full)} of the model on each of them "
            f"({least:,} bytes), {budget / full:.4f} ({budget:,} bytes) are allowed; allow so much memory, or use more "
            "devices"
        )
    most, low = least, 0.0
    # Everything that can be held is a sum of units: what is left open is less than the smallest of them.
    smallest = min(layer.group * min(bytes_of(layer, of_layer)) for layer, of_layer in zip(layers, kinds, strict=True))
    for _ in range(MAX_CLUSTERINGS - 2):  # two are done
        if budget - most < smallest or high - low < PRECISION * high:
            break
        middle = (low + high) / 2
        now = held(middle)
        if now > budget:
            low = middle
            continue
        high = middle
        if now > most:
            best, most = middle, now
    return best


def _bytes_per_device(
    layers: Sequence[Layer],
    scores: Sequence[Scores],
    devices: int,
    threshold: float,
    shared_weights: int,
    kinds: Sequence[Kinds],
) -> int:
    """Of the largest device."""
    held = np.full(devices, 4 * shared_weights, dtype=np.int64)
    for index, (layer, layer_scores, of_layer) in enumerate(zip(layers, scores, kinds, strict=True)):
        primary, spare = bytes_of(layer, of_layer)
        groups = cluster(layer_scores, threshold)
        if primary == spare:  # then it does not matter who comes first
            units = sum(entries_per_device(len(group), devices) for group in groups)
            held += units * layer.group * primary
            continue
        holders = distribute(groups, devices)
        if all(len(of_unit) == devices for of_unit in holders):  # every copy is a spare of the others
            held += layer.neurons * spare
            continue
        for order in order_holders(holders, devices, index):
            held[list(order)] += layer.group * spare
            held[order[0]] += layer.group * (primary - spare)
    return int(held.max())


def _extent(scores: Scores) -> float:
    """The diagonal of the box around the points: no distance, rounded as in clustering, exceeds it."""
    return float(np.sqrt(((scores.max(axis=0) - scores.min(axis=0)) ** 2).sum()))
