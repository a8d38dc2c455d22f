"""Groups of neurons of similar importance (paper, Algorithm 1, lines 10-20)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cluster(scores: NDArray[np.float64], threshold: float) -> list[list[int]]:
    """First-fit complete linkage: the groups, each with its units in the order in which they joined.

    ``scores`` is float64 [units, columns]; ``threshold`` a Euclidean distance. For each surviving group in
    order, every other surviving group in order is merged into it when the largest distance between their
    members is below ``threshold``. Nothing is below 0, and everything is below infinity.

    A group that has had its turn never changes again: whatever it refused was too far from one of its members,
    and still is. So at a group's turn all it can take are single units, and a unit that is too far from one
    member is out for good: the next to join is simply the first candidate that no member has turned away.
    One row of distances per unit, O(units) memory, O(units^2) time whatever the threshold.
    """
    points = np.ascontiguousarray(scores.T, dtype=np.float64)
    ungrouped = np.ones(points.shape[1], dtype=np.bool_)
    groups = []
    for first in range(ungrouped.size):
        if not ungrouped[first]:
            continue
        group = []
        candidates = first + np.flatnonzero(ungrouped[first:])
        while candidates.size:
            newcomer, candidates = candidates[0], candidates[1:]
            group.append(int(newcomer))
            distances = _distances(points.take(candidates, axis=1), points[:, newcomer, None])
            candidates = candidates.compress(distances < threshold)
        ungrouped[group] = False
        groups.append(group)
    return groups


def _distances(points: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean distances, [n], of ``points`` [columns, n] to ``point`` [columns, 1]. Overwrites ``points``."""
    points -= point
    points *= points
    distances: NDArray[np.float64] = np.sqrt(points.sum(axis=0))
    return distances
