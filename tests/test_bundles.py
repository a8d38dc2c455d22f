"""Bundles compute what the network computes, in every failure set, with exactly the weights that the plan says."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from nets import (
    Branches,
    ChannelsLast,
    Floats,
    Plain,
    Residual,
    labels_last,
    network_of,
    one_answer,
    random_images,
    random_plan,
    relative_error,
    scores_of,
    seeded,
)
from robustdice.bundle.manifest import Manifest
from robustdice.bundle.onnx_graph import OnnxGraph, export_onnx
from robustdice.bundle.read import load_bundle
from robustdice.bundle.stages import split_into_stages
from robustdice.bundle.write import write_bundles
from robustdice.demo.network import digits_cnn
from robustdice.errors import OutputError, PlanError
from robustdice.model.network import Network
from robustdice.partitioning import partition
from robustdice.plan import ModelReference, Plan, failure_sets
from robustdice.runtime.inprocess import run_bundles

TOLERANCE = 1e-4


class Extras(nn.Module):
    """What exporters are particular about: PReLU, resampling and per-neuron offsets in tails, reused layers and
    parameters, an index table, sizes taken from the input, a comparison that is used much later: [2, 8, 8] -> 4."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding="same")
        self.slope = nn.PReLU(6)
        self.up = nn.Upsample(scale_factor=2)
        self.offset = nn.Parameter(torch.linspace(-1, 1, 6).reshape(6, 1, 1))
        self.again = nn.Conv2d(6, 6, 4, padding="same", bias=False)
        self.norm = nn.GroupNorm(2, 6)
        self.token = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.head = nn.Linear(6, 4)
        self.register_buffer("order", torch.tensor([3, 1, 5, 0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3)) > 0  # bool[batch]
        x = self.up(self.slope(self.conv(x))) - self.offset
        x = self.norm(self.again(x).relu())
        x = self.norm(self.again(x[:, self.order.clamp(0, 5)]))
        x = x + self.token.expand(x.shape[0], -1, -1, -1)
        x = nn.functional.pad(x, (1, 0, 0, 1))
        scores: Tensor = self.head(x.amax((2, 3)))
        return torch.where(bright[:, None], scores, -scores) * 2


class Fussy(nn.Module):
    """What has gone wrong before: names with a slash, or of operations; a mask of true and false, bounds of two types,
    operations that the exporter takes apart, padding with what is at the other side, attention: [2, 8, 8] -> 4."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_module("stage/1", nn.Conv2d(2, 6, 3, padding=1))
        self.register_buffer("mask", torch.tensor([True, True, False, True, True, True])[:, None, None])
        self.norm = nn.RMSNorm(6)
        self.around = nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular")
        self.slope = nn.PReLU()
        self.mix = nn.Conv2d(5, 6, 1)
        self.mean = nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(6, 4))
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.get_submodule("stage/1")(x) * self.mask).permute(0, 2, 3, 1)
        x = self.slope(self.around(self.norm(x).permute(0, 3, 1, 2))) + 1
        x = (self.mix(x).clamp(-0.5, 1) + 1).flatten(2).mT[:, None]
        x = nn.functional.scaled_dot_product_attention(x, x, x)[:, 0]
        scores: Tensor = (x.var(1) + self.mean - x.mean(1)) @ self.matrix / self.temperature
        return scores


class TwoHeads(nn.Module):
    """A layer that reads the input late, and one whose input skips several stages: [3, 6, 6] -> 3."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.late, self.skip = nn.Conv2d(3, 5, 1), nn.Conv2d(4, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        y = self.c(self.b(a).relu()) + self.late(x) + self.skip(a)
        result: Tensor = self.head(y.mean((2, 3)))
        return result


def flat() -> nn.Module:
    """Operations on blocks of features: a neuron of the convolution is 16 columns of the matrix."""
    convolution = [nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolution, nn.BatchNorm1d(96), nn.PReLU(96), nn.Linear(96, 4))


def signal() -> nn.Module:
    """One axis instead of two."""
    first = [nn.Conv1d(2, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*first, nn.Conv1d(4, 6, 3, groups=2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 8, 8)),
    "plain": (Plain, (1, 8, 8)),
    "branches": (Branches, (2, 6, 6)),
    "channels_last": (ChannelsLast, (3, 8, 8)),
    "extras": (Extras, (2, 8, 8)),
    "fussy": (Fussy, (2, 8, 8)),
    "two_heads": (TwoHeads, (3, 6, 6)),
    "flat": (flat, (1, 8, 8)),
    "signal": (signal, (2, 16)),
    "one_answer": (one_answer, (1, 8, 8)),
    "labels_last": (labels_last, (1, 8, 8)),
    "digits": (digits_cnn, (1, 32, 32)),
}
MADE: dict[str, tuple[nn.Module, Network, OnnxGraph]] = {}


def made(name: str) -> tuple[nn.Module, Network, OnnxGraph]:
    """Module, network and export, made once."""
    if name not in MADE:
        make, shape = NETS[name]
        module = make() if name == "digits" else seeded(make)
        network = network_of(module, *shape)
        MADE[name] = (module, network, export_onnx(network))
    return MADE[name]


def plan_of(network: Network, method: str, devices: int) -> Plan:
    if method == "random":
        return random_plan(network, devices, seed=devices, everywhere=[1])
    return partition(
        network.plan_layers,
        None,
        devices=devices,
        method=method,
        shared_weights=network.shared_weights,
        model=network.reference,
    )


def expected(network: Network, plan: Plan, images: Floats, failed: frozenset[int]) -> Floats:
    with torch.no_grad():
        survivors = [torch.tensor(mask) for mask in plan.surviving_neurons(failed)]
        return network.run(torch.from_numpy(images), survivors).numpy()


def weights_in(directory: Path, parameters: Sequence[str]) -> dict[str, list[Floats]]:
    """Every array in the ONNX files of a directory that is (a part of) a parameter, by the parameter's name."""
    found: dict[str, list[Floats]] = {}
    for path in sorted(directory.glob("*.onnx")):
        model = onnx.load(path)
        onnx.checker.check_model(model)
        for tensor in model.graph.initializer:
            for name in parameters:
                if tensor.name == name or tensor.name.endswith("/" + name):
                    found.setdefault(name, []).append(onnx.numpy_helper.to_array(tensor))
    return found


def float_parameters(network: Network) -> dict[str, Tensor]:
    state = dict(network.module.state_dict())
    used = {str(node.target) for node in network.nodes if node.op == "get_attr"}
    return {name: value for name, value in state.items() if name in used and value.is_floating_point()}


PLANS = [("lop", "standby"), ("full", "standby"), ("random", "standby"), ("random", "hot")]
"""Slices have no spares, and of whole copies none is computed for others: there hot and standby are the same."""


@pytest.mark.parametrize(("method", "spares"), PLANS)
@pytest.mark.parametrize("name", NETS)
def test_bundles_equal_the_network_in_every_failure_set(name: str, method: str, spares: str, tmp_path: Path) -> None:
    module, network, graph = made(name)
    images = random_images(2, network.input_shape)
    for devices in (2, 3, 4):
        plan = plan_of(network, method, devices)
        directories = write_bundles(network, plan, tmp_path / str(devices), spares, graph)
        bundles = [load_bundle(directory) for directory in directories]
        intact = scores_of(module, images)
        assert relative_error(run_bundles(bundles, images), intact) < TOLERANCE
        assert np.abs(intact[0] - intact[1]).max() > 0.01 * np.abs(intact).max()
        for size in range(1, devices):
            for failed in failure_sets(devices, size):
                wanted = expected(network, plan, images, failed)
                assert relative_error(run_bundles(bundles, images, failed), wanted) < TOLERANCE, (devices, failed)


@pytest.mark.parametrize(("method", "spares"), PLANS)
@pytest.mark.parametrize("name", NETS)
def test_files_hold_what_the_plan_promises(name: str, method: str, spares: str, tmp_path: Path) -> None:
    _, network, graph = made(name)
    plan = plan_of(network, method, 3)
    parameters = float_parameters(network)
    for device, directory in enumerate(write_bundles(network, plan, tmp_path / "build", spares, graph)):
        held = weights_in(directory, list(parameters))
        held_bytes = sum(array.nbytes for arrays in held.values() for array in arrays)
        assert held_bytes == plan.bytes_per_device[device] == load_bundle(directory).manifest.weight_bytes
        for layer, shards in zip(network.layers, plan.shards, strict=True):
            mine = sorted(n for shard in shards if device in shard.devices for n in shard.neurons)
            for parameter in (sliced for sliced in layer.parameters if sliced.name in parameters):
                whole = parameters[parameter.name].numpy()
                blocks = np.stack(np.split(whole, layer.layer.neurons, parameter.axis))
                arrays = held.get(parameter.name, [])
                found = [np.split(a, a.shape[parameter.axis] // parameter.features, parameter.axis) for a in arrays]
                rows = sorted(block.tobytes() for split in found for block in split)
                assert rows == sorted(blocks[n].tobytes() for n in mine)


def test_everything_is_counted_once_in_full_plans() -> None:
    module, network, _ = made("residual")
    plan = plan_of(network, "full", 2)
    statistics = sum(b.numel() for b in module.buffers() if b.is_floating_point())
    assert plan.total_bytes == 4 * (sum(p.numel() for p in module.parameters()) + statistics)
    assert plan.bytes_per_device == (plan.total_bytes,) * 2


def stage_layers(network: Network, exchanged: Sequence[int]) -> list[list[str]]:
    chosen = {index: network.layers[index] for index in exchanged}
    return [[network.layers[i].layer.name for i in s.layers] for s in split_into_stages(network, chosen)]


def test_layers_of_parallel_branches_share_a_stage() -> None:
    assert stage_layers(made("branches")[1], range(4)) == [["left", "right"], ["mix"], ["head"], []]
    assert stage_layers(made("two_heads")[1], range(6)) == [["a", "late"], ["b", "skip"], ["c"], ["head"], []]


def test_a_layer_that_is_not_exchanged_has_no_stage() -> None:
    assert stage_layers(made("two_heads")[1], [0, 2, 5]) == [["a"], ["c"], ["head"], []]
    assert stage_layers(made("branches")[1], []) == [[]]
    assert stage_layers(made("branches")[1], [1]) == [["right"], []]


def test_a_full_plan_has_one_stage_and_nothing_to_exchange(tmp_path: Path) -> None:
    _, network, graph = made("residual")
    for directory in write_bundles(network, plan_of(network, "full", 2), tmp_path / "b", graph=graph):
        manifest = load_bundle(directory).manifest
        assert (len(manifest.stages), manifest.exchanges, manifest.stages[0].pieces) == (1, (), ())


def test_a_layer_that_everybody_holds_is_not_exchanged(tmp_path: Path) -> None:
    _, network, graph = made("plain")
    plan = random_plan(network, 3, seed=1, everywhere=[1])
    manifest = load_bundle(write_bundles(network, plan, tmp_path / "b", graph=graph)[0]).manifest
    assert [exchange.layer for exchange in manifest.exchanges] == ["conv", "fc2"]
    assert [exchange.fill for exchange in manifest.exchanges] == [0.0, -np.inf]


def test_hot_spares_are_in_the_first_piece_and_standby_ones_behind(tmp_path: Path) -> None:
    _, network, graph = made("plain")
    plan = random_plan(network, 3, seed=2)

    def pieces(spares: str) -> list[list[tuple[int, ...]]]:
        manifest = load_bundle(write_bundles(network, plan, tmp_path / spares, spares, graph)[0]).manifest
        held = [piece.shards for stage in manifest.stages for piece in stage.pieces]
        return [[manifest.exchanges[e].shards[s].devices for e, s in shards] for shards in held]

    assert len(pieces("hot")) == 3
    for held in pieces("standby"):
        assert len({frozenset(devices[: devices.index(0)]) for devices in held}) == 1


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", NETS)
def test_any_batch_size_can_be_run(name: str, batch: int, tmp_path: Path) -> None:
    module, network, graph = made(name)
    images = random_images(batch, network.input_shape, seed=batch)
    bundles = [
        load_bundle(d) for d in write_bundles(network, plan_of(network, "random", 3), tmp_path / "b", graph=graph)
    ]
    assert relative_error(run_bundles(bundles, images), scores_of(module, images)) < TOLERANCE


def test_the_manifest_says_what_a_device_needs_to_know(tmp_path: Path) -> None:
    _, network, graph = made("plain")
    preprocessing = {"input_size": [1, 8, 8], "mean": [0.5], "std": [2.0], "classes": ["a", "b", "c", "d"]}
    reference = replace(network.reference, preprocessing=preprocessing)
    plan = replace(plan_of(network, "lop", 2), model=reference)
    manifest = load_bundle(write_bundles(network, plan, tmp_path / "b", graph=graph)[1]).manifest
    assert (manifest.device, manifest.devices, manifest.plan_digest, manifest.spares) == (1, 2, plan.digest, "standby")
    assert (manifest.input_shape, manifest.outputs, manifest.classes) == ((1, 8, 8), 4, ("a", "b", "c", "d"))
    assert manifest.preprocessing == {"input_size": [1, 8, 8], "mean": [0.5], "std": [2.0]}
    assert Manifest.from_json((tmp_path / "b" / "device-1" / "manifest.json").read_bytes()) == manifest


def test_a_rebuild_replaces_all_of_the_build_before(tmp_path: Path) -> None:
    _, network, graph = made("plain")
    target = tmp_path / "new" / "build"
    write_bundles(network, plan_of(network, "lop", 4), target, graph=graph)
    (target / "cluster.toml").write_text("")
    (target / "device-0" / "secret.key").write_text("")
    plan = plan_of(network, "random", 2)
    write_bundles(network, plan, target, graph=graph)
    assert sorted(path.name for path in target.glob("device-*")) == ["device-0", "device-1"]
    assert Plan.load(target / "plan.json") == plan
    assert load_bundle(target / "device-0").manifest.plan_digest == plan.digest
    assert [path.name for path in target.parent.iterdir()] == ["build"]


@pytest.mark.parametrize(
    "foreign", ["thesis.txt", "device-notes.txt", "device-0", "device-1/data.csv", "device-x/manifest.json"]
)
def test_what_is_no_build_is_left_alone(foreign: str, tmp_path: Path) -> None:
    _, network, graph = made("plain")
    target = tmp_path / "build"
    (target / foreign).parent.mkdir(parents=True)
    (target / foreign).write_text("years of work")
    with pytest.raises(OutputError, match=r"build holds other things \(.*choose an empty directory with -o"):
        write_bundles(network, plan_of(network, "lop", 2), target, graph=graph)
    assert (target / foreign).read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    _, network, graph = made("plain")
    plan = plan_of(network, "lop", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; choose a directory with -o"):
        write_bundles(network, plan, tmp_path / "file", graph=graph)
    with pytest.raises(OutputError, match=r"cannot write the bundles to .*; choose another place with -o"):
        write_bundles(network, plan, tmp_path / "file" / "build", graph=graph)
    with pytest.raises(OutputError, match=r"cannot write the bundles to .*; choose another place with -o"):
        write_bundles(network, plan, Path("/proc/build"), graph=graph)


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    _, network, graph = made("plain")
    plan = replace(plan_of(network, "lop", 2), model=ModelReference("other", "0" * 64))
    with pytest.raises(PlanError, match="made for other"):
        write_bundles(network, plan, tmp_path / "b", graph=graph)
    with pytest.raises(PlanError, match="standby or hot, not 'cold'"):
        write_bundles(network, plan, tmp_path / "b", "cold", graph)
    assert not (tmp_path / "b").exists()
