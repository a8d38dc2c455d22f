"""Clustering returns what the paper's listing, taken literally, returns: the same groups in the same order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from robustdice.partitioning.cluster import cluster


def cluster_literally(scores: NDArray[np.float64], threshold: float) -> list[list[int]]:
    """Algorithm 1, lines 10-20: every surviving group in order takes in every other one that is near enough."""
    groups: list[list[int] | None] = [[unit] for unit in range(len(scores))]
    for i in range(len(groups)):
        for j in range(len(groups)):
            group, other = groups[i], groups[j]
            if i == j or group is None or other is None:
                continue
            largest = max(np.sqrt(((scores[a] - scores[b]) ** 2).sum()) for a in group for b in other)
            if largest < threshold:
                groups[i] = group + other
                groups[j] = None
    return [group for group in groups if group is not None]


@st.composite
def points(draw: st.DrawFn) -> NDArray[np.float64]:
    """Small integer grids: many ties and duplicates."""
    units, columns = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    size = draw(st.integers(0, 5))
    cells = st.lists(st.integers(0, size), min_size=columns, max_size=columns)
    return np.array(draw(st.lists(cells, min_size=units, max_size=units)), dtype=np.float64)


# The distances that occur on the grids, so that "below" meets equality, and others.
THRESHOLDS = st.one_of(
    st.integers(0, 9).map(float), st.integers(0, 75).map(math.sqrt), st.floats(0, 10), st.just(math.inf)
)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(points(), THRESHOLDS)
def test_equals_the_listing_on_grids(scores: NDArray[np.float64], threshold: float) -> None:
    assert cluster(scores, threshold) == cluster_literally(scores, threshold)


def test_equals_the_listing_on_many_random_inputs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(600):
        units, columns = int(rng.integers(1, 30)), int(rng.integers(1, 4))
        scores = rng.random((units, columns)) ** rng.integers(1, 4)
        if rng.random() < 0.5:
            scores = scores.round(1)  # ties that are not exact in binary
        a, b = scores[rng.integers(units)], scores[rng.integers(units)]
        distance = float(np.sqrt(((a - b) ** 2).sum()))
        for threshold in (distance, np.nextafter(distance, math.inf), float(rng.random())):
            assert cluster(scores, threshold) == cluster_literally(scores, threshold)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(points(), THRESHOLDS)
def test_groups_are_a_partition_of_near_units(scores: NDArray[np.float64], threshold: float) -> None:
    groups = cluster(scores, threshold)
    assert sorted(unit for group in groups for unit in group) == list(range(len(scores)))
    assert all(group == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for group in groups:
        for a in group:
            assert all(a == b or np.sqrt(((scores[a] - scores[b]) ** 2).sum()) < threshold for b in group)


def test_extremes() -> None:
    scores = np.array([[0.0], [0.0], [5.0]])
    assert cluster(scores, 0.0) == [[0], [1], [2]]  # duplicates are at distance 0, which is not below 0
    assert cluster(scores, 1e-9) == [[0, 1], [2]]
    assert cluster(scores, math.inf) == [[0, 1, 2]]
    assert cluster(np.empty((0, 3)), 1.0) == []


def test_first_fit_is_not_nearest() -> None:
    # 0 takes 1 although 2 is nearer to it, and 2 is then too far from 1.
    scores = np.array([[0.0], [-0.9], [0.5], [0.6]])
    assert cluster(scores, 1.0) == [[0, 1], [2, 3]]


def test_leaves_its_input_alone() -> None:
    scores = np.random.default_rng(0).random((20, 3))
    scores.flags.writeable = False
    before = scores.copy()
    cluster(scores, 0.3)
    assert (scores == before).all()


@pytest.mark.parametrize("threshold", [0.0, 0.05, math.inf])
def test_a_large_layer_finishes(threshold: float) -> None:
    groups = cluster(np.random.default_rng(0).random((4096, 3)), threshold)
    assert sum(map(len, groups)) == 4096
