"""Dealing out groups of units, and choosing who comes first among the holders of each.

The first step is the paper's (Algorithm 1, lines 21-29). The paper has every holder compute every copy, so
it needs no order among them; with standby spares the order decides how work is spread, failures included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from robustdice.plan import Holder, Shard


def distribute(groups: Sequence[Sequence[int]], devices: int) -> list[frozenset[int]]:
    """The holders of every unit: ``groups`` is a partition of the units 0, 1, ..., the result is indexed by unit.

    Each group is padded to a multiple of ``devices`` with copies of its own units in order, again from the
    start where it is too short, and dealt out: the j-th entry, j = 1, 2, ..., goes to device (j mod ND) + 1 of
    the devices 1 to ND. All copies of a unit land on different devices: a group smaller than ND fills exactly
    one round, and in a larger one only units of the padding have a second copy, dealt as many entries after
    the first as the group has units, which ND does not divide where there is padding.
    """
    holders: list[set[int]] = [set() for _ in range(sum(map(len, groups)))]
    for group in groups:
        padded = islice(cycle(group), entries_per_device(len(group), devices) * devices)
        for j, unit in enumerate(padded, start=1):
            holders[unit].add(j % devices)
    return [frozenset(devices_of_unit) for devices_of_unit in holders]


def entries_per_device(units: int, devices: int) -> int:
    """How many units of a group of ``units`` each device gets: the same number for all."""
    return -(-units // devices)


def order_holders(holders: Sequence[frozenset[int]], devices: int, first: int = 0) -> list[tuple[int, ...]]:
    """The holders of every unit in order of preference, so that work is even whoever is down.

    Greedy and deterministic: first the primary of every unit is chosen, then every second holder, and so
    on, units with little choice first. The choice is the device that would have the least to compute if
    exactly the holders before it were down; ties go to the device chosen least often in this round, then to the next
    one from device ``first`` on. When every device holds every unit and ND! divides the number of units, the
    survivors' work is exactly even in every failure set.
    """
    orders: list[list[int]] = [[] for _ in holders]
    turns = sorted(range(len(holders)), key=lambda unit: len(holders[unit]))
    # work[failed, device]: units that device computes while the devices in the bit mask failed are down.
    work = np.zeros((1 << devices, devices), dtype=np.int32)
    for _ in range(max(map(len, holders), default=0)):
        loads: dict[int, list[int]] = {}
        chosen = [0] * devices
        for unit in turns:
            candidates = holders[unit].difference(orders[unit])
            if not candidates:
                continue
            failed = _mask(orders[unit])
            load = loads.setdefault(failed, work[failed].tolist())
            best = min((load[d], chosen[d], (d - first) % devices, d) for d in candidates)[-1]
            load[best] += 1
            chosen[best] += 1
            orders[unit].append(best)
        gained = np.zeros_like(work)
        for failed, load in loads.items():
            gained[failed] = load - work[failed]
        work += _sum_over_subsets(gained)
    return [tuple(order) for order in orders]


def _mask(failed: Sequence[int]) -> int:
    return sum(1 << device for device in failed)


def _sum_over_subsets(table: NDArray[np.int32]) -> NDArray[np.int32]:
    """For every bit mask m: the sum of ``table[s]`` over all subsets s of m. Overwrites ``table``."""
    masks, width = table.shape
    for bit in range(masks.bit_length() - 1):
        halves = table.reshape(-1, 2, 1 << bit, width)
        halves[:, 1] += halves[:, 0]
    return table


def to_shards(orders: Iterable[tuple[int, ...]], group: int) -> tuple[Shard, ...]:
    """Shards of one layer: the units with the same holders in the same order, sorted by their first neuron.

    Unit u stands for the neurons ``u * group`` to ``u * group + group - 1``.
    """
    units: dict[tuple[int, ...], list[int]] = {}
    for unit, order in enumerate(orders):
        units.setdefault(order, []).append(unit)
    return tuple(
        Shard(
            neurons=tuple(unit * group + offset for unit in members for offset in range(group)),
            holders=tuple(Holder(device) for device in order),
        )
        for order, members in units.items()
    )
