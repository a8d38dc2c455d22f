"""Bundles of plans with pairs compute what the evaluator says, with the weights that the plan counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nets import random_images, random_plan, relative_error
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.failure.copies import Copies, state_of
from robustdice.failure.passes import run_under
from robustdice.model.network import Network
from robustdice.model.pairs import possible_pairs
from robustdice.plan import Holder, Plan, Shard, failure_sets
from robustdice.runtime.inprocess import InProcess
from test_pairs import network

TOLERANCE = 1e-4


def with_pairs(plan: Plan, possible: dict[int, int], seed: int = 0) -> Plan:
    """The plan with some of the possible pairs."""
    random, pairs, shards = np.random.default_rng(seed), dict[int, int](), list(plan.shards)
    for first in random.permutation(sorted(possible)):
        second = possible[first]
        if {first, second}.isdisjoint({*pairs, *pairs.values()}) and not plan.held_by_all(first):
            pairs[int(first)] = second
            shards[second] = (
                Shard(tuple(range(plan.layers[second].neurons)), tuple(map(Holder, range(plan.devices)))),
            )
    return replace(plan, shards=tuple(shards), pairs=pairs)


def check_bundles(network: Network, plan: Plan, directory: Path, spares: str = "standby") -> None:
    """Under every failure set the bundles agree with the evaluator, and they hold what the plan promises."""
    images = random_images(2, network.input_shape)
    bundles = [load_bundle(each) for each in write_bundles(network, plan, directory, spares)]
    cluster, copies = InProcess(bundles), Copies.of(network, plan)
    for size in range(plan.devices):
        for failed in failure_sets(plan.devices, size):
            (wanted,) = run_under(network, torch.from_numpy(images), [state_of(plan, failed)], copies)
            assert relative_error(cluster.run(images, failed), wanted.numpy()) < TOLERANCE, sorted(failed)


@pytest.mark.parametrize("spares", ["standby", "hot"])
@pytest.mark.parametrize("name", ["plain", "channels_last", "inverted"])
def test_bundles_equal_the_evaluator_in_every_failure_set(name: str, spares: str, tmp_path: Path) -> None:
    net = network(name)
    for devices in (2, 3):
        plan = with_pairs(random_plan(net, devices, seed=devices), possible_pairs(net), seed=devices)
        assert plan.pairs
        check_bundles(net, plan, tmp_path / str(devices), spares)
