"""Of units that are as important as each other, which goes to which holders (NumPy only).

What two like units hand over, later layers can have from either: they are not to be lost together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Holders = TypeVar("Holders", bound=Collection[int])

NEIGHBOURS = 12
"""In the order of importance: so many units at most exchange what they have."""
SWEEPS = 5
"""Over all units at most; later ones hardly find anything."""
WORTH_IT = 1e-9
"""What an exchange has to gain, so that rounding errors make none."""


def apart(
    holders: Sequence[Holders], units: Sequence[float], likeness: NDArray[np.floating], devices: int
) -> list[Holders]:
    """The ``holders`` of every unit, exchanged among units of almost the same importance, so that like ones are seldom
    lost together: who holds how many, and how important ones, stays as it is.

    ``units`` says how important each is. From the more to the less important one, as many exchange among each other as
    there are different sets of holders, or ``NEIGHBOURS``. ``likeness`` [units, units] is symmetric, from 0 to 1. What
    becomes least, as far as single exchanges lead, is the sum over all pairs of their likeness times how often both are
    lost: over all failure sets but that of all devices, every size counted the same.
    """
    order = sorted(range(len(units)), key=lambda unit: (-units[unit], unit))
    order = [unit for unit in order if len(holders[unit]) < devices]
    if not order:
        return list(holders)
    sets = {of_unit: number for number, of_unit in enumerate(dict.fromkeys(map(frozenset, holders)))}
    lost = _lost_together([*sets], devices)
    at = np.array([sets[frozenset(of_unit)] for of_unit in holders])
    size = min(NEIGHBOURS, sum(len(of_unit) < devices for of_unit in sets))
    blocks = [np.array(order[start : start + size]) for start in range(0, len(order), size)]
    like = likeness.astype(np.float64)
    like = (like + like.T) / 2  # a product of float32 is not quite symmetric
    np.fill_diagonal(like, 0.0)
    found = list(holders)
    costs = like @ lost[at]
    """What it costs that a unit has a set, [units, sets], the others having what they have."""
    for _ in range(SWEEPS):
        settled = True
        for block in blocks:
            while (pair := _best_exchange(block, at, like, lost, costs)) is not None:
                one, other = pair
                costs += np.outer(like[:, one] - like[:, other], lost[at[other]] - lost[at[one]])
                at[[one, other]] = at[[other, one]]
                found[one], found[other] = found[other], found[one]
                settled = False
        if settled:
            break
    return found


def _best_exchange(
    block: NDArray[np.int64],
    at: NDArray[np.int64],
    like: NDArray[np.float64],
    lost: NDArray[np.float64],
    costs: NDArray[np.float64],
) -> tuple[int, int] | None:
    """The two units of a block whose exchange gains most; None when none gains anything."""
    sets, among = at[block], costs[np.ix_(block, at[block])]
    own = np.diag(among)
    apart_now = lost[sets, sets][:, None] + lost[sets, sets] - 2 * lost[np.ix_(sets, sets)]
    change = among + among.T - own[:, None] - own - like[np.ix_(block, block)] * apart_now
    one, other = np.unravel_index(change.argmin(), change.shape)
    return (int(block[one]), int(block[other])) if change[one, other] < -WORTH_IT else None


def _lost_together(sets: Sequence[frozenset[int]], devices: int) -> NDArray[np.float64]:
    """For any two of the sets of holders: in which share of the failure sets of a size all of both are down, summed
    over the sizes."""
    sizes = range(1, devices)
    often = [
        sum(math.comb(devices - held, size - held) / math.comb(devices, size) for size in sizes if size >= held)
        for held in range(devices + 1)
    ]
    inside = np.array([[device in of_set for device in range(devices)] for of_set in sets], np.int64)
    of_either = inside.sum(1)[:, None] + inside.sum(1) - inside @ inside.T
    found: NDArray[np.float64] = np.array(often)[of_either]
    return found
