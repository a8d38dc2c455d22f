"""A plan: what follows from its shards, what it refuses, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdice.errors import OutputError, PlanError
from robustdice.plan import Holder, Layer, ModelReference, Plan, Shard, failure_sets, shard_from_json, shard_to_json

MODEL = ModelReference(source="net.pt2", digest="ab" * 32, random_weights_seed=7, preprocessing={"mean": [0.5, 0.25]})


def shard(neurons: list[int], *devices: int) -> Shard:
    return Shard(neurons=tuple(neurons), holders=tuple(map(Holder, devices)))


def example(**changes: Any) -> Plan:
    """Three devices. ``conv`` is shared out with some copies, everyone holds ``dw``, ``fc`` has no copies."""
    fields: dict[str, Any] = {
        "devices": 3,
        "layers": (
            Layer("conv", neurons=6, group=1, neuron_weights=10, neuron_macs=100, neuron_outputs=16),
            Layer("dw", neurons=4, group=2, neuron_weights=5, neuron_macs=50, neuron_outputs=16),
            Layer("fc", neurons=2, group=1, neuron_weights=65, neuron_macs=64, neuron_outputs=1),
        ),
        "shards": (
            (shard([0, 3], 0, 1), shard([1, 4], 1), shard([2], 2, 0, 1), shard([5], 2)),
            (shard([0, 1], 0, 1, 2), shard([2, 3], 1, 2, 0)),
            (shard([0], 0), shard([1], 2)),
        ),
        "shared_weights": 8,
        "method": "robustdice",
        "model": MODEL,
        "settings": {"thresholds": [0.1, 0.2, "inf"], "memory": "80MB"},
        "provenance": {"scores": {"data": {"name": "digits"}}},
    }
    return Plan(**{**fields, **changes})


def test_publishers() -> None:
    plan = example()
    assert plan.publishers([]) == ((0, 1, 2, 2), (0, 1), (0, 2))
    assert plan.publishers([0]) == ((1, 1, 2, 2), (1, 1), (None, 2))
    assert plan.publishers({0, 2}) == ((1, 1, 1, None), (1, 1), (None, None))
    assert plan.publishers(range(3)) == ((None,) * 4, (None, None), (None, None))


def test_surviving_neurons() -> None:
    survivors = example().surviving_neurons([2])
    assert [mask.astype(int).tolist() for mask in survivors] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1], [1, 0]]
    with pytest.raises(ValueError, match="read-only"):
        survivors[0][0] = False


def test_bytes() -> None:
    plan = example()
    assert plan.total_bytes == 4 * (60 + 20 + 130 + 8)
    # Device 0: neurons 0, 3, 2 of conv, all of dw, neuron 0 of fc, and what is shared.
    assert plan.bytes_per_device == (4 * (30 + 20 + 65 + 8), 4 * (50 + 20 + 8), 4 * (20 + 20 + 65 + 8))
    assert plan.memory_share == 123 / 218


def test_held_by_all_and_compute() -> None:
    plan = example()
    assert [plan.held_by_all(layer) for layer in range(3)] == [False, True, False]
    # All of dw everywhere; two neurons of conv everywhere; one neuron of fc on the devices 0 and 2.
    assert plan.healthy_compute_share == (200 + 200 + 64) / (600 + 200 + 128)


def test_failure_sets() -> None:
    assert failure_sets(3, 0) == [frozenset()]
    assert failure_sets(3, 2) == [{0, 1}, {0, 2}, {1, 2}]
    assert failure_sets(3, 4) == []
    assert example().failure_set([1, 1]) == {1}
    for device in (-1, 3):
        with pytest.raises(PlanError, match=f"device {device} does not exist: the plan has devices 0 to 2"):
            example().publishers([device])


def test_shard_json_roundtrip() -> None:
    original = shard([1, 4], 2, 0)
    assert shard_to_json(original) == {"neurons": [1, 4], "holders": [[2, "float32"], [0, "float32"]]}
    assert shard_from_json(json.loads(json.dumps(shard_to_json(original)))) == original


def layer_changed(**changes: Any) -> dict[str, Any]:
    plan = example()
    return {"layers": (replace(plan.layers[0], **changes), *plan.layers[1:])}


def shards_changed(*shards: Shard, layer: int = 0) -> dict[str, Any]:
    all_shards = list(example().shards)
    all_shards[layer] = shards
    return {"shards": tuple(all_shards)}


INT9 = Shard(neurons=(0, 1, 2, 3, 4, 5), holders=(Holder(0, "int9"),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 1}, "for 2 to 16 devices, not 1"),
        ({"devices": 17}, "for 2 to 16 devices, not 17"),
        ({"devices": 2}, "device 2 does not exist, the plan has 2 devices"),
        ({"layers": (), "shards": ()}, "0 layers"),
        ({"shards": ()}, "3 layers .*, but shards for 0"),
        ({"shared_weights": -1}, "0 or more, got -1"),
        (layer_changed(name="dw"), "same name"),
        (layer_changed(group=0), "layer conv: group must be a whole number of at least 1, got 0"),
        (layer_changed(neuron_macs=1.5), "layer conv: neuron_macs must be a whole number of at least 1, got 1.5"),
        (layer_changed(group=4), "6 neurons are not a multiple of their group, 4"),
        (layer_changed(neurons=10**12), "do not hold each of its 1000000000000 neurons once"),
        (layer_changed(group=2), "splits a group of 2 neurons"),
        (shards_changed(), "do not hold each of its 6 neurons once"),
        (shards_changed(shard([0, 1, 2, 3, 4, 5], 0), shard([5], 1)), "do not hold each of its 6 neurons once"),
        (shards_changed(shard([0, 1, 2, 3, 4], 0)), "do not hold each of its 6 neurons once"),
        (shards_changed(shard([0, 1, 2, 4, 3, 5], 0)), "ascending order"),
        (shards_changed(shard([0, 1, 2, 3, 4, 5], 0), shard([], 1)), "at least one"),
        (shards_changed(shard([0, 1, 2, 3, 4, 5])), "a shard needs different holders, at least one"),
        (shards_changed(shard([0, 1, 2, 3, 4, 5], 1, 1)), r"a shard needs different holders, .*got \(1, 1\)"),
        (shards_changed(shard([0, 1, 2, 3, 4, 5], -1)), "device -1 does not exist"),
        (shards_changed(INT9), "unknown representation 'int9'; known: .*float32"),
    ],
)
def test_refuses_what_is_no_plan(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        example(**changes)


def test_file_roundtrip(tmp_path: Path) -> None:
    plan = example()
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert loaded.provenance == plan.provenance == {"scores": {"data": {"name": "digits"}}}
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_digest_covers_everything() -> None:
    others: list[dict[str, Any]] = [
        {"devices": 4},
        layer_changed(neuron_macs=101),
        shards_changed(shard([0, 3], 1, 0), shard([1, 4], 1), shard([2], 2, 0, 1), shard([5], 2)),
        {"shared_weights": 9},
        {"method": "lop"},
        {"model": replace(MODEL, digest="cd" * 32)},
        {"settings": {}},
    ]
    digests = {example(**changes).digest for changes in ({}, *others)}
    assert len(digests) == 1 + len(others)
    assert example().digest == example().digest
    assert len(example().digest) == 64


def test_where_a_plan_comes_from_does_not_make_it_another(tmp_path: Path) -> None:
    elsewhere = example(provenance={"versions": {"numpy": "1.26"}}, model=replace(MODEL, source="elsewhere/net.pt2"))
    assert elsewhere.digest == example().digest
    assert example(provenance={}) == example()
    elsewhere.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").provenance == {"versions": {"numpy": "1.26"}}


def test_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another place"):
        example().save(tmp_path / "missing" / "plan.json")


def put(value: Any, *keys: str | int) -> Callable[[Any], None]:
    """A change to a parsed plan file: ``value`` at the place that ``keys`` lead to."""

    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def drop(*keys: str | int) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("robustdice-bundle", "format"), "no robustdice-plan header"),
        (put(99, "version"), "has plan format version 99, this version reads 7"),
        (drop("version"), "has plan format version None"),
        (drop("plan"), "is a damaged plan .*'plan'"),
        (put([], "plan"), "is a damaged plan"),
        (put(None, "plan", "shards", 0, 0, "neurons"), "is a damaged plan"),
        (put([[0]], "plan", "shards", 0, 0, "holders"), "is a damaged plan"),
        (put("many", "plan", "devices"), "is a damaged plan .*many"),
        (put(float("inf"), "plan", "devices"), "is a damaged plan"),
        (put(17, "plan", "devices"), "is a damaged plan .*2 to 16 devices"),
        (put(0, "plan", "layers", 0, "group"), "is a damaged plan .*group"),
        (put("6", "plan", "layers", 0, "neurons"), "is a damaged plan .*neurons"),
        (put(1, "plan", "layers", 0, "colour"), "is a damaged plan .*colour"),
        (put(1, "plan", "model", "colour"), "is a damaged plan .*colour"),
        (put(3, "plan", "settings"), "is a damaged plan"),
        (put("lop", "plan", "method"), "does not have the digest that it states"),
        (drop("digest"), "does not have the digest that it states"),
    ],
)
def test_refuses_damaged_files(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    path = tmp_path / "plan.json"
    example().save(path)
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)
    assert "make a new one with 'robustdice plan'" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[" * 100_000, b"[]", b"3", b"{}"])
def test_refuses_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"is not a plan .*make a new one"):
        Plan.load(path)


def test_refuses_missing_files(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the plan .*No such file"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match=r"cannot read the plan .*directory"):
        Plan.load(tmp_path)


def test_a_plan_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    example().save(path)
    content = path.read_bytes()
    for length in range(0, len(content) - 2, 7):
        path.write_bytes(content[:length])
        with pytest.raises(PlanError):
            Plan.load(path)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    devices = draw(st.integers(2, 5))
    layers, shards = [], []
    for index in range(draw(st.integers(1, 3))):
        units, group = draw(st.integers(1, 8)), draw(st.integers(1, 2))
        number = st.integers(1, 50)
        layers.append(Layer(f"layer{index}", units * group, group, draw(number), draw(number), draw(number)))
        order = st.permutations(range(devices)).flatmap(
            lambda devices: st.integers(1, len(devices)).map(lambda count: tuple(devices[:count]))
        )
        by_order: dict[tuple[int, ...], list[int]] = {}
        for unit in range(units):
            neurons = range(unit * group, (unit + 1) * group)
            by_order.setdefault(draw(order), []).extend(neurons)
        shards.append(tuple(shard(neurons, *order) for order, neurons in by_order.items()))
    return Plan(devices, tuple(layers), tuple(shards), draw(st.integers(0, 9)), "robustdice", MODEL)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plans())
def test_what_follows_from_the_shards(plan: Plan) -> None:
    holders = [
        {neuron: shard.devices for shard in shards for neuron in shard.neurons} for shards in plan.shards
    ]  # the definitions, neuron by neuron
    for device, held in enumerate(plan.bytes_per_device):
        weights = sum(
            layer.neuron_weights
            for layer, of_layer in zip(plan.layers, holders, strict=True)
            for devices in of_layer.values()
            if device in devices
        )
        assert held == 4 * (weights + plan.shared_weights)
    assert 1 / plan.devices <= plan.memory_share <= 1
    assert 1 / plan.devices <= plan.healthy_compute_share <= 1 + 1e-12
    for failed in chain.from_iterable(failure_sets(plan.devices, size) for size in range(plan.devices + 1)):
        for of_layer, mask in zip(holders, plan.surviving_neurons(failed), strict=True):
            assert mask.tolist() == [not failed.issuperset(of_layer[neuron]) for neuron in range(len(of_layer))]
        for shards, publishers in zip(plan.shards, plan.publishers(failed), strict=True):
            for one, publisher in zip(shards, publishers, strict=True):
                up = [device for device in one.devices if device not in failed]
                assert publisher == (up[0] if up else None)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(plan=plans())
def test_any_plan_survives_its_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
