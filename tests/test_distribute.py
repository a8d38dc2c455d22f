"""Dealing out groups, and the order of a unit's holders."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdice.partitioning.cluster import cluster
from robustdice.partitioning.distribute import distribute, entries_per_device, order_holders, to_shards
from robustdice.plan import failure_sets


def deal_literally(groups: list[list[int]], devices: int) -> list[list[int]]:
    """The devices of every unit's copies, in the order in which they are dealt, numbered from 1 as in the paper."""
    dealt: list[list[int]] = [[] for group in groups for _ in group]
    for group in groups:
        padded = list(group)
        j = 1
        while len(padded) % devices != 0:
            padded.append(group[(j - 1) % len(group)])
            j += 1
        for j, unit in enumerate(padded, start=1):
            dealt[unit].append((j % devices) + 1)
    return dealt


@st.composite
def grouped(draw: st.DrawFn) -> list[list[int]]:
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    units = draw(st.permutations(range(sum(sizes))))
    ends = np.cumsum(sizes)
    return [sorted(units[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(grouped(), st.integers(2, 16))
def test_equals_the_listing_and_copies_are_on_different_devices(groups: list[list[int]], devices: int) -> None:
    dealt = deal_literally(groups, devices)
    assert all(len(set(copies)) == len(copies) for copies in dealt)
    assert distribute(groups, devices) == [frozenset(device - 1 for device in copies) for copies in dealt]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(grouped(), st.integers(2, 16))
def test_every_device_gets_equally_many(groups: list[list[int]], devices: int) -> None:
    held = Counter(chain.from_iterable(distribute(groups, devices)))
    expected = sum(entries_per_device(len(group), devices) for group in groups)
    assert held == dict.fromkeys(range(devices), expected)


def test_two_devices_by_hand() -> None:
    # Round robin runs for every group, as in Figure 1(c), not only for padded ones. {0, 1, 2} is padded to
    # 0 1 2 0 and dealt to the devices 2 1 2 1 (from 1), {3} becomes 3 3, and {4, 5} needs no padding.
    holders = distribute([[0, 1, 2], [3], [4, 5]], 2)
    assert holders == [{0, 1}, {0}, {1}, {0, 1}, {1}, {0}]


def test_three_devices_by_hand() -> None:
    # Entries go to the devices 2 3 1 2 3 1 (from 1). {0, 2, 4, 6} becomes 0 2 4 6 0 2; {1, 3} becomes 1 3 1;
    # {5} goes everywhere; {7, 8, 9} once round.
    holders = distribute([[0, 2, 4, 6], [1, 3], [5], [7, 8, 9]], 3)
    assert holders == [{1, 2}, {1, 0}, {2, 0}, {2}, {0}, {0, 1, 2}, {1}, {1}, {2}, {0}]


def test_extremes() -> None:
    scores = np.random.default_rng(0).random((21, 3))
    assert distribute(cluster(scores, 0.0), 4) == [frozenset(range(4))] * 21
    assert sum(map(len, distribute(cluster(scores, math.inf), 4))) == 24  # three replicas fill the last round


holder_sets = st.integers(2, 6).flatmap(
    lambda devices: st.tuples(
        st.just(devices),
        st.lists(st.frozensets(st.integers(0, devices - 1), min_size=1), min_size=1, max_size=60),
    )
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(holder_sets, st.integers(0, 20))
def test_orders_are_orders_of_the_holders(case: tuple[int, list[frozenset[int]]], first: int) -> None:
    devices, holders = case
    orders = order_holders(holders, devices, first)
    assert orders == order_holders(holders, devices, first)
    assert [frozenset(order) for order in orders] == holders
    assert [len(order) for order in orders] == [len(of_unit) for of_unit in holders]


def work(orders: list[tuple[int, ...]], failed: frozenset[int]) -> Counter[int]:
    """The units that each survivor computes."""
    return Counter(next(d for d in order if d not in failed) for order in orders if not failed.issuperset(order))


@pytest.mark.parametrize(("devices", "multiple"), [(2, 1), (2, 7), (3, 1), (3, 5), (4, 1), (4, 3), (5, 1), (6, 1)])
def test_everything_replicated_is_exactly_even_in_every_failure_set(devices: int, multiple: int) -> None:
    units = math.factorial(devices) * multiple
    orders = order_holders([frozenset(range(devices))] * units, devices)
    for failed in chain.from_iterable(failure_sets(devices, size) for size in range(devices)):
        survivors = set(range(devices)) - failed
        assert work(orders, failed) == dict.fromkeys(survivors, units // len(survivors))


def least_possible_maximum(holders: list[frozenset[int]], devices: int) -> int:
    """Hall's condition: any set of devices must compute the units that only they have."""
    subsets = chain.from_iterable(combinations(range(devices), size) for size in range(1, devices + 1))
    return max(-(-sum(of_unit <= set(subset) for of_unit in holders) // len(subset)) for subset in subsets)


@pytest.mark.parametrize("devices", [2, 3, 4, 5, 8])
def test_work_of_clustered_layers_is_nearly_as_even_as_possible(devices: int) -> None:
    rng = np.random.default_rng(devices)
    for _ in range(12):
        scores = rng.random((int(rng.integers(1, 200)), 3)) ** rng.integers(1, 4)
        holders = distribute(cluster(scores, float(rng.random() * 1.2)), devices)
        orders = order_holders(holders, devices)
        healthy = work(orders, frozenset())
        assert max(healthy.values()) <= least_possible_maximum(holders, devices) + 1
        for failed in failure_sets(devices, 1):
            if left := [of_unit - failed for of_unit in holders if not of_unit <= failed]:
                assert max(work(orders, failed).values()) <= 1.25 * least_possible_maximum(left, devices) + 2


def test_a_surplus_starts_at_the_device_asked_for() -> None:
    everything = [frozenset(range(4))] * 5
    for first in range(4):
        primaries = Counter(order[0] for order in order_holders(everything, 4, first))
        assert primaries == {device: 1 + (device == first) for device in range(4)}


def test_sixteen_devices() -> None:
    orders = order_holders([frozenset(range(16))] * 256, 16)
    assert set(Counter(order[0] for order in orders).values()) == {16}
    for device in range(16):
        assert max(work(orders, frozenset({device})).values()) <= 18


def test_shards_gather_units_with_the_same_order() -> None:
    shards = to_shards([(1, 0), (0,), (1, 0), (0, 1)], group=2)
    assert [(shard.neurons, shard.devices) for shard in shards] == [
        ((0, 1, 4, 5), (1, 0)),
        ((2, 3), (0,)),
        ((6, 7), (0, 1)),
    ]
    assert {holder.representation for shard in shards for holder in shard.holders} == {"float32"}
