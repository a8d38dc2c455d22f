"""Bundles of plans with pairs compute what the evaluator says, with the weights that the plan counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import robustdice as rd
from nets import (
    Floats,
    Plain,
    coarsened,
    network_of,
    random_images,
    random_plan,
    relative_error,
    seeded,
    shared_graph,
    shared_network,
    with_pairs,
)
from robustdice.bundle.manifest import Manifest
from robustdice.bundle.onnx_graph import OnnxGraph, export_onnx
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import BundleError
from robustdice.failure.copies import Copies, state_of
from robustdice.failure.passes import run_under
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.model.pairs import possible_pairs
from robustdice.plan import Plan, failure_sets
from robustdice.runtime.executor import Executor
from robustdice.runtime.inprocess import InProcess
from robustdice.wire_format import WIRES
from test_pairs import NETS
from test_wire import ALLOWED

TOLERANCE = 1e-4


def evaluated(network: Network, plan: Plan, images: Floats, failed: frozenset[int]) -> Floats:
    (scores,) = run_under(network, torch.from_numpy(images), [state_of(plan, failed)], Copies.of(network, plan))
    found: Floats = scores.numpy()
    return found


def check(network: Network, graph: OnnxGraph, plan: Plan, directory: Path, spares: str = "standby") -> None:
    """Under every failure set the bundles agree with the evaluator; writing them checks that they hold what the plan
    counts."""
    images = random_images(2, network.input_shape)
    bundles = [load_bundle(each) for each in write_bundles(network, plan, directory, spares, graph)]
    for bundle in bundles:
        Executor(bundle).try_out()
    cluster = InProcess(bundles)
    for size in range(plan.devices):
        for failed in failure_sets(plan.devices, size):
            wanted = evaluated(network, plan, images, failed)
            error = relative_error(cluster.run(images, failed), wanted)
            assert error < ALLOWED[plan.wire], (plan.devices, plan.wire, sorted(failed))


@pytest.mark.parametrize("spares", ["standby", "hot"])
@pytest.mark.parametrize("name", ["plain", "channels_last", "inverted"])
def test_bundles_equal_the_evaluator_in_every_failure_set(name: str, spares: str, tmp_path: Path) -> None:
    net, graph = shared_network(*_net(name)), shared_graph(*_net(name))
    for devices in (2, 3, 4):
        plan = with_pairs(random_plan(net, devices, seed=devices), possible_pairs(net), seed=devices)
        assert plan.pairs
        check(net, graph, plan, tmp_path / str(devices), spares)


@pytest.mark.parametrize(
    ("name", "devices", "wire"), [("plain", 4, "float32"), ("channels_last", 3, "float16"), ("inverted", 5, "uint8")]
)
def test_what_owners_add_up_equals_the_evaluator_in_every_failure_set(
    name: str, devices: int, wire: str, tmp_path: Path
) -> None:
    net, graph = shared_network(*_net(name)), shared_graph(*_net(name))
    plan = with_pairs(random_plan(net, devices, seed=devices), possible_pairs(net), seed=devices)
    plan = replace(plan, owned=frozenset(plan.pairs), wire=wire)
    check(net, graph, plan, tmp_path, ("standby", "hot")[devices % 2])


@pytest.mark.parametrize(
    ("name", "devices", "wire"), [("plain", 3, "float32"), ("channels_last", 3, "float32"), ("inverted", 2, "uint8")]
)
def test_coarse_copies_of_pairs_equal_the_evaluator_in_every_failure_set(
    name: str, devices: int, wire: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustdice.bundle.models.UNPACKED_WEIGHTS", 200)  # few neurons at a time
    net, graph = shared_network(*_net(name)), shared_graph(*_net(name))
    plan = with_pairs(random_plan(net, devices, seed=devices), possible_pairs(net), seed=devices)
    plan = replace(coarsened(net, plan, devices), wire=wire)
    assert any(map(plan.is_coarse_pair, plan.pairs))
    check(net, graph, plan, tmp_path, ("hot", "standby")[devices % 2])


def _net(name: str) -> tuple[Any, ...]:
    make, shape = NETS[name]
    return make, *shape


def test_corrections_of_both_layers_of_a_pair_are_applied(tmp_path: Path) -> None:
    net, graph = shared_network(Plain, 1, 8, 8), shared_graph(Plain, 1, 8, 8)
    plan = rd.partition(net, devices=3, method="lop", split="hidden")
    calibrated = rd.calibrate(net, plan, random_images(40, net.input_shape, seed=3))
    of_layers = calibrated.corrections[frozenset([0])]
    assert of_layers[0] is None  # what is left of the first layer is as it was
    assert of_layers[1] is not None
    check(net, graph, calibrated, tmp_path)
    images = random_images(2, net.input_shape)
    failed = frozenset([0])
    assert relative_error(evaluated(net, calibrated, images, failed), evaluated(net, plan, images, failed)) > 0.01


def test_a_device_publishes_one_array_of_a_pair_while_all_are_up(tmp_path: Path) -> None:
    net, graph = shared_network(Plain, 1, 8, 8), shared_graph(Plain, 1, 8, 8)
    plan = replace(with_pairs(random_plan(net, 4, seed=1), {0: 1}), owned=frozenset())
    assert len(plan.shards[0]) > 4
    bundles = [load_bundle(each) for each in write_bundles(net, plan, tmp_path, graph=graph)]
    exchange = bundles[0].manifest.exchanges[0]
    assert (exchange.sums, exchange.shape, exchange.neurons) == (True, (7,), 6)
    assert len([shard for shard in exchange.shards if not shard.after]) == len(
        {shard.devices[0] for shard in plan.shards[0]}
    )


def damaged(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(content)
    change(document["exchanges"][0])
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda exchange: exchange.update(sums=False),
        lambda exchange: exchange["shards"][0].update(neurons=[]),
        lambda exchange: exchange["shards"][0]["holders"].append([1, "float32"]),
        lambda exchange: exchange["shards"][-1].update(neurons=[99]),
        lambda exchange: exchange["shards"][0].update(after=[1]),
    ],
)
def test_a_manifest_with_impossible_sums_is_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    net, graph = shared_network(Plain, 1, 8, 8), shared_graph(Plain, 1, 8, 8)
    plan = with_pairs(random_plan(net, 3, seed=1), {0: 1})
    directory, *_ = write_bundles(net, plan, tmp_path, graph=graph)
    content = (directory / "manifest.json").read_bytes()
    Manifest.from_json(content)
    with pytest.raises(BundleError, match=r"contradicts itself|is damaged"):
        Manifest.from_json(damaged(content, change))


def random_chain(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolutions, pools and linear layers after each other, with batch norms, depthwise convolutions and activations
    in tails."""
    random = np.random.default_rng(seed)
    channels, size, parts = int(random.integers(1, 4)), 8, list[nn.Module]()
    shape = (channels, size, size)
    for _ in range(random.integers(1, 4)):
        wide = int(random.integers(3, 9))
        kernel = int(random.choice([1, 3]))
        bias = bool(random.integers(2))
        padding = int(random.integers(2))
        kernel = kernel if size + 2 * padding >= kernel else 1  # maps may be small by now
        parts.append(nn.Conv2d(channels, wide, kernel, padding=padding, bias=bias))
        size += 1 - kernel + 2 * padding
        if random.integers(2):
            parts.append(nn.BatchNorm2d(wide))
        if random.integers(3):
            parts.append((nn.ReLU, nn.GELU, nn.Hardswish)[random.integers(3)]())
        if not random.integers(3):
            parts += [nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.ReLU6()]
        if size >= 6 and random.integers(2):
            parts.append(nn.MaxPool2d(2))
            size //= 2
        channels = wide
    parts += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    width = 4 * channels
    for _ in range(random.integers(1, 3)):
        wide = int(random.integers(4, 9))
        parts += [nn.Linear(width, wide, bias=bool(random.integers(2))), nn.Tanh()]
        width = wide
    return nn.Sequential(*parts, nn.Linear(width, 4)), shape


def check_random(seed: int, devices: int, spares: str, directory: Path) -> None:
    module, shape = random_chain(seed)
    net = network_of(seeded(lambda: module, seed), *shape)
    plan = with_pairs(random_plan(net, devices, seed), possible_pairs(net), seed)
    plan = replace(coarsened(net, plan, seed) if seed % 2 else plan, wire=WIRES[seed % len(WIRES)])
    check(net, export_onnx(net), plan, directory, spares)


@pytest.mark.parametrize("seed", range(2))
def test_pairs_of_a_random_network_equal_the_evaluator(seed: int, tmp_path: Path) -> None:
    check_random(seed, 2 + seed, "standby", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=25)
@given(st.integers(2, 2**31), st.integers(2, 4), st.sampled_from(["standby", "hot"]))
def test_pairs_of_random_networks_equal_the_evaluator(
    tmp_path_factory: pytest.TempPathFactory, seed: int, devices: int, spares: str
) -> None:
    check_random(seed, devices, spares, tmp_path_factory.mktemp("random"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["alexnet", "convnext_tiny", "mobilenet_v2"])
def test_pairs_of_architectures_equal_the_evaluator(name: str, tmp_path: Path) -> None:
    net = load_model(f"torchvision:{name}", random_weights=True, seed=0)
    plan = rd.partition(net, devices=2, method="lop", split="hidden")
    assert plan.pairs
    check(net, export_onnx(net), plan, tmp_path)


@pytest.mark.slow
def test_a_cluster_with_pairs_outlives_a_device(tmp_path: Path) -> None:
    net = load_model("robustdice.demo.network:digits_cnn")
    plan = with_pairs(random_plan(net, 3, seed=5), possible_pairs(net))
    plan = replace(plan, owned=frozenset(plan.pairs))
    assert plan.owned
    rd.build(net, plan, tmp_path / "build")
    assert rd.verify(tmp_path / "build").agrees
    images = random_images(20, net.input_shape)
    with rd.LocalCluster(tmp_path / "build", timeout_seconds=5.0) as cluster:
        for failed in (frozenset[int](), frozenset([1])):
            for device in failed:
                cluster.kill(device)
            *_, answer = cluster.client.stream(images)
            assert answer.outputs is not None
            assert answer.down == tuple(failed)
            share = min(float(mask.mean()) for mask in plan.surviving_neurons(failed))
            assert answer.coverage == pytest.approx(share)
            assert relative_error(answer.outputs[None], evaluated(net, plan, images[-1:], failed)) < TOLERANCE
