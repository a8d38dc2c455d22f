"""Layers computed from coarse copies, with corrections: the evaluator against the graph, node by node."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from nets import (
    Branches,
    Chains,
    ChannelsLast,
    Floats,
    Plain,
    Residual,
    coarsened,
    random_images,
    random_plan,
    relative_error,
    shared_network,
)
from robustdice.errors import PlanError
from robustdice.failure.copies import Copies, State, state_of
from robustdice.failure.evaluate import evaluate, evaluate_plans
from robustdice.failure.passes import run_under
from robustdice.model.data import Dataset
from robustdice.model.execute import execute
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network
from robustdice.plan import Certificate, Plan, failure_sets
from robustdice.representation import LOST, REPRESENTATIONS, CoarseLayer, Correction, neuron_bytes

NETWORKS = {
    "residual": partial(shared_network, Residual, 3, 8, 8),
    "plain": partial(shared_network, Plain, 1, 8, 8),
    "branches": partial(shared_network, Branches, 2, 6, 6),
    "channels_last": partial(shared_network, ChannelsLast, 3, 8, 8),
    "chains": partial(shared_network, Chains, 2, 8, 8),
}


def through(
    layer: NetworkLayer,
    values: dict[fx.Node, Any],
    kept: CoarseLayer | None,
    fixed: Correction | None,
) -> Tensor:
    """A layer's value when all of its neurons come from the copy ``kept`` (None: float32), corrected."""
    arguments: list[Any] = [values[each] if isinstance(each, fx.Node) else each for each in layer.node.args]
    if kept is not None:
        arguments[1] = torch.from_numpy(kept.filter.values()).reshape(arguments[1].shape)
        arguments[2:3] = [torch.from_numpy(kept.shift.astype(np.float32))]
    node, value = layer.node, layer.node.target(*arguments)  # type: ignore[operator]
    while True:
        if node is layer.affine_end and fixed is not None:
            shape = [1] * value.ndim
            shape[layer.affine_axis] = -1
            value = value * torch.tensor(fixed.scale, dtype=torch.float32).reshape(shape)
            value = value + torch.tensor(fixed.shift, dtype=torch.float32).reshape(shape)
        if node is layer.value:
            assert isinstance(value, Tensor)
            return value
        before, node = node, next(iter(node.users))
        if kept is not None and node in layer.affine:
            continue
        arguments = [values[each] if isinstance(each, fx.Node) and each is not before else each for each in node.args]
        arguments = [value if each is before else each for each in arguments]
        for number, each in enumerate(node.args):
            if kept is not None and isinstance(each, fx.Node) and str(each.target) in kept.tail:
                filters = kept.tail[str(each.target)]
                arguments[number] = torch.from_numpy(filters.values()).reshape(arguments[number].shape)
        value = node.target(*arguments)  # type: ignore[operator]


def literally(network: Network, plan: Plan, state: State, images: Tensor) -> Floats:
    """Every layer once for each kind of copy, and then each neuron from its own."""
    values: dict[fx.Node, Any] = {**network.constants(images.device), network.input: images}
    layers = {layer.value: index for index, layer in enumerate(network.layers)}
    for node in network.nodes:
        execute(network.module, [node], values)
        if node not in layers:
            continue
        index = layers[node]
        layer, copies = network.layers[index], state.copies[index]
        mixed = torch.full_like(values[node], layer.fill)
        for position in np.unique(copies[copies != LOST]):
            kept = plan.coarse.get((index, REPRESENTATIONS[position]))
            neurons = np.flatnonzero(copies == position)
            entries = torch.from_numpy((neurons[:, None] * layer.features + np.arange(layer.features)).ravel())
            whole = through(layer, values, kept, state.correction(index))
            mixed.index_copy_(layer.axis, entries, whole.index_select(layer.axis, entries))
        values[node] = mixed
    result: Floats = values[network.output].numpy()
    return result


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6)
@given(seed=st.integers(0, 10**6), devices=st.integers(2, 4))
def test_every_failure_set_computes_with_the_copies_of_its_publishers(name: str, seed: int, devices: int) -> None:
    network = NETWORKS[name]()
    everywhere = [seed % len(network.layers)] if seed % 2 else []
    plan = coarsened(network, random_plan(network, devices, seed, everywhere), seed)
    every = [state_of(plan, failed) for size in range(devices) for failed in failure_sets(devices, size)]
    states = every[:: max(1, seed % 4)]
    images = torch.from_numpy(random_images(2, network.input_shape, seed))
    with torch.no_grad():
        for state, found in zip(states, run_under(network, images, states, Copies(network, plan.coarse)), strict=True):
            assert relative_error(found.numpy(), literally(network, plan, state, images)) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=3)
@given(seed=st.integers(0, 10**6))
def test_a_coarse_plan_survives_its_file_bit_for_bit(
    name: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    network = NETWORKS[name]()
    plan = coarsened(network, random_plan(network, 3, seed), seed)
    plan = replace(plan, certificate=Certificate("digits", "d", 10, 0.9, {frozenset(): 0.9, frozenset({0, 2}): 0.1}))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded.digest == plan.digest
    assert loaded.certificate == plan.certificate
    for failed in failure_sets(3, 1):
        assert state_of(loaded, failed).key == state_of(plan, failed).key
    for key, kept in plan.coarse.items():
        assert np.array_equal(loaded.coarse[key].filter.values(), kept.filter.values())
        assert np.array_equal(loaded.coarse[key].shift, kept.shift)
    loaded.save(path)
    assert Plan.load(path).digest == plan.digest


def test_a_changed_array_of_a_plan_is_noticed(tmp_path: Path) -> None:
    network = NETWORKS["plain"]()
    plan = coarsened(network, random_plan(network, 2, 1), 1)
    path = tmp_path / "plan.json"
    plan.save(path)
    content = path.read_bytes()
    shift = next(iter(plan.coarse.values())).shift.tobytes()  # of one layer; its copies may have the same
    path.write_bytes(content.replace(shift, shift[:-1] + bytes([shift[-1] ^ 1]), 1))
    with pytest.raises(PlanError):
        Plan.load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PlanError, match="not a plan"):
        Plan.load(path)


def test_bytes_of_a_device_are_those_of_its_copies_and_corrections() -> None:
    network = NETWORKS["residual"]()
    plan = coarsened(network, random_plan(network, 3, 5), 5)
    for device, held in enumerate(plan.bytes_per_device):
        expected = 4 * plan.shared_weights
        for index, shards in enumerate(plan.shards):
            layer = plan.layers[index]
            for shard in shards:
                for holder in shard.holders:
                    if holder.device != device:
                        continue
                    kept = plan.coarse.get((index, holder.representation))
                    group = None if kept is None else kept.filter.group
                    expected += len(shard.neurons) * neuron_bytes(layer, holder.representation, group)
                    expected += (
                        2
                        * len(shard.neurons)
                        * sum(
                            device not in failed and each[index] is not None
                            for failed, each in plan.corrections.items()
                        )
                    )
        assert held == expected


def test_without_failures_corrections_change_nothing() -> None:
    network = NETWORKS["residual"]()
    plan = coarsened(network, random_plan(network, 3, 2), 2)
    assert plan.corrections
    assert state_of(plan, frozenset()).key == state_of(replace(plan, corrections={}), frozenset()).key


def test_a_set_that_was_not_calibrated_takes_the_nearest_one() -> None:
    network = NETWORKS["plain"]()
    plan = coarsened(network, random_plan(network, 4, 3), 3)
    one = next(iter(plan.corrections.values()))
    plan = replace(plan, corrections={frozenset({1}): one})
    assert plan.correction({1, 2}) is one
    assert plan.correction({2}) is None


def test_coarse_and_float32_plans_are_evaluated_together() -> None:
    network = NETWORKS["plain"]()
    images = random_images(20, network.input_shape)
    with torch.no_grad():
        labels = network.run(torch.from_numpy(images)).argmax(1).numpy()
    dataset = Dataset("random", labels, lambda index: images[index])
    fine = random_plan(network, 3, 4)
    coarse = coarsened(network, fine, 4)
    both = evaluate_plans(network, [fine, coarse], dataset)
    assert both == [evaluate(network, fine, dataset), evaluate(network, coarse, dataset)]
    assert both[0].clean == 1.0
