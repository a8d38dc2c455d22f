"""Who gets what of a budget: the dynamic programme against every combination, and how neurons are dealt out."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import robustdice as rd
from nets import Residual, random_images, shared_network
from robustdice.errors import PlanError
from robustdice.failure.sensitivity import Sensitivity, measure
from robustdice.partitioning.allocation import Kept, Spread, allocate, deal, held_bytes, parts_of, shards_of
from robustdice.plan import Plan, failure_sets
from robustdice.representation import neuron_bytes
from robustdice.rounding.layer import Choice
from robustdice.rounding.network import round_network


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.integers(0, 200),
)
@settings(max_examples=60, deadline=None)
def test_the_cheapest_choices_that_fit_are_found(choices: list[list[tuple[int, int]]], budget: int) -> None:
    costs = [np.array([cost for cost, _ in layer], np.float64) for layer in choices]
    sizes = [np.array([size for _, size in layer], np.int64) for layer in choices]
    combinations = list(itertools.product(*choices))
    fitting = [sum(cost for cost, _ in each) for each in combinations if sum(size for _, size in each) <= budget]
    if not fitting:
        with pytest.raises(PlanError, match="smallest choices need"):
            allocate(costs, sizes, budget)
        return
    found = allocate(costs, sizes, budget)
    assert sum(int(size[choice]) for size, choice in zip(sizes, found, strict=True)) <= budget
    assert sum(float(cost[choice]) for cost, choice in zip(costs, found, strict=True)) == min(fitting)


@given(st.integers(2, 5), st.data(), st.sampled_from([0.0, 0.25, 0.5]), st.integers(0, 7), st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_what_matters_most_is_everywhere_and_the_rest_is_lost_evenly(
    devices: int, data: st.DataObject, decisive: float, first: int, units: int
) -> None:
    holders = data.draw(st.integers(1, devices))
    importance = np.random.default_rng(units).permutation(units).astype(float)
    dealt = deal(importance.tolist(), Spread(holders, decisive), devices, first)
    everywhere = {unit for unit in range(units) if len(dealt[unit]) == devices}
    if holders < devices:
        assert everywhere == {unit for unit in range(units) if importance[unit] >= units - round(decisive * units)}
        assert {len(dealt[unit]) for unit in set(range(units)) - everywhere} <= {holders}
    for size in range(1, devices):
        lost = [sum(mine <= failed for mine in dealt) for failed in failure_sets(devices, size)]
        possible = sum(
            1 for chosen in itertools.combinations(range(devices), holders) if set(chosen) <= set(range(size))
        )
        assert max(lost) - min(lost) <= possible


@pytest.mark.parametrize(("holders", "devices"), [(h, d) for d in range(2, 8) for h in range(1, d + 1)])
def test_sets_of_holders_come_up_in_the_order_that_keeps_devices_even(holders: int, devices: int) -> None:
    left = list(itertools.combinations(range(devices), holders))
    named = [0] * devices
    expected = []
    while left:
        best = min(left, key=lambda chosen: (sorted((named[d] for d in chosen), reverse=True), chosen))
        left.remove(best)
        for device in best:
            named[device] += 1
        expected.append(frozenset(best))
    assert deal([0.0] * len(expected), Spread(holders), devices) == expected


def test_half_of_sixteen_devices_have_more_sets_than_units_and_stay_even() -> None:
    dealt = deal([0.0] * 600, Spread(8), 16, first=3)
    held = Counter(device for holders in dealt for device in holders)
    assert len(set(dealt)) == 600
    assert max(held.values()) - min(held.values()) <= 2


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.data(), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_devices_hold_in_proportion_to_their_room_and_nobody_more_than_all(
    rooms: list[int], data: st.DataObject, first: int
) -> None:
    holders = data.draw(st.integers(1, len(rooms)))
    parts = parts_of(rooms, holders)
    assert sum(parts) == pytest.approx(holders)
    assert max(parts) <= 1
    shares = [part / room for part, room in zip(parts, rooms, strict=True) if part < 1]
    assert shares == pytest.approx([shares[0]] * len(shares)) if shares else holders == len(rooms)
    dealt = deal(list(range(240)), Spread(holders), len(rooms), first, rooms)
    assert {len(of_unit) for of_unit in dealt} == {holders}
    for device, part in enumerate(parts):
        assert sum(device in of_unit for of_unit in dealt) == pytest.approx(240 * part, abs=0.02 * 240 + 3)


def test_uneven_devices_share_neurons_in_all_ways() -> None:
    dealt = deal([0.0] * 200, Spread(2), 4, 0, [1, 1, 2, 2])
    assert set(dealt) == {frozenset(pair) for pair in itertools.combinations(range(4), 2)}
    assert Counter(dealt)[frozenset({2, 3})] > 2 * Counter(dealt)[frozenset({0, 1})]


def test_devices_hold_as_much_as_was_counted_on() -> None:
    network = shared_network(Residual, 3, 8, 8)
    for layer in network.plan_layers:
        units = tuple(float(unit % 5) for unit in range(layer.neurons // layer.group))
        spreads = [Spread(holders, share) for holders in (1, 2, 3, 4) for share in (0.0, 0.5)]
        kinds = [("float32", None), ("int8", "int2")]
        for spread, kind, rooms in itertools.product(spreads, kinds, (None, (1.0, 1.0, 2.0, 2.0))):
            kept = Kept(spread, *kind)
            held: Counter[int] = Counter()
            for shard in shards_of(layer, units, kept, 4, 1, rooms):
                for holder in shard.holders:
                    held[holder.device] += len(shard.neurons) * neuron_bytes(layer, holder.representation)
            counted = held_bytes(layer, units, kept, 4, 1, 0, rooms)
            assert [held[device] for device in range(4)] == counted.tolist()


def test_shards_make_a_plan_whatever_the_groups() -> None:
    network = shared_network(Residual, 3, 8, 8)
    shards = tuple(
        shards_of(layer, [1.0] * (layer.neurons // layer.group), Kept(Spread(2, 0.25), "float32"), 4, i)
        for i, layer in enumerate(network.plan_layers)
    )
    plan = Plan(4, network.plan_layers, shards, network.shared_weights, "auto", network.reference)
    assert all(mask.all() for failed in failure_sets(4, 1) for mask in plan.surviving_neurons(failed))


@pytest.mark.slow
def test_fewer_bits_and_more_failures_cost_more_and_what_is_everywhere_costs_nothing() -> None:
    network = rd.load_model("robustdice.demo.network:digits_cnn")
    images = rd.load_data("digits", network.preprocessing, network.outputs, split="train").sample(48).images()
    layers = range(1, 3)
    coarse = round_network(network, {i: [Choice("int8"), Choice("int2")] for i in layers}, images)
    importance = {i: np.arange(layer.neurons, dtype=float) for i, layer in enumerate(network.plan_layers)}
    spreads = [Spread(4), Spread(2), Spread(2, 0.5)]
    table = measure(network, coarse, importance, spreads, 4, 3, images)
    for layer in layers:
        assert 0 <= table.coarse[layer, "int8"] < table.coarse[layer, "int2"]
        two, three = (table.lost[layer, Spread(2), size] for size in (2, 3))
        assert table.lost[layer, Spread(2), 1] == 0 < two < three
        assert table.lost[layer, Spread(4), 3] == 0
        assert table.lost[layer, Spread(2, 0.5), 3] < three
        kept = Kept(Spread(2), "int2")
        expected = 6 * table.coarse[layer, "int2"] + 2 * two + three
        assert table.cost(layer, kept, (1, 2, 2, 1)) == pytest.approx(expected)


def test_a_layer_costs_as_much_as_is_from_coarse_spares_and_as_is_lost() -> None:
    whole, half = Spread(4), Spread(2)
    coarse = {(0, "int8"): 1.0, (0, "int2"): 9.0}
    table = Sensitivity(coarse, {(0, half, 1): 0.0, (0, half, 2): 20.0, (0, half, 3): 50.0}, 4)
    assert table.cost(0, Kept(whole, "int8"), (1, 1, 1, 1)) == 4
    assert table.cost(0, Kept(whole, "int8", "int2"), (1, 0, 0, 0)) == 1
    assert table.cost(0, Kept(whole, "int8", "int2"), (0, 0, 0, 1)) == 0.25 * 1 + 0.75 * 9
    assert table.cost(0, Kept(whole, "float32", "int2"), (0, 1, 0, 0)) == 0.25 * 9
    # Of six pairs of holders one is lost with two down, and in two of the others the primary is down.
    assert table.cost(0, Kept(half, "int8", "int2"), (0, 0, 1, 0)) == pytest.approx(20 + 1 * 2 / 3 + 9 * 1 / 3)


def test_as_much_lost_costs_as_much_whichever_holders_it_had() -> None:
    network = shared_network(Residual, 3, 8, 8)
    importance = {i: np.arange(float(of.neurons // of.group)) for i, of in enumerate(network.plan_layers)}
    table = measure(network, {}, importance, [Spread(2), Spread(1)], 4, 3, random_images(4, (3, 8, 8)))
    for layer in range(len(network.layers)):
        assert table.lost[layer, Spread(2), 3] == table.lost[layer, Spread(1), 2]  # half of it


def test_images_need_no_labels_and_may_be_few() -> None:
    network = shared_network(Residual, 3, 8, 8)
    importance = {i: np.ones(layer.neurons // layer.group) for i, layer in enumerate(network.plan_layers)}
    table = measure(network, {}, importance, [Spread(1)], 2, 1, random_images(2, (3, 8, 8)))
    assert all(np.isfinite(cost) for cost in table.lost.values())
