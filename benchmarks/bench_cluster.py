"""Clustering: the shipped algorithm beside a literal transcription of the paper's, and 4,096 neurons alone.

    python benchmarks/bench_cluster.py

Both run in turn on the same input, several times; shown are the median and the range. The ratio is between
medians. Scores are drawn from a log-normal distribution, normalised, as skewed as real ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from robustdice.importance.values import normalise
from robustdice.partitioning.cluster import cluster

ROUNDS = 5
THRESHOLDS = (0.0, 0.001, 0.01, 0.1, 0.5, float("inf"))


def literal(scores: NDArray[np.float64], threshold: float) -> list[list[int]]:
    """Algorithm 1, lines 10-20, line by line; all distances are computed beforehand, which favours it."""
    distances = np.sqrt(((scores[:, None] - scores[None]) ** 2).sum(axis=2))
    groups: list[list[int] | None] = [[unit] for unit in range(len(scores))]
    for i in range(len(groups)):
        for j in range(len(groups)):
            group, other = groups[i], groups[j]
            if i != j and group is not None and other is not None and distances[np.ix_(group, other)].max() < threshold:
                groups[i] = group + other
                groups[j] = None
    return [group for group in groups if group is not None]


def seconds(algorithm: Callable[..., object], scores: NDArray[np.float64], threshold: float) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    algorithm(scores, threshold)
    return time.perf_counter() - start


def shown(times: list[float]) -> str:
    """Median and range in milliseconds."""
    return f"{statistics.median(times) * 1e3:8.1f} ms ({min(times) * 1e3:.1f}-{max(times) * 1e3:.1f})"


def main() -> None:
    """Print one line per threshold."""
    rng = np.random.default_rng(0)
    small, large = (normalise(rng.lognormal(size=(units, 3))) for units in (300, 4096))
    for threshold in THRESHOLDS:
        if cluster(small, threshold) != literal(small, threshold):
            raise SystemExit(f"the two differ at threshold {threshold}")
        fast, slow, alone = [], [], []
        for _ in range(ROUNDS):
            fast.append(seconds(cluster, small, threshold))
            slow.append(seconds(literal, small, threshold))
            alone.append(seconds(cluster, large, threshold))
        ratio = statistics.median(slow) / statistics.median(fast)
        groups = len(cluster(large, threshold))
        print(
            f"t = {threshold:<6} 300 neurons: {shown(fast)}, literal {shown(slow)}, {ratio:6.1f} times faster; "
            f"4096 neurons: {shown(alone)}, {groups} groups"
        )


if __name__ == "__main__":
    main()
