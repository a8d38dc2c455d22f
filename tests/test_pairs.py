"""Layers that are dealt out together with the one that reads them: in plans, bundles and processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from robustdice.errors import PlanError
from robustdice.plan import Layer, Plan, added_up, failure_sets
from test_plan import example, shard

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
        ({"shards": (paired().shards[0], (shard([0], 0), shard([1], 1)))}, "not one shard of all devices in float32"),
        ({"shards": ((shard([*range(6)], 0, 1, 2),), paired().shards[1])}, "every device holds conv"),
    ],
)
def test_what_is_no_pair_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        paired(**changes)
