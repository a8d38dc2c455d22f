"""Bundles of coarse copies and corrections compute what the evaluator says, in every failure set."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from nets import Floats, coarsened, random_coarse, random_images, random_plan, relative_error
from robustdice.bundle.manifest import MANIFEST_NAME, WEIGHTS_NAME
from robustdice.bundle.read import Bundle, load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import BundleError
from robustdice.failure.copies import Copies, state_of
from robustdice.failure.passes import run_under
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.plan import Holder, Plan, Shard, failure_sets
from robustdice.representation import REPRESENTATIONS
from robustdice.runtime.executor import Executor
from robustdice.runtime.inprocess import InProcess
from test_bundles import NETS, made

TOLERANCE = 1e-4


def predicted(network: Network, plan: Plan, images: Floats, failed: frozenset[int]) -> Floats:
    """The evaluator's class scores."""
    (scores,) = run_under(network, torch.from_numpy(images), [state_of(plan, failed)], Copies.of(network, plan))
    return scores.numpy()


def same_on_all(network: Network, plan: Plan, layers: Sequence[int], seed: int) -> Plan:
    """The plan with the copies of some layers alike on all devices: of one representation, or one for each half."""
    random = np.random.default_rng(seed)
    shards, coarse = list(plan.shards), dict(plan.coarse)
    for index in layers:
        of_layer = network.layers[index]
        kinds = [str(kind) for kind in random.choice(["float32", "int8", "int3", "int2", "ec1.5"], 2)]
        groups = of_layer.layer.neurons // of_layer.layer.group
        middle = groups // 2 * of_layer.layer.group if random.random() < 0.5 else 0
        parts = ((range(middle), kinds[0]), (range(middle, of_layer.layer.neurons), kinds[1]))
        shards[index] = tuple(
            Shard(tuple(mine), tuple(Holder(device, kind) for device in range(plan.devices)))
            for mine, kind in parts
            if mine
        )
        coarse |= {(index, kind): random_coarse(of_layer, kind, seed) for kind in kinds if kind != "float32"}
    return replace(plan, shards=tuple(shards), coarse=coarse)


def bundles_of(network: Network, plan: Plan, name: str, directory: Path, spares: str = "standby") -> list[Bundle]:
    return [load_bundle(d) for d in write_bundles(network, plan, directory / "build", spares, made(name)[2])]


def check_every_failure_set(name: str, seed: int, devices: int, spares: str) -> None:
    _, network, _ = made(name)
    random = np.random.default_rng(seed)
    layers = [index for index in range(len(network.layers)) if random.random() < 0.4]
    plan = same_on_all(network, coarsened(network, random_plan(network, devices, seed), seed), layers, seed)
    images = random_images(2, network.input_shape, seed)
    with TemporaryDirectory() as directory:
        bundles = bundles_of(network, plan, name, Path(directory), spares)
        for device, bundle in enumerate(bundles):
            assert bundle.manifest.weight_bytes == plan.bytes_per_device[device]
            Executor(bundle).try_out()
        together = InProcess(bundles)
        for size in range(devices):
            for failed in failure_sets(devices, size):
                wanted = predicted(network, plan, images, failed)
                assert relative_error(together.run(images, failed), wanted) < TOLERANCE, sorted(failed)


@pytest.mark.parametrize("name", ["residual", "plain", "channels_last"])
@settings(max_examples=1, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 10**6))
def test_bundles_equal_the_evaluator_in_every_failure_set(name: str, seed: int) -> None:
    check_every_failure_set(name, seed, 2, "standby")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 10**6), devices=st.integers(2, 3), spares=st.sampled_from(["standby", "hot"]))
def test_bundles_of_any_network_equal_the_evaluator(name: str, seed: int, devices: int, spares: str) -> None:
    check_every_failure_set(name, seed, devices, spares)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet20_cifar10", "alexnet_cifar10", "vgg16_bn_half_cifar10", "convnext_small_cifar10"]
)
def test_bundles_of_trained_models_equal_the_evaluator(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "shared" / "models" / f"{name}.pt2"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/models")
    network = load_model(str(path))
    plan = coarsened(network, random_plan(network, 2, 1, [2, 3]), 1)
    images = random_images(1, network.input_shape)
    bundles = [load_bundle(directory) for directory in write_bundles(network, plan, tmp_path / "build")]
    for bundle in bundles:
        Executor(bundle).try_out()
    together = InProcess(bundles)
    for failed in (frozenset[int](), frozenset({0}), frozenset({1})):
        assert relative_error(together.run(images, failed), predicted(network, plan, images, failed)) < TOLERANCE


def of_kind(kind: str, name: str = "plain", devices: int = 2, everywhere: bool = False) -> tuple[Network, Plan]:
    """A plan of copies of one representation, in random shards, or all on all devices."""
    _, network, _ = made(name)
    layers = network.layers
    plan = random_plan(network, devices, 1, range(len(layers)) if everywhere else [])
    shards = tuple(
        tuple(replace(shard, holders=tuple(Holder(d, kind) for d in shard.devices)) for shard in of_layer)
        for of_layer in plan.shards
    )
    kept = [] if kind == "float32" else layers
    coarse = {(index, kind): random_coarse(layer, kind) for index, layer in enumerate(kept)}
    return network, replace(plan, shards=shards, coarse=coarse)


@pytest.mark.parametrize("kind", REPRESENTATIONS)
def test_what_all_hold_alike_needs_no_exchange(kind: str, tmp_path: Path) -> None:
    network, plan = of_kind(kind, everywhere=True)
    bundles = bundles_of(network, plan, "plain", tmp_path)
    assert all((len(bundle.manifest.stages), bundle.manifest.exchanges) == (1, ()) for bundle in bundles)
    images = random_images(3, network.input_shape)
    assert relative_error(InProcess(bundles).run(images, [0]), predicted(network, plan, images, frozenset([0]))) < 1e-4


def test_small_coarse_layers_that_follow_each_other_are_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, plan = of_kind("int3", "residual", everywhere=True)
    images = random_images(2, network.input_shape)
    wanted = predicted(network, plan, images, frozenset())
    for unpacked, models in ((2**18, 1), (400, 3)):
        monkeypatch.setattr("robustdice.bundle.models.UNPACKED_WEIGHTS", unpacked)
        bundles = bundles_of(network, plan, "residual", tmp_path / str(unpacked))
        assert len(bundles[0].manifest.parts) >= models
        assert (len(bundles[0].manifest.parts) == 1) == (models == 1)
        assert relative_error(InProcess(bundles).run(images), wanted) < TOLERANCE


def test_a_fine_copy_on_one_device_and_coarse_ones_elsewhere_are_exchanged(tmp_path: Path) -> None:
    network, plan = of_kind("int3", everywhere=True)
    first, *others = plan.shards[0]
    finer = replace(first, holders=(replace(first.holders[0], representation="float32"), *first.holders[1:]))
    plan = replace(plan, shards=((finer, *others), *plan.shards[1:]))
    bundles = bundles_of(network, plan, "plain", tmp_path)
    assert [exchange.layer for exchange in bundles[0].manifest.exchanges] == ["conv"]


@pytest.mark.parametrize("kind", REPRESENTATIONS[1:])
def test_few_neurons_at_a_time_compute_what_all_do(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, plan = of_kind(kind)
    images = random_images(1, network.input_shape)
    monkeypatch.setattr("robustdice.bundle.models.UNPACKED_WEIGHTS", 200)
    bundles = bundles_of(network, plan, "plain", tmp_path)
    layers = [layer for part in bundles[0].manifest.parts for layer in part.affine]
    assert any(layer.coarse and layer.coarse.at_once < layer.neurons for layer in layers)
    found = InProcess(bundles).run(images)
    assert relative_error(found, predicted(network, plan, images, frozenset())) < TOLERANCE


def test_corrections_change_no_bit_while_everyone_is_up(tmp_path: Path) -> None:
    for name, kind in (("residual", "int4"), ("residual", "float32")):
        network, plain = of_kind(kind, name)
        corrected = replace(plain, corrections=coarsened(network, plain, 3).corrections)
        assert corrected.corrections
        images = random_images(2, network.input_shape)
        before, after = [
            InProcess(bundles_of(network, plan, name, tmp_path / f"{kind}-{number}")).run(images)
            for number, plan in enumerate((plain, corrected))
        ]
        np.testing.assert_array_equal(before, after)


def edited(directory: Path, edit: Callable[[Any], None]) -> Path:
    """The bundle with another manifest."""
    path = directory / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document))
    return directory


def coarse_part(document: Any) -> Any:
    """Some coarse part of a manifest."""
    parts = [part for stage in document["stages"] for part in (*stage["local"], *stage["pieces"])]
    return next(part for part in parts if any(layer["coarse"] for layer in part["affine"]))


def in_blocks_of_two_layers(document: Any) -> None:
    layer = coarse_layer(document)
    layer["coarse"].update(at_once=1)
    coarse_part(document)["affine"].append(layer)


def coarse_layer(document: Any) -> Any:
    """Its layer."""
    return coarse_part(document)["affine"][0]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda d: coarse_layer(d)["coarse"]["filters"][0].update(offset=10**9), "weights beyond the end"),
        (
            lambda d: coarse_layer(d)["coarse"]["filters"][0].update(shape=[10**6, 10**6]),
            "weights beyond the end",
        ),
        (lambda d: coarse_layer(d)["coarse"].update(shift=10**9), "weights beyond the end"),
        (lambda d: coarse_layer(d).update(neurons=10**9), "weights beyond the end"),
        (lambda d: coarse_layer(d).update(neurons=0), "at least 1"),
        (lambda d: coarse_layer(d).update(corrections=[None]), "its corrections"),
        (lambda d: coarse_layer(d)["coarse"]["filters"][0].update(offset=-1), "at least 0"),
        (
            lambda d: coarse_layer(d)["coarse"]["filters"][0].update(representation="int5"),
            "a filter in int5",
        ),
        (lambda d: coarse_layer(d)["coarse"]["filters"][0].update(group=0), "at least 1"),
        (lambda d: coarse_layer(d)["coarse"].update(at_once=0), "at least 1"),
        (lambda d: coarse_layer(d)["coarse"].update(filters=[]), "without filters"),
        (in_blocks_of_two_layers, "one layer and one output"),
        (lambda d: d.update(calibrated=[[7]]), "a calibrated failure set"),
        (lambda d: d["files"].pop(WEIGHTS_NAME), "not part of the bundle|list of files"),
    ],
)
def test_a_manifest_that_contradicts_the_weights_is_refused(
    edit: Callable[[Any], None], reason: str, coarse_build: Path, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(coarse_build, tmp_path / "device-0"))
    with pytest.raises(BundleError, match=reason) as caught:
        load_bundle(edited(bad, edit))
    assert "build the bundle again" in str(caught.value)


def test_changed_weights_are_refused(coarse_build: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(coarse_build, tmp_path / "device-0"))
    weights = bad / WEIGHTS_NAME
    content = weights.read_bytes()
    for damaged, reason in (
        (content[:-1], "truncated"),
        (content + b"x", "more than"),
        (b"x" + content[1:], "changed"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(BundleError, match=reason):
            load_bundle(bad)
    weights.unlink()
    with pytest.raises(BundleError, match="cannot read"):
        load_bundle(bad)


def exchange_file(bundle: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file of a bundle, and its digest with it."""
    content = change((bundle / name).read_bytes())
    (bundle / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edited(bundle, lambda document: document["files"].update({name: entry}))


@pytest.mark.parametrize("kind", ["float32", "int3"])
def test_a_device_refuses_a_bundle_that_computes_something_else_on_it(kind: str, tmp_path: Path) -> None:
    network, plan = of_kind(kind, "residual")
    bundles = bundles_of(network, plan, "residual", tmp_path)
    for bundle in bundles:
        Executor(bundle).try_out()
        assert all(part.trial for part in bundle.manifest.parts)
    bundle, wrong = bundles[0], bundles[0].manifest.parts[-1]
    if not wrong.coarse:
        exchange_file(bundle.directory, wrong.file, _negated)
    else:  # the scale of its last neuron: not below 2
        filters = wrong.coarse[0].filters[0]
        end = filters.offset + wrong.affine[0].neurons * filters.neuron_bytes
        exchange_file(bundle.directory, WEIGHTS_NAME, lambda content: content[: end - 1] + b"\x40" + content[end:])
    with pytest.raises(BundleError, match=f"{wrong.file} computes something else here than where it was built"):
        Executor(load_bundle(bundle.directory)).try_out()


def _negated(content: bytes) -> bytes:
    """The model with the first neuron of its last filter negated."""
    model = onnx.load_from_string(content)
    tensor = [each for each in model.graph.initializer if each.name.endswith("weight")][-1]
    weights = numpy_helper.to_array(tensor).copy()
    weights[0] *= -1
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    return bytes(model.SerializeToString())


def test_parts_that_compute_other_neurons_of_a_layer_from_what_they_are_given_are_one_model(tmp_path: Path) -> None:
    network, plan = of_kind("int3")
    for bundle in bundles_of(network, plan, "plain", tmp_path):
        pieces = [piece for stage in bundle.manifest.stages for piece in stage.pieces]
        files = {
            piece.shards[0][0]: {p.file for p in pieces if p.shards[0][0] == piece.shards[0][0]} for piece in pieces
        }
        assert len(files) == 3
        assert all(len(of_layer) == 1 for of_layer in files.values())
        assert len(pieces) > 3
        executor = Executor(bundle)
        executor.try_out()  # each with filters of its own
        assert executor.loaded == len({part.file for part in bundle.manifest.parts})
        assert {path.name for path in bundle.directory.glob("*.onnx")} == {part.file for part in bundle.manifest.parts}


@pytest.fixture(scope="module")
def coarse_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network, plan = of_kind("int3")
    return bundles_of(network, plan, "plain", tmp_path_factory.mktemp("coarse"))[0].directory
