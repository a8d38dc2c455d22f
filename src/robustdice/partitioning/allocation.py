"""How much of a budget each layer gets: on how many devices its neurons are, and in which representation (NumPy only).

What a choice costs is measured with only that layer changed (:mod:`robustdice.failure.sensitivity`); that costs of
several layers add up is an assumption, which makes the best choice under a budget exact and a matter of milliseconds
(SPDY, arXiv 2201.13096).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import PlanError
from robustdice.partitioning.apart import apart
from robustdice.partitioning.distribute import order_holders, to_shards
from robustdice.partitioning.replicate import whole
from robustdice.plan import Holder, Layer, Shard
from robustdice.representation import neuron_bytes

BUCKETS = 10_000
"""Parts that a budget is divided into; what a choice takes is rounded up to whole ones."""
SETTLING = 100
"""Rounds in which the weights of devices come to rest that make each come up as often as it should."""


@dataclass(frozen=True)
class Spread:
    """On how many devices a layer's neurons are: its most important ones, the share ``decisive`` of them, on all, every
    other one on ``holders``."""

    holders: int
    decisive: float = 0.0


@dataclass(frozen=True)
class Kept:
    """How one layer is kept: where, and in which representation its primaries are, and its spares if these are not
    alike."""

    spread: Spread
    representation: str
    spare: str | None = None

    @property
    def kinds(self) -> tuple[str, str]:
        """The representations of primaries and of spares."""
        return self.representation, self.spare or self.representation

    def held_by_all(self, devices: int) -> bool:
        """Whether all of the ``devices`` hold the same copy, so that nothing is handed over."""
        return self.spread.holders == devices and len(set(self.kinds)) == 1


def deal(
    units: Sequence[float], spread: Spread, devices: int, first: int = 0, rooms: Sequence[float] | None = None
) -> list[frozenset[int]]:
    """The holders of every unit, where ``units`` says how important each is.

    From the more to the less important one, those that are not on all devices go in turn to all sets of
    ``spread.holders`` devices: whoever fails, survivors keep the same share of important and of unimportant ones.
    ``first`` is the set to begin with. Where the devices do not have the same room (``rooms``, in any unit), sets come
    up as often as makes each device hold as large a part as it has of the room.
    """
    order = sorted(range(len(units)), key=lambda unit: (-units[unit], unit))
    everywhere = round(spread.decisive * len(units))
    found = [frozenset(range(devices))] * len(units)
    rest = order[everywhere:]
    if rooms is None or len(set(rooms)) == 1:
        every = _in_even_order(spread.holders, devices)
        turns = [every[position % len(every)] for position in range(first, first + len(rest))]
    else:
        turns = _in_proportion(parts_of(rooms, spread.holders), spread.holders, len(rest))
    for unit, holders in zip(rest, turns, strict=True):
        found[unit] = holders
    return found


def parts_of(rooms: Sequence[float], holders: int) -> list[float]:
    """Which part of the units each device holds when each unit is on ``holders`` of them: in proportion to ``rooms``,
    but no more than all."""
    parts = [0.0] * len(rooms)
    open_to, left = set(range(len(rooms))), float(holders)
    while open_to:
        total = sum(rooms[device] for device in open_to)
        even = total <= 0  # nobody has room: then nobody is spared
        for device in open_to:
            parts[device] = left / len(open_to) if even else left * rooms[device] / total
        full = {device for device in open_to if parts[device] >= 1}
        if not full:
            break
        for device in full:
            parts[device] = 1.0
        open_to, left = open_to - full, left - len(full)
    return parts


def _in_proportion(parts: Sequence[float], holders: int, count: int) -> list[frozenset[int]]:
    """``count`` sets of ``holders`` devices, of which each device is in its part, and otherwise as different as can
    be: how often each set should have come up is made of weights of its devices, and what lags behind most is next."""
    sets = list(combinations(range(len(parts)), holders))
    inside = np.zeros((len(sets), len(parts)))
    for number, chosen in enumerate(sets):
        inside[number, list(chosen)] = 1
    weights = np.maximum(np.asarray(parts, np.float64), 1e-9)
    often = np.empty(0)
    for _ in range(SETTLING):
        often = np.exp(inside @ np.log(weights))
        often /= often.sum()
        weights = weights * np.maximum(parts, 1e-9) / np.maximum(often @ inside, 1e-12)
        weights /= weights.max()
        weights = np.maximum(weights, 1e-12)
    came = np.zeros(len(sets))
    found = []
    for position in range(1, count + 1):
        best = int((often * position - came).argmax())
        came[best] += 1
        found.append(frozenset(sets[best]))
    return found


@cache
def _in_even_order(holders: int, devices: int) -> tuple[frozenset[int], ...]:
    """All sets of ``holders`` devices, so ordered that after each as many as possible were named equally often: next
    is the first one whose members were named least often, by the one that was most often, then the second, ..."""
    sets = list(combinations(range(devices), holders))
    inside = np.zeros((len(sets), devices))
    np.put_along_axis(inside, np.array(sets), 1, axis=1)
    named, taken = np.zeros(devices), np.zeros(len(sets))
    found = []
    for _ in sets:
        # Of powers of a base that is more than there are of each, sums compare like that, and are exact.
        best = int((inside @ (holders + 1.0) ** (named - named.min()) + taken).argmin())
        named += inside[best]
        taken[best] = np.inf
        found.append(frozenset(sets[best]))
    return tuple(found)


def shards_of(
    layer: Layer,
    units: Sequence[float],
    kept: Kept,
    devices: int,
    index: int,
    rooms: Sequence[float] | None = None,
    likeness: NDArray[np.floating] | None = None,
) -> tuple[Shard, ...]:
    """The shards of layer number ``index``; ``units`` says how important each of its units is, ``rooms`` how much room
    the devices have, as in :func:`deal`; ``likeness``, where it is given, how alike any two units are, as in
    :func:`robustdice.partitioning.apart.apart`."""
    if kept.held_by_all(devices):
        shards: tuple[Shard, ...] = whole(layer, devices)
    else:
        holders = order_holders(deal(units, kept.spread, devices, index, rooms), devices, index)
        if likeness is not None:
            holders = apart(holders, units, likeness, devices)
        shards = to_shards(holders, layer.group)
    primary, spare = kept.kinds
    return tuple(
        Shard(shard.neurons, tuple(Holder(device, spare if at else primary) for at, device in enumerate(shard.devices)))
        for shard in shards
    )


def held_bytes(
    layer: Layer,
    units: tuple[float, ...],
    kept: Kept,
    devices: int,
    index: int,
    per_neuron: int = 0,
    rooms: tuple[float, ...] | None = None,
) -> NDArray[np.int64]:
    """Bytes that each device holds of what :func:`shards_of` deals out, ``per_neuron`` bytes more for each neuron."""
    primary, spare = (neuron_bytes(layer, kind) + per_neuron for kind in kept.kinds)
    held = _units_held(units, kept.spread, devices, index, rooms)
    if primary == spare:
        return held * layer.group * spare
    first = _units_first(units, kept.spread, devices, index, rooms)
    return (first * primary + (held - first) * spare) * layer.group


@lru_cache(maxsize=4096)
def _units_held(
    units: tuple[float, ...], spread: Spread, devices: int, index: int, rooms: tuple[float, ...] | None
) -> NDArray[np.int64]:
    """How many units each device holds."""
    dealt = deal(units, spread, devices, index, rooms)
    return np.array([sum(device in holders for holders in dealt) for device in range(devices)], dtype=np.int64)


@lru_cache(maxsize=4096)
def _units_first(
    units: tuple[float, ...], spread: Spread, devices: int, index: int, rooms: tuple[float, ...] | None
) -> NDArray[np.int64]:
    """Of how many units each device is the primary."""
    orders = order_holders(deal(units, spread, devices, index, rooms), devices, index)
    return np.bincount([order[0] for order in orders], minlength=devices)


def allocate(costs: Sequence[NDArray[np.float64]], sizes: Sequence[NDArray[np.int64]], budget: int) -> list[int]:
    """The choice of every layer for which ``costs`` add up to the least while ``sizes`` (bytes) keep to ``budget``.

    ``costs[i][j]`` and ``sizes[i][j]`` are of layer i's choice j. Exact but for the rounding of sizes to a
    ``BUCKETS``-th of the budget. PlanError, naming what is needed, where even the smallest choices do not fit.
    """
    least = int(sum(of_layer.min() for of_layer in sizes))
    if least > budget:
        raise PlanError(f"the smallest choices need {least:,} bytes per device, {budget:,} are allowed")
    # Sizes are counted from each layer's smallest, so that rounding them up never costs the last fitting choice.
    unit = max(1.0, (budget - least) / BUCKETS)
    room = int((budget - least) // unit)
    best = np.zeros(room + 1)
    chosen = np.zeros((len(costs), room + 1), dtype=np.int64)
    steps = [np.ceil((of_layer - of_layer.min()) / unit).astype(np.int64) for of_layer in sizes]
    for layer, (cost, step) in enumerate(zip(costs, steps, strict=True)):
        options = np.full((len(cost), room + 1), np.inf)
        for choice, taken in enumerate(step):
            if taken <= room:
                options[choice, taken:] = best[: room + 1 - taken] + cost[choice]
        chosen[layer] = options.argmin(0)
        best = options.min(0)
    found, left = [0] * len(costs), room
    for layer in reversed(range(len(costs))):
        found[layer] = int(chosen[layer, left])
        left -= int(steps[layer][found[layer]])
    return found
