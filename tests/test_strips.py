"""Runs of layers that are computed in strips of rows: in plans, bundles and processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from robustdice.errors import PlanError
from robustdice.plan import Holder, Plan, Shard, Strips
from test_plan import example

RUN = Strips(layers=(0, 1), bounds=(0, 2, 3, 5), heights=(10, 5), computed=((6, 4, 6), (2, 1, 2)))


def everywhere(plan: Plan, *layers: int) -> Plan:
    """The plan with these layers on all devices."""
    all_devices = tuple(map(Holder, range(plan.devices)))
    shards = list(plan.shards)
    for layer in layers:
        shards[layer] = (Shard(tuple(range(plan.layers[layer].neurons)), all_devices),)
    return replace(plan, shards=tuple(shards))


def striped() -> Plan:
    return replace(everywhere(example(), 0, 1), strips=(RUN,))


def test_a_plan_counts_what_strips_compute_and_hand_over() -> None:
    plan = striped()
    assert [plan.split(layer) for layer in range(3)] == ["rows", "rows", "neurons"]
    assert [replace(plan, strips=()).split(layer) for layer in range(3)] == ["whole", "whole", "neurons"]
    # The run hands over dw's 4 neurons of 16 activations, and nothing before; fc one activation each of two neurons.
    assert [plan.exchanged(layer) for layer in range(3)] == [0, 64, 2]
    assert (plan.exchanges, plan.exchanged_activations) == (2, 66)
    # Six of conv's ten rows, two of dw's five, a neuron of fc.
    assert plan.healthy_compute_share == pytest.approx((600 * 0.6 + 200 * 0.4 + 64) / (600 + 200 + 128))
    assert plan.bytes_per_device == replace(plan, strips=()).bytes_per_device


def test_the_strips_of_a_run_can_be_computed_by_every_device_in_turn() -> None:
    first, second, third = RUN.shards()
    assert (first.neurons, second.neurons, third.neurons) == ((0, 1), (2,), (3, 4))
    assert (first.devices, second.devices, third.devices) == ((0, 1, 2), (1, 2, 0), (2, 0, 1))


def test_strips_are_part_of_what_a_plan_says(tmp_path: Path) -> None:
    plan = striped()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    other = replace(plan, strips=(replace(RUN, bounds=(0, 1, 3, 5)),))
    assert len({plan.digest, other.digest, replace(plan, strips=()).digest}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bounds": (0, 2, 5)}, "not at least one row for each of 3 devices"),
        ({"bounds": (0, 2, 2, 5)}, "not at least one row for each of 3 devices"),
        ({"layers": (1, 0)}, "not in ascending order"),
        ({"layers": ()}, "not in ascending order"),
        ({"layers": (0, 7)}, "layer 7, to be computed in strips, is not of this plan"),
        ({"layers": (1, 2)}, "layer fc: it is computed in strips, so every device has to hold the whole"),
        ({"heights": (10,)}, "rows are not those of its layers"),
        ({"computed": ((6, 4, 6), (2, 1, 9))}, r"devices compute \[2, 1, 9\] of 5 rows"),
        ({"computed": ((6, 4), (2, 1, 1))}, r"devices compute \[6, 4\] of 10 rows"),
    ],
)
def test_strips_that_no_plan_can_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(striped(), strips=(replace(RUN, **changes),))


def test_a_layer_is_in_one_run_at_most() -> None:
    with pytest.raises(PlanError, match="in two runs"):
        replace(striped(), strips=(RUN, RUN))
