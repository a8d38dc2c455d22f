"""Layers that are dealt out together with the one that reads them: in plans, bundles and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from nets import Branches, ChannelsLast, Plain, Residual, shared_network
from robustdice.errors import PlanError
from robustdice.importance.values import Importance
from robustdice.model.network import Network
from robustdice.model.pairs import choose_owned, choose_pairs, possible_pairs
from robustdice.partitioning import METHODS, Request
from robustdice.plan import Holder, Layer, Plan, added_up, failure_sets
from robustdice.plan.pairs import slices as plan_slices
from robustdice.representation import CoarseFilter, CoarseLayer
from robustdice.workshop import partition
from test_plan import example, shard


class Inverted(nn.Module):
    """MobileNetV2's blocks, one of which adds its input to what it makes of it: [3, 8, 8] -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.expand = nn.Conv2d(4, 24, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(24)
        self.project = nn.Conv2d(24, 4, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = nn.functional.relu6(self.expand_norm(self.expand(x)))
        y = nn.functional.relu6(self.depthwise_norm(self.depthwise(y)))
        x = x + self.project_norm(self.project(y))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class Unlike(nn.Module):
    """What reads a layer, but not as the second of a pair would: along another axis, twice, in groups, or as an output
    that is read as well: [2, 6, 6] -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Conv2d(2, 6, 1)
        self.across = nn.Linear(6, 6)
        self.twice = nn.Conv2d(6, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.flat = nn.Conv2d(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.across(self.rows(x))
        x = self.twice(x.relu())
        x = self.grouped((x - 1) * x)
        result: Tensor = (x.mean((2, 3)) + self.flat(x).flatten(1)).softmax(1)
        return result


class Equal(nn.Module):
    """Two equal layers, and one that reads what the second gives: [6, 4, 4] -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.second(self.first(x).relu()).relu().softmax(1).mean((2, 3)))
        return result


class Wide(nn.Module):
    """A layer that is wide beside those around it: [2, any, any] -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Conv2d(2, 64, 1), nn.Conv2d(64, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.narrow(self.wide(x).relu()).relu().mean((2, 3)))
        return result


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 8, 8)),
    "plain": (Plain, (1, 8, 8)),
    "branches": (Branches, (2, 6, 6)),
    "channels_last": (ChannelsLast, (3, 8, 8)),
    "inverted": (Inverted, (3, 8, 8)),
    "unlike": (Unlike, (2, 6, 6)),
}


def network(name: str) -> Network:
    make, shape = NETS[name]
    return shared_network(make, *shape)


def named(network: Network, pairs: Mapping[int, int]) -> list[tuple[str, str]]:
    return [(network.layers[first].layer.name, network.layers[second].layer.name) for first, second in pairs.items()]


# conv hands over 6 neurons of 16 activations, flattened; each of fc's 2 neurons has 97 weights, 96 of them a filter.
CONV = Layer("conv", neurons=6, group=1, neuron_weights=10, neuron_macs=100, neuron_outputs=16, filter_weights=9)
FC = Layer("fc", 2, 1, 97, 98, 1, tail_macs=2, filter_weights=96, affine_weights=1)


def paired(**changes: Any) -> Plan:
    """Three devices; ``conv`` and ``fc`` are a pair."""
    first = (shard([0, 3], 0, 1), shard([1, 4], 1), shard([2], 2, 0, 1), shard([5], 2))
    fields = {"layers": (CONV, FC), "shards": (first, (shard([0, 1], 0, 1, 2),)), "pairs": {0: 1}, "shared_weights": 8}
    return example(**{**fields, **changes})


def test_a_plan_counts_what_pairs_hold_compute_and_hand_over() -> None:
    plan = paired()
    assert [plan.split(layer) for layer in range(2)] == ["hidden", "hidden"]
    # A neuron of conv comes with 16 weights of each neuron of fc; two other weights and the shared ones are on all.
    assert plan.bytes_per_device == tuple(4 * (held * (10 + 32) + 2 + 8) for held in (3, 5, 2))
    assert plan.total_bytes == 4 * (60 + 2 * 97 + 8)
    # Each of three devices has sums of two neurons.
    assert [plan.exchanged(layer) for layer in range(2)] == [6, 0]
    assert (plan.exchanges, plan.exchanged_activations) == (1, 6)
    # A neuron of conv is 100 multiply-adds and a sixth of fc's 2 * 96; everybody has the 2 * 2 of fc's tail.
    assert plan.healthy_compute_share == pytest.approx((2 * (100 + 32) + 4) / (600 + 2 * 98))


def test_neurons_of_the_second_layer_cannot_be_lost() -> None:
    first, second = paired().surviving_neurons([1, 2])
    assert first.tolist() == [True, False, True, True, False, False]
    assert second.all()


def test_whatever_a_device_publishes_in_the_same_circumstances_is_one_sum() -> None:
    plan = paired()
    sums = added_up(plan.shards[0])
    assert [(each.devices[0], each.after, each.neurons) for each in sums] == [
        (0, (), (0, 3)),
        (1, (), (1, 4)),
        (2, (), (2, 5)),
        (1, (0,), (0, 3)),
        (0, (2,), (2,)),
        (1, (0, 2), (2,)),
    ]
    for size in range(3):
        for down in failure_sets(3, size):
            published = sorted(n for each in sums if each.publisher(down) is not None for n in each.neurons)
            assert published == plan.surviving_neurons(down)[0].nonzero()[0].tolist()


def test_pairs_are_part_of_what_a_plan_says(tmp_path: Path) -> None:
    plan = paired()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.digest != replace(plan, pairs={}).digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": {0: 2}}, "not of this plan"),
        ({"pairs": {0: 1, 1: 0}}, "a layer is in two of them"),
        ({"layers": (CONV, replace(FC, reads_group=True))}, "does not read all of conv's 6 neurons"),
        ({"layers": (CONV, replace(FC, filter_weights=95))}, "does not read all of conv's 6 neurons"),
        ({"shards": (paired().shards[0], (shard([0], 0), shard([1], 1)))}, "not one shard of all devices"),
        ({"shards": ((shard([*range(6)], 0, 1, 2),), paired().shards[1])}, "every device holds conv"),
    ],
)
def test_what_is_no_pair_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        paired(**changes)


def coarse_pair(kind: str, group: int = 96, of_second: str = "float32") -> Plan:
    """Of ``paired``, spares in a representation, and what everybody has of fc."""
    plan = paired()
    first = tuple(
        replace(
            each, holders=tuple(replace(h, representation=kind if n else "float32") for n, h in enumerate(each.holders))
        )
        for each in plan.shards[0]
    )
    second = (replace(plan.shards[1][0], holders=tuple(Holder(device, of_second) for device in range(3))),)

    def coarse(layer: Layer, group: int) -> CoarseLayer:
        codes, groups = np.ones((layer.neurons, layer.filter_weights), np.int8), -(-layer.filter_weights // group)
        scales = np.ones((layer.neurons, groups), np.float16)
        return CoarseLayer(CoarseFilter(kind, codes, scales, group), np.zeros(layer.neurons, np.float16))

    weights = {(0, kind): coarse(CONV, 9), (1, kind): coarse(FC, group)}
    return replace(plan, shards=(first, second), coarse=weights)


def test_a_plan_counts_what_coarse_copies_of_pairs_take() -> None:
    plan = coarse_pair("int3")
    # A spare of conv: 9 weights in 4 bytes, a scale and its other weight, and in 12 bytes the 32 that read it. Whoever
    # has any has a scale for each neuron of fc; all have what its two sums are shifted by, and the shared weights.
    spare, primary = 4 + 2 + 4 + 12, 4 * (10 + 32)
    everywhere = 4 * (2 + 8)
    assert plan.bytes_per_device == tuple(
        primary * own + spare * others + scales + everywhere
        for own, others, scales in ((2, 1, 4), (2, 3, 4), (2, 0, 0))
    )
    assert [plan.split(layer) for layer in range(2)] == ["hidden", "hidden"]
    assert coarse_pair("int3", of_second="int3").bytes_per_device == plan.bytes_per_device


def test_what_one_device_publishes_from_copies_of_two_representations_are_two_sums() -> None:
    first = (shard([0, 3], 0), replace(shard([1, 4], 0), holders=(Holder(0, "int8"),)), shard([2, 5], 1))
    assert [(each.holders[0].representation, each.neurons) for each in added_up(first)] == [
        ("float32", (0, 3)),
        ("int8", (1, 4)),
        ("float32", (2, 5)),
    ]


def test_coarse_copies_of_a_pair_need_weights_of_the_second_layer_with_one_scale_for_each_neuron() -> None:
    with pytest.raises(PlanError, match="no weights of fc in int8 with one scale for each neuron"):
        coarse_pair("int8", group=48)
    plan = coarse_pair("int8")
    with pytest.raises(PlanError, match="no weights of fc in int8"):
        replace(plan, coarse={key: kept for key, kept in plan.coarse.items() if key[0] == 0})


def test_a_pair_can_be_asked_for_with_precisions() -> None:
    plain = network("plain")
    for precision, spare in (("int8", "int3"), ("float32", "int4"), ("float16", "int2")):
        asked: dict[str, Any] = {"precision": precision, "spare_precision": spare, "threshold": 0.2}
        plan = partition(plain, scores_of(plain), devices=3, split="hidden", **asked)
        # conv is the first layer, so that the pair is kept in at least 8 bits; everybody has fc1's primary's shifts.
        kinds = {holder.representation for each in plan.shards[0] for holder in each.holders}
        assert kinds == {precision, "int8"}
        assert plan.is_coarse_pair(0)
        assert {holder.representation for holder in plan.shards[1][0].holders} == {precision}
        assert {kind for layer, kind in plan.coarse if layer == 1} == {precision, "int8"} - {"float32"}


def test_memory_is_kept_with_coarse_pairs() -> None:
    plain = network("plain")
    plan = partition(plain, scores_of(plain), devices=3, split="hidden", precision="int8", memory=0.2)
    assert plan.memory_share <= 0.2
    assert plan.memory_share > 0.2 - 0.05
    assert plan.pairs


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("residual", []),  # the residual add reads each value, too, or groups do
        ("plain", [("conv", "fc1"), ("fc1", "fc2")]),
        ("branches", []),
        ("channels_last", [("up", "down")]),
        ("inverted", [("expand", "project")]),
        ("unlike", []),
    ],
)
def test_a_layer_that_one_other_alone_reads_whole_can_be_one_of_a_pair(name: str, found: list[tuple[str, str]]) -> None:
    assert named(network(name), possible_pairs(network(name))) == found


def test_pairs_are_made_where_less_is_handed_over_than_by_gathering() -> None:
    plain, inverted = network("plain"), network("inverted")
    # Gathered: 96 activations of conv, 7 of fc1, 4 of fc2. Each device has 7 sums of fc1; where these are more in all
    # than conv's and fc1's activations, owners have 7, and hand on 7 activations.
    for devices, owners in ((2, 0), (14, 0), (15, 1)):
        pairs = choose_pairs(plain, devices)
        assert named(plain, pairs) == [("conv", "fc1")]
        assert len(choose_owned(plain, pairs, devices)) == owners
    # 24 activations and 4 for every 4 sums: as many for seven devices.
    assert [len(choose_owned(inverted, choose_pairs(inverted, n), n)) for n in (2, 7, 8)] == [0, 0, 1]
    plan = partition(inverted, devices=8, method="lop", split="hidden")
    gathered = partition(inverted, devices=8, method="lop")
    assert plan.exchanges == gathered.exchanges
    assert (gathered.exchanged(1), plan.exchanged(1), plan.exchanged(2)) == (24 * 16, 4 * 16, 4 * 16)
    assert gathered.exchanged_activations - plan.exchanged_activations == 20 * 16


def test_where_gathering_carries_as_much_in_as_many_exchanges_there_is_no_pair() -> None:
    """The chains of equal layers that many networks are: what is added up has as many activations as what is read."""
    equal = shared_network(Equal, 6, 4, 4)
    assert choose_pairs(equal, devices=2) == {0: 1}  # in an exchange less
    assert choose_pairs(equal, devices=4) == {}


def test_an_exchange_more_has_to_be_worth_it() -> None:
    """All sums to all carry less than gathering here, and owners still less."""
    for side, owners in ((8, 0), (32, 1)):
        wide = shared_network(Wide, 2, side, side)
        pairs = choose_pairs(wide, 4)
        assert pairs == {0: 1}
        assert len(choose_owned(wide, pairs, 4)) == owners


@pytest.mark.parametrize("devices", [3, 4])
def test_slices_are_owned_evenly_whoever_is_up(devices: int) -> None:
    slices = plan_slices(replace(FC, neurons=24), devices)
    assert [neuron for each in slices for neuron in each.neurons] == list(range(24))
    for size in range(devices):
        for down in failure_sets(devices, size):
            owned = [0] * devices
            for each in slices:
                owned[each.publisher(down) or 0] += len(each.neurons)
            assert [n for device, n in enumerate(owned) if device not in down] == [24 // (devices - size)] * (
                devices - size
            )


@pytest.mark.parametrize("devices", range(5, 17))
def test_among_more_devices_slices_are_owned_evenly_while_one_is_down(devices: int) -> None:
    slices = plan_slices(replace(FC, neurons=devices * (devices - 1)), devices)
    for down in (frozenset[int](), *failure_sets(devices, 1)):
        owned = Counter(each.publisher(down) for each in slices)
        assert set(owned.values()) == {len(slices) // (devices - len(down))}
    for size in (1, devices - 1):
        few = plan_slices(replace(FC, neurons=size), devices)
        assert len({each.publisher(()) for each in few}) == size


def test_a_plan_with_owners_counts_two_exchanges_and_what_they_carry(tmp_path: Path) -> None:
    plan = paired(owned=frozenset([0]))
    # Each of three devices has sums of two neurons and hands a third of them to each owner: as much as if two
    # were handed to all. The owners hand on two activations.
    assert [plan.handed_over(layer) for layer in range(2)] == [(2, 2), (2, 2)]
    assert (plan.exchanges, plan.exchanged_activations, paired().exchanged_activations) == (2, 4, 6)
    assert plan.bytes_per_device == paired().bytes_per_device
    assert (len(plan.exchanged_shards(0)), len(plan.exchanged_shards(1))) == (6 * 2, 2)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(PlanError, match="no pairs, or just two devices"):
        paired(owned=frozenset([1]))


def scores_of(network: Network) -> Importance:
    random = np.random.default_rng(0)
    layers = network.plan_layers
    scores = tuple(random.random((layer.neurons // layer.group, 1)) for layer in layers)
    return Importance(tuple(layer.name for layer in layers), scores, ("s1",), network.reference)


@pytest.mark.parametrize("memory", [0.6, 0.75])
def test_memory_is_kept_and_used_with_pairs(memory: float) -> None:
    plain = network("plain")
    plan = partition(plain, scores_of(plain), devices=3, memory=memory, split="hidden")
    assert plan.memory_share <= memory
    assert plan.memory_share > memory - 0.1
    assert [plan.split(layer) for layer in range(2)] == ["hidden"] * 2


def test_where_memory_lets_every_device_hold_all_there_is_nothing_to_split() -> None:
    plain = network("plain")
    with pytest.raises(PlanError, match="every device holds the layers that pairs begin with"):
        partition(plain, scores_of(plain), devices=3, memory=1.0, split="hidden")


def test_a_method_deals_out_the_neurons_of_a_pairs_first_layer_and_nothing_of_its_second() -> None:
    plain = network("plain")
    asked = []

    def mine(request: Request) -> Any:
        asked.append([(layer.name, layer.neuron_weights) for layer in request.layers])
        return METHODS["lop"](request)

    plan = partition(plain, devices=2, method=mine, split="hidden")
    assert asked == [[("conv", 10 + 16 * 7), ("fc2", 8)]]
    assert plan.shards[0] == partition(plain, devices=2, method="lop").shards[0]
    assert (plan.pairs, len(plan.shards[1]), plan.settings["split"]) == ({0: 1}, 1, "hidden")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "sideways"}, "unknown split 'sideways'; known: neurons, hidden"),
        ({"method": "cdc"}, "cdc hands over sums of its own"),
        ({"precision": "int8", "spare_precision": "ec2"}, "filters in ec2 are had whole or not at all"),
    ],
)
def test_what_cannot_be_split_so_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        partition(network("plain"), **{"devices": 3, "method": "lop", "split": "hidden", **changes})
