"""Profiles from bundles: what they say their models compute, and what is measured of that without the workshop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import fails, run, without_workshop
from nets import save, seeded
from robustdice.bundle.manifest import Manifest
from robustdice.bundle.onnx_graph import OnnxGraph, export_onnx
from robustdice.bundle.parts import Part, Piece, Work
from robustdice.bundle.read import Bundle, load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.cost.model import dealt, predict, shares
from robustdice.cost.profile import TYPICAL, Profile
from robustdice.errors import BundleError
from robustdice.meter.held import _layer_seconds, measure_held
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.plan import Layer, Plan
from robustdice.workshop import partition
from test_strips import headed, importance_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(seeded(headed), tmp_path_factory.mktemp("held") / "net.pt2", 3, 32, 32)


@pytest.fixture(scope="module")
def network(model: str) -> Network:
    return load_model(model)


@pytest.fixture(scope="module")
def graph(network: Network) -> OnnxGraph:
    return export_onnx(network)


def bundles_of(network: Network, graph: OnnxGraph, directory: Path, **options: Any) -> tuple[Plan, list[Bundle]]:
    """A plan and its bundles."""
    plan = partition(network, **options)
    return plan, list(map(load_bundle, write_bundles(network, plan, directory / "build", graph=graph)))


def work_of(manifest: Manifest) -> dict[tuple[int, str], float]:
    """The shares of layers that a bundle says its device computes while all are up, by layer and representation."""
    found: dict[tuple[int, str], float] = {}
    for part in manifest.parts:
        first = [manifest.exchanges[e].shards[s] for e, s in part.shards] if isinstance(part, Piece) else []
        if all(shard.devices[0] == manifest.device and not shard.after for shard in first):
            for each in part.work:
                key = each.layer, each.representation
                found[key] = found.get(key, 0.0) + each.share
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lop"},
        {"method": "lop", "split": "hidden"},
        {"method": "lop", "split": "rows"},
        {"method": "lop", "split": "auto"},
        {"method": "full"},
        {"method": "lop", "precision": "int8", "split": "hidden"},
        {"method": "robustdice", "memory": 0.7, "spare_precision": "int8"},
    ],
    ids=str,
)
def test_a_bundle_says_what_of_each_layer_its_device_computes(
    options: Mapping[str, Any], network: Network, graph: OnnxGraph, tmp_path: Path
) -> None:
    scores = importance_of(network) if "memory" in options else None
    plan, bundles = bundles_of(network, graph, tmp_path, scores=scores, devices=3, **options)
    for device, bundle in enumerate(bundles):
        assert bundle.manifest.model_digest == network.reference.digest
        assert bundle.manifest.layers == plan.layers
        expected = {
            (index, kind): part[device]
            for index in range(len(plan.layers))
            for kind, part in dealt(plan, index).items()
            if part[device]
        }
        assert work_of(bundle.manifest) == pytest.approx(expected)


def test_what_a_bundle_has_of_each_layer_is_measured_and_scaled(
    network: Network, graph: OnnxGraph, tmp_path: Path
) -> None:
    plan, bundles = bundles_of(network, graph, tmp_path, devices=3, method="lop", split="rows")
    profile = measure_held(bundles[1])
    assert profile.layers.keys() == {layer.name for layer in plan.layers}
    for index, layer in enumerate(plan.layers):
        each = profile.layers[layer.name]
        assert each.share == pytest.approx(shares(plan, index)[1])
        assert each.whole == pytest.approx(each.part / each.share)
        assert 0 < each.whole < 1
    assert predict(plan, profile).frames_per_second > 0


def test_coarse_copies_are_measured_as_what_float32_would_take(
    network: Network, graph: OnnxGraph, tmp_path: Path
) -> None:
    profiles = []
    for kind in ("float32", "int8"):
        _, bundles = bundles_of(network, graph, tmp_path / kind, devices=2, method="full", precision=kind)
        profiles.append(measure_held(bundles[0]))
    fine, coarse = (sum(each.whole for each in profile.layers.values()) for profile in profiles)
    assert 0.1 < coarse / fine < 10


@pytest.mark.parametrize("slower", [1.0, 7.0])
def test_what_coarse_copies_took_is_what_they_are_modelled_to_take(slower: float) -> None:
    linear = Layer("fc", 500, 1, 1000, 1000, 1, filter_weights=1000)
    known = replace(TYPICAL, unpack_seconds={kind: slower * each for kind, each in TYPICAL.unpack_seconds.items()})
    work = Work(0, 0.5, "ec3")
    part = Part("part.onnx", ("x",), ("y",), work=(work,))
    for seconds in (0.05, 0.1):
        found = _layer_seconds(known, (linear,), part, work, seconds)
        assert found.share == 0.5
        assert replace(known, layers={"fc": found}).seconds(linear, 0.5, "ec3") == pytest.approx(seconds)
    assert _layer_seconds(known, (linear,), part, work, 1e-6).whole > 0  # less than unpacking alone


def test_a_device_without_the_workshop_writes_a_profile_that_plan_reads(
    model: str, network: Network, graph: OnnxGraph, tmp_path: Path
) -> None:
    _, bundles = bundles_of(network, graph, tmp_path, devices=2, method="lop")
    bundle = bundles[0].directory
    said = run(
        "profile", bundle, "-o", tmp_path / "device.json", environment=without_workshop(tmp_path / "nothing")
    ).stdout
    assert "The bundle has 50% of each layer's neurons" in " ".join(said.split())
    assert Profile.load(tmp_path / "device.json").layers.keys() == {layer.name for layer in network.plan_layers}
    plan = ("plan", model, "--devices", "3", "--method", "lop", "-o", tmp_path / "plan.json")
    modelled = json.loads(run(*plan, "--profile", tmp_path / "device.json", "--json").stdout)["modelled"]
    assert modelled["profile"] == str(tmp_path / "device.json")
    assert "leave out options of models" in fails("profile", bundle, "--size", "3,32,32", "-o", tmp_path / "x.json")
    assert "name one of them, such as" in fails("profile", bundle.parent, "-o", tmp_path / "x.json")
    nothing = bundle.parent / "device-9"
    assert f"{nothing} is not a directory: no bundle there" in fails("profile", nothing, "-o", tmp_path / "x.json")


def test_a_bundle_of_an_earlier_version_is_told_to_be_built_again(
    network: Network, graph: OnnxGraph, tmp_path: Path
) -> None:
    _, (bundle, _) = bundles_of(network, graph, tmp_path, devices=2, method="lop")
    document = json.loads(bundle.manifest.to_json())
    for stage in document["stages"]:
        for part in (*stage["local"], *stage["pieces"]):
            del part["work"]
    del document["layers"], document["model_digest"]
    earlier = replace(bundle, manifest=Manifest.from_json(json.dumps(document).encode()))
    with pytest.raises(BundleError, match="built by an earlier version; build it again"):
        measure_held(earlier)


@pytest.mark.parametrize("share", [0.0, 5e-324, 1.5])
def test_shares_of_layers_that_no_model_can_compute_are_refused(
    share: float, network: Network, graph: OnnxGraph, tmp_path: Path
) -> None:
    _, (bundle, _) = bundles_of(network, graph, tmp_path, devices=2, method="lop")
    document = json.loads(bundle.manifest.to_json())
    document["stages"][0]["pieces"][0]["work"][0]["share"] = share
    with pytest.raises(BundleError, match="of a layer in float32"):
        Manifest.from_json(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda layers: layers[:1], "what its models compute"),
        (
            lambda layers: [{**layer, "neuron_macs": "many"} for layer in layers],
            "at least 1, got 'many'",
        ),
        (lambda layers: [{**layer, "neurons": 0} for layer in layers], "whole number of at least 1, got 0"),
        (lambda layers: [{**layer, "group": 0} for layer in layers], "group must be a whole number of at least 1"),
        (lambda layers: [{**layer, "neuron_macs": 10**400} for layer in layers], "ValueError: a layer"),
        (lambda layers: [{**layer, "name": "the same"} for layer in layers], "the names of its layers"),
    ],
)
def test_layers_that_no_bundle_can_have_are_refused(
    layers: Callable[[Any], Any], message: str, network: Network, graph: OnnxGraph, tmp_path: Path
) -> None:
    _, (bundle, _) = bundles_of(network, graph, tmp_path, devices=2, method="lop")
    document = json.loads(bundle.manifest.to_json())
    document["layers"] = layers(document["layers"])
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(document).encode())
