"""Runs of layers that are computed in strips of rows: in plans, bundles and processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import robustdice as rd
from nets import (
    Plain,
    network_of,
    random_images,
    random_plan,
    relative_error,
    seeded,
    shared_graph,
    shared_network,
)
from robustdice.bundle.onnx_graph import OnnxGraph
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import BundleError, PlanError
from robustdice.importance.values import Importance
from robustdice.model.network import Network
from robustdice.model.strips import ROWS, Window, region_of, regions, strips_of
from robustdice.partitioning import partition as partition_layers
from robustdice.partitioning.replicate import whole
from robustdice.plan import Plan, Strips, failure_sets
from robustdice.report.tables import plan_summary
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.inprocess import InProcess
from test_plan import example

RUN = Strips(layers=(0, 1), bounds=(0, 2, 3, 5), heights=(10, 5), computed=((6, 4, 6), (2, 1, 2)), activations=32)


def with_strips(plan: Plan, run: Strips) -> Plan:
    """The plan with the layers of a run on every device, in strips."""
    layers = list(enumerate(zip(plan.layers, plan.shards, strict=True)))
    shards = tuple(whole(layer, plan.devices) if i in run.layers else dealt for i, (layer, dealt) in layers)
    return replace(plan, shards=shards, strips=(run,))


def striped() -> Plan:
    return with_strips(example(), RUN)


def test_a_plan_counts_what_strips_compute_and_hand_over() -> None:
    plan = striped()
    assert [plan.split(layer) for layer in range(3)] == ["rows", "rows", "neurons"]
    assert [replace(plan, strips=()).split(layer) for layer in range(3)] == ["whole", "whole", "neurons"]
    assert [plan.exchanged(layer) for layer in range(3)] == [0, 32, 2]
    assert (plan.exchanges, plan.exchanged_activations) == (2, 34)
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
        ({"activations": 0}, "0 activations are handed over"),
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


# -- which rows are needed


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_padded_strip_slides_to_what_the_whole_map_has_there(data: st.DataObject) -> None:
    draw = data.draw
    kernel, dilation, step = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    extent = dilation * (kernel - 1) + 1
    padding = draw(st.integers(0, extent - 1))
    whole = draw(st.integers(max(1, extent - 2 * padding), 30))
    height = (whole + 2 * padding - extent) // step + 1
    first = draw(st.integers(0, height - 1))
    rows = first, draw(st.integers(first + 1, height))
    weights, column = np.arange(1, kernel + 1), np.random.default_rng(0).integers(-9, 9, whole)

    def slide(values: np.ndarray, before: int, behind: int) -> list[int]:
        padded = np.pad(values, (before, behind))
        starts = range(0, len(padded) - extent + 1, step)
        return [int(weights @ padded[start : start + extent : dilation]) for start in starts]

    window = Window(extent, step, padding)
    start, end = window.reads(rows, height, whole)
    found = slide(column[start:end], *window.pads(rows, height, whole))
    assert found == slide(column, padding, padding)[slice(*rows)]


class Stem(nn.Module):
    """What begins a network, and a classifier of two layers behind it."""

    def __init__(self, *stem: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(*stem)
        channels = [part.out_channels for part in self.stem.modules() if isinstance(part, nn.Conv2d)][-1]
        self.mix, self.head = nn.Conv2d(channels, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x).abs().mean((2, 3), keepdim=True)).relu()
        scores: Tensor = self.head(x.flatten(1))
        return scores


def convolution(before: int, after: int, kernel: int, *, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(before, after, kernel, stride, padding, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def vgg() -> nn.Module:
    block = [*convolution(3, 4, 3, padding=1), *convolution(4, 4, 3, padding=1), nn.MaxPool2d(2)]
    return Stem(*block, *convolution(4, 6, 3, padding=1), *convolution(6, 6, 3, padding=1), nn.MaxPool2d(2))


def alexnet() -> nn.Module:
    first = [nn.Conv2d(3, 5, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    return Stem(*first, nn.Conv2d(5, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(6, 6, 3, padding=1))


class Block(nn.Module):
    """A residual block that makes the map smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Conv2d(4, 6, 1, stride=2)
        self.way = nn.Sequential(*convolution(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.beside(x) + self.way(x))


def resnet() -> nn.Module:
    return Stem(*convolution(3, 4, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1), Block())


class Fork(nn.Module):
    """Branches of other reach side by side, pooling with all its options, slopes, a gain for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 3, (5, 3), padding="same", dilation=2), nn.Conv2d(4, 2, 1)
        self.slope, self.gain = nn.PReLU(5), nn.Parameter(torch.linspace(0.5, 2, 5).reshape(5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.wide(x), self.narrow(x)], 1)
        x = nn.functional.avg_pool2d(self.slope(x), 3, 2, 1, ceil_mode=True, count_include_pad=False)
        return nn.functional.hardswish(x * self.gain)


def fork() -> nn.Module:
    return Stem(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), Fork(), nn.Conv2d(5, 4, 3))


STEMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg": (vgg, 32),
    "alexnet": (alexnet, 131),
    "resnet": (resnet, 45),
    "fork": (fork, 33),
}


def errors(network: Network, plan: Plan, directory: Path, graph: OnnxGraph | None = None) -> list[float]:
    """Of the plan's bundles against the network, for every failure set; every part is tried first."""
    images = random_images(2, network.input_shape)
    bundles = [load_bundle(each) for each in write_bundles(network, plan, directory, graph=graph)]
    together = InProcess(bundles)
    for executor in together._executors.values():
        executor.try_out()
    found = []
    for failed in (failed for size in range(plan.devices) for failed in failure_sets(plan.devices, size)):
        with torch.no_grad():
            survivors = [torch.tensor(mask) for mask in plan.surviving_neurons(failed)]
            wanted = network.run(torch.from_numpy(images), survivors).numpy()
        found.append(relative_error(together.run(images, failed), wanted))
    return found


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("devices", [2, 3, 4, 5])
def test_bundles_with_strips_equal_the_network_in_every_failure_set(name: str, devices: int, tmp_path: Path) -> None:
    make, size = STEMS[name]
    network, graph = shared_network(make, 3, size, size), shared_graph(make, 3, size, size)
    run = strips_of(network, regions(network)[-1], devices)
    plan = with_strips(random_plan(network, devices, seed=devices), run)
    assert len(run.layers) >= 3
    assert max(errors(network, plan, tmp_path / "build", graph)) < 1e-4


def line() -> nn.Module:
    """One axis beside the channels."""
    front = [nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 6, 3, padding=1)]
    return nn.Sequential(*front, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3))


def volume() -> nn.Module:
    """Three of them."""
    front = [nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 5, (3, 1, 3), padding=(1, 0, 1))]
    return nn.Sequential(*front, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(5, 3))


@pytest.mark.parametrize(("make", "shape"), [(line, (2, 31)), (volume, (2, 13, 8, 6))])
def test_rows_are_what_lies_behind_the_channels_however_many_axes_follow(
    make: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    network = shared_network(make, *shape)
    plan = with_strips(random_plan(network, 3, seed=1), strips_of(network, regions(network)[-1], 3))
    assert plan.strips[0].layers == (0, 1)
    assert max(errors(network, plan, tmp_path / "build")) < 1e-4


@st.composite
def stacks(draw: st.DrawFn) -> list[nn.Module]:
    """Layers that make no sense together."""
    parts: list[nn.Module] = []
    channels = 2
    for _ in range(draw(st.integers(1, 4))):
        after, kernel, dilation = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
        padding, stride = draw(st.integers(0, kernel - 1)), draw(st.integers(1, 2))
        parts.append(nn.Conv2d(channels, after, kernel, stride, padding, dilation, bias=draw(st.booleans())))
        channels = after
        if draw(st.booleans()):
            parts.append(nn.BatchNorm2d(channels))
        parts.append(draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Conv2d(channels, channels, 1)])))
        if draw(st.booleans()):
            pool: Callable[..., nn.Module] = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
            kernel = draw(st.integers(2, 3))
            stride, padding, ceil = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.booleans())
            parts.append(pool(kernel, stride, padding, ceil_mode=ceil))
    return parts


@pytest.mark.slow
@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(stacks(), st.integers(2, 5), st.integers(0, 99))
def test_random_networks_in_strips_equal_themselves(
    tmp_path_factory: pytest.TempPathFactory, parts: list[nn.Module], devices: int, seed: int
) -> None:
    network = network_of(seeded(lambda: Stem(*parts), seed), 2, 41, 37)
    choices = [region for region in regions(network) if network.shapes[region.end][ROWS] >= devices]
    region = choices[seed % len(choices)]
    plan = with_strips(random_plan(network, devices, seed=seed), strips_of(network, region, devices))
    assert max(errors(network, plan, tmp_path_factory.mktemp("strips") / "build")) < 1e-4


def test_a_run_ends_where_rows_do_not_stay_rows() -> None:
    network = shared_network(Plain, 1, 8, 8)
    (region,) = regions(network)
    assert region.layers == (0,)
    assert network.shapes[region.end][1:] == (6, 4, 4)  # behind the pooling, before flattening
    network = shared_network(resnet, 3, 45, 45)
    ends = [network.shapes[region.end][1:] for region in regions(network)]
    assert ends == [(4, 12, 12), (6, 6, 6)]  # not in the middle of the block, where two values are needed


def test_strips_make_the_busiest_device_compute_little() -> None:
    network = shared_network(vgg, 3, 32, 32)
    region = regions(network)[-1]
    assert strips_of(network, region, 3).bounds == (0, 3, 5, 8)  # the one in the middle has two neighbours
    with pytest.raises(PlanError, match="8 rows are too few for strips on 9 devices"):
        strips_of(network, region, 9)


@pytest.mark.parametrize("devices", [2, 3])
def test_rows_pairs_neurons_and_whole_layers_go_together(devices: int, tmp_path: Path) -> None:
    network, graph = shared_network(headed, 3, 32, 32), shared_graph(headed, 3, 32, 32)
    layers = network.plan_layers
    for number, (pairs, last, everyone) in enumerate([({2: 3}, 1, {5}), ({4: 5}, 2, {3}), ({4: 5}, 3, set())]):
        plan = partition_layers(
            layers,
            importance_of(network),
            devices=devices,
            threshold=0.15,
            shared_weights=network.shared_weights,
            model=network.reference,
            pairs=pairs,
            run=strips_of(network, region_of(network, range(last + 1)), devices),
            whole=everyone,
        )
        plan = replace(plan, owned=frozenset(plan.pairs if devices > 2 else ()))
        assert {"rows", "hidden"} <= {plan.split(layer) for layer in range(6)}
        assert max(errors(network, plan, tmp_path / str(number), graph)) < 1e-4


# -- plans made with strips


def headed() -> nn.Module:
    """Few weights in front, many behind."""
    stem = vgg()
    assert isinstance(stem, Stem)
    return nn.Sequential(stem.stem, nn.Flatten(), nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 4))


def importance_of(network: Network) -> Importance:
    random = np.random.default_rng(0)
    scores = tuple(random.random((layer.neurons // layer.group, 1)) for layer in network.plan_layers)
    return Importance(tuple(layer.name for layer in network.plan_layers), scores, ("s1",), network.reference)


def busiest(plan: Plan) -> float:
    """The share of a plan's first four layers that the busiest device computes."""
    macs = sum(layer.neurons * layer.neuron_macs for layer in plan.layers[:4])
    return float(max(sum(plan.work(index)[device] for index in range(4)) for device in range(plan.devices)) / macs)


def test_a_plan_by_rows_keeps_to_its_memory_and_computes_the_run_from_float32() -> None:
    network = shared_network(headed, 3, 32, 32)
    importance = importance_of(network)
    plan = rd.partition(network, importance, devices=3, memory=0.6, split="rows")
    assert [plan.split(layer) for layer in range(6)] == ["rows"] * 4 + ["neurons", "whole"]
    assert 0.55 < plan.memory_share <= 0.6
    assert plan.strips == (strips_of(network, region_of(network, range(4)), 3),)
    assert plan.settings["split"] == "rows"
    said = plan_summary(plan)
    assert "Layers in strips of rows: 4. Every device holds all of them" in said
    assert f"computes {busiest(plan):.1%} of them at most" in said
    coarse = rd.partition(network, importance, devices=3, memory=0.3, precision="int8", split="rows")
    assert sorted(index for index, _ in coarse.coarse) == [4, 5]
    assert coarse.memory_share <= 0.3
    replicas = rd.partition(network, devices=3, method="full", split="rows")
    assert [replicas.split(layer) for layer in range(6)] == ["rows"] * 4 + ["whole"] * 2
    assert rd.partition(network, importance, devices=3, threshold=[9.0] * 6, split="rows").strips


def test_networks_without_a_front_for_strips_are_told_so() -> None:
    network = shared_network(vgg, 3, 32, 32)
    with pytest.raises(PlanError, match="does not begin with layers of at most 5% of its weights"):
        rd.partition(network, devices=2, method="lop", split="rows")
    with pytest.raises(PlanError, match="unknown split 'columns'; known: neurons, hidden, rows"):
        rd.partition(network, devices=2, method="lop", split="columns")


def test_the_weights_of_a_run_are_stored_once_and_counted_once(tmp_path: Path) -> None:
    network, graph = shared_network(headed, 3, 32, 32), shared_graph(headed, 3, 32, 32)
    plan = rd.partition(network, devices=3, method="lop", split="rows")
    for device, directory in enumerate(write_bundles(network, plan, tmp_path / "build", graph=graph)):
        manifest = load_bundle(directory).manifest
        assert manifest.weight_bytes == plan.bytes_per_device[device]
        strips = [piece for piece in manifest.stages[0].pieces if piece.apart]
        assert [piece.shards for piece in strips] == [((0, (device - k) % 3),) for k in (0, 1, 2)]
        in_run = sum(layer.neurons * layer.neuron_weights for layer in plan.layers[:4])
        assert manifest.files["strips-003.bin"].size == 4 * in_run
        (directory / "strips-003.bin").write_bytes(bytes(4 * in_run))
        with pytest.raises(BundleError, match=r"strips-003.bin has SHA-256"):
            load_bundle(directory)


@pytest.mark.parametrize("spares", ["standby", "hot"])
def test_strips_of_others_are_loaded_when_they_are_needed(tmp_path: Path, spares: str) -> None:
    network, graph = shared_network(headed, 3, 32, 32), shared_graph(headed, 3, 32, 32)
    plan = rd.partition(network, devices=3, method="full", split="rows")
    directories = write_bundles(network, plan, tmp_path / "build", spares, graph)
    together = InProcess([load_bundle(directory) for directory in directories])
    images = random_images(2, network.input_shape)
    loaded = [executor.loaded for executor in together._executors.values()]
    whole_answer = together.run(images)
    assert relative_error(together.run(images, {0, 1}), whole_answer) < 1e-4
    more = [executor.loaded for executor in together._executors.values()]
    assert np.subtract(more, loaded).tolist() == ([0, 0, 2] if spares == "standby" else [0, 0, 0])


def test_no_answer_lacks_a_row_when_devices_die_in_mid_stream(tmp_path: Path) -> None:
    network = shared_network(headed, 3, 32, 32)
    rd.build(network, rd.partition(network, devices=3, method="full", split="rows"), tmp_path / "build")
    images = random_images(60, network.input_shape)
    with torch.no_grad():
        wanted = network.run(torch.from_numpy(images)).numpy()
    with LocalCluster(tmp_path / "build", timeout_seconds=10.0) as cluster:
        for number, answer in enumerate(cluster.client.stream(images)):
            if number in {10, 30}:
                cluster.kill(number // 20)
            assert answer.outputs is not None
            assert relative_error(answer.outputs, wanted[number]) < 1e-4
            assert answer.coverage == 1.0
        assert answer.down == (0, 1)
        assert answer.from_spares > 0.5
