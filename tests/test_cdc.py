"""CDC: slices and their sum. Any one device down is repaired exactly; two down leave what LOP leaves of the slices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nets import (
    Branches,
    ChannelsLast,
    Plain,
    Residual,
    random_images,
    relative_error,
    shared_graph,
    shared_network,
)
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import PlanError
from robustdice.model.network import Network
from robustdice.partitioning import partition
from robustdice.plan import Holder, Plan, Shard, failure_sets
from robustdice.runtime.inprocess import InProcess

NETS = ((Residual, (3, 8, 8)), (Plain, (1, 8, 8)), (Branches, (2, 6, 6)), (ChannelsLast, (3, 8, 8)))


def cdc(network: Network, devices: int) -> Plan:
    return partition(
        network.plan_layers,
        None,
        devices=devices,
        method="cdc",
        shared_weights=network.shared_weights,
        model=network.reference,
    )


@pytest.mark.parametrize("spares", ["standby", "hot"])
@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize(("make", "shape"), NETS)
def test_bundles_give_the_evaluators_scores_for_every_failure_set(
    make: type[nn.Module], shape: tuple[int, ...], devices: int, spares: str, tmp_path: Path
) -> None:
    network, images = shared_network(make, *shape), random_images(3, shape)
    plan = cdc(network, devices)
    directories = write_bundles(network, plan, tmp_path / "build", spares, shared_graph(make, *shape))
    cluster = InProcess([load_bundle(directory) for directory in directories])
    with torch.no_grad():
        intact = network.run(torch.from_numpy(images)).numpy()
    for failed in [failed for size in range(devices) for failed in failure_sets(devices, size)]:
        masks = plan.surviving_neurons(failed)
        with torch.no_grad():
            expected = network.run(torch.from_numpy(images), [torch.tensor(mask) for mask in masks]).numpy()
        found = cluster.run(images, failed)
        assert relative_error(found, expected) < 1e-5, failed
        if len(failed) <= 1:
            assert relative_error(found, intact) < 1e-5, failed


@pytest.mark.parametrize("devices", [3, 4, 5])
def test_survivors_are_all_with_one_down_and_the_slices_of_lop_beyond(devices: int) -> None:
    network = shared_network(Residual, 3, 8, 8)
    plan = cdc(network, devices)
    for size in range(1, devices):
        for failed in failure_sets(devices, size):
            for layer, shards, mask in zip(plan.layers, plan.shards, plan.surviving_neurons(failed), strict=True):
                expected = np.zeros(layer.neurons, bool)
                lost = [s for s in shards if not s.parity_of and s.devices[0] in failed]
                parity_up = devices - 1 not in failed
                for shard in shards:
                    alive = not shard.parity_of and (shard not in lost or (parity_up and len(lost) == 1))
                    expected[list(shard.neurons)] = alive
                assert np.array_equal(mask, expected)
                if size == 1:
                    assert mask.all()


def test_what_a_device_holds_and_exchanges() -> None:
    network = shared_network(Plain, 1, 8, 8)  # conv 6, pooled and flattened; linear 7; linear 4
    plan = cdc(network, 4)
    assert [[len(shard.neurons) for shard in shards] for shards in plan.shards] == [
        [2, 2, 2, 0],
        [3, 2, 2, 0],
        [1, 2, 1, 0],
    ]
    own = [2 * 10 + 3 * 97 + 1 * 8, 2 * 10 + 2 * 97 + 2 * 8, 2 * 10 + 2 * 97 + 1 * 8, 2 * 10 + 3 * 97 + 2 * 8]
    assert plan.bytes_per_device == tuple(4 * weights for weights in own)
    assert plan.exchanged_activations == 6 * 64 + 7 + 4
    lop = partition(network.plan_layers, None, devices=4, method="lop", shared_weights=0, model=network.reference)
    assert lop.exchanged_activations == 6 * 16 + 7 + 4


def test_a_tail_is_everywhere_and_a_grouped_layers_parity_holds_all_filters() -> None:
    network = shared_network(Residual, 3, 8, 8)
    plan = cdc(network, 3)
    bare = {"conv1": 27, "conv2": 55, "expand": 7, "grouped": 19, "head": 13}
    tails = 6 * 4 + 8 * 10  # batch norm after conv1, the depthwise convolution after expand
    slices = {"conv1": 3, "conv2": 3, "expand": 4, "grouped": 6, "head": 3}
    parity = tails + sum(bare[name] * (12 if name == "grouped" else slices[name]) for name in bare)
    assert plan.bytes_per_device[2] == 4 * (parity + plan.shared_weights)


def test_a_budget_is_refused() -> None:
    network = shared_network(Plain, 1, 8, 8)
    with pytest.raises(PlanError, match="method cdc takes no memory"):
        partition(
            network.plan_layers, None, devices=3, method="cdc", memory=0.5, shared_weights=0, model=network.reference
        )


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (Shard((), (Holder(2),), parity_of=(0,)), "must be of all 2 other shards"),
        (Shard((), (Holder(2),), parity_of=(0, 7)), "must be of all 2 other shards"),
        (Shard((), (Holder(1),), parity_of=(0, 1)), "holds both the parity shard"),
        (Shard((3,), (Holder(2),), parity_of=(0, 1)), "at least one|do not hold each"),
        (Shard((), (Holder(2),)), "at least one"),
    ],
)
def test_a_wrong_parity_shard_is_refused(last: Shard, message: str) -> None:
    network = shared_network(Plain, 1, 8, 8)
    plan = cdc(network, 3)
    shards = ((*plan.shards[0][:-1], last), *plan.shards[1:])
    with pytest.raises(PlanError, match=message):
        Plan(3, plan.layers, shards, 0, "cdc", plan.model)


def test_a_plan_with_parity_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = cdc(shared_network(Residual, 3, 8, 8), 4)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
