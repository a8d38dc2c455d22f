"""From layers and scores to a plan: RobustDiCE, LOP, full replication, and what memory allows."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import robustdice.partitioning.budget as budget_module
from robustdice.errors import PlanError
from robustdice.importance.values import Importance, normalise
from robustdice.partitioning import METHODS, partition
from robustdice.partitioning.budget import parse_memories, parse_memory, solve_threshold
from robustdice.partitioning.cluster import cluster
from robustdice.partitioning.distribute import distribute
from robustdice.partitioning.precision import Kinds
from robustdice.plan import Layer, ModelReference, Plan, failure_sets

MODEL = ModelReference(source="net.pt2", digest="ab" * 32)


def network(seed: int = 0) -> tuple[list[Layer], Importance]:
    """Plain, grouped and small layers, with a few dead neurons (score 0) and one layer of equal neurons."""
    rng = np.random.default_rng(seed)
    layers = [
        Layer("conv1", neurons=48, group=1, neuron_weights=28, neuron_macs=2700, neuron_outputs=64),
        Layer("grouped", neurons=60, group=4, neuron_weights=37, neuron_macs=900, neuron_outputs=64),
        Layer("equal", neurons=22, group=1, neuron_weights=61, neuron_macs=500, neuron_outputs=64),
        Layer("fc", neurons=10, group=1, neuron_weights=49, neuron_macs=48, neuron_outputs=1),
    ]
    scores = [rng.lognormal(size=(layer.neurons // layer.group, 3)) * [1, 1e-3, 1e-6] for layer in layers]
    scores[0][[3, 7, 20]] = 0
    scores[2][:] = 1
    importance = Importance(
        names=tuple(layer.name for layer in layers),
        scores=tuple(scores),
        columns=("s1", "s2", "s3"),
        model=MODEL,
        settings={"samples": 8, "seed": seed},
    )
    return layers, importance


LAYERS, IMPORTANCE = network()


def make(**arguments: Any) -> Plan:
    everything: dict[str, Any] = {
        "devices": 4,
        "shared_weights": 20,
        "model": MODEL,
        "layers": LAYERS,
        "importance": IMPORTANCE,
    }
    everything.update(arguments)
    return partition(everything.pop("layers"), everything.pop("importance"), **everything)


def holders(plan: Plan, layer: int) -> list[frozenset[int]]:
    """The holders of every neuron of a layer."""
    of_neuron = {neuron: shard.devices for shard in plan.shards[layer] for neuron in shard.neurons}
    return [frozenset(of_neuron[neuron]) for neuron in range(len(of_neuron))]


@pytest.mark.parametrize("devices", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, math.inf])
def test_robustdice_holds_what_the_paper_says(devices: int, threshold: float) -> None:
    plan = make(devices=devices, threshold=threshold)
    for index, layer in enumerate(LAYERS):
        expected = distribute(cluster(normalise(IMPORTANCE.scores[index]), threshold), devices)
        assert holders(plan, index) == [expected[neuron // layer.group] for neuron in range(layer.neurons)]
    assert len(set(plan.bytes_per_device)) == 1  # the padding makes all devices equal


def test_threshold_zero_is_full_replication() -> None:
    plan, full = make(threshold=0), make(method="full", importance=None)
    assert plan.shards == full.shards
    assert full.bytes_per_device == (full.total_bytes,) * 4
    assert full.memory_share == full.healthy_compute_share == 1
    assert all(len(shards) == 1 and full.held_by_all(layer) for layer, shards in enumerate(full.shards))
    assert all(mask.all() for down in failure_sets(4, 3) for mask in full.surviving_neurons(down))


def test_one_threshold_per_layer() -> None:
    plan = make(threshold=[0.0, 0.1, math.inf, 0.2])
    assert plan.held_by_all(0)
    assert plan.settings["thresholds"] == [0.0, 0.1, "inf", 0.2]
    assert make(threshold=np.array([0.1] * 4)).shards == make(threshold=0.1).shards


def test_settings_say_how_the_plan_was_made(tmp_path: Path) -> None:
    plan = make(memory="12KB", columns=["s3", "s1"], normalisation="rank")
    threshold = plan.settings["thresholds"][0]
    assert plan.settings == {
        "columns": ["s3", "s1"],
        "normalisation": "rank",
        "memory": "12KB",
        "thresholds": [threshold] * 4,
    }
    origin = {"digest": IMPORTANCE.select(["s3", "s1"]).digest, "samples": 8, "seed": 0}
    assert plan.provenance["scores"] == origin
    assert set(plan.provenance["versions"]) == {"python", "robustdice", "numpy"}
    again = make(threshold=threshold, columns=["s3", "s1"], normalisation="rank")
    assert again.shards == plan.shards
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_everything_is_deterministic() -> None:
    assert make(memory=0.6).digest == make(memory=0.6).digest
    assert make().digest == make(memory=0.5).digest


@pytest.mark.parametrize("devices", range(2, 17))
def test_the_memory_that_is_named_as_needed_is_enough(devices: int) -> None:
    with pytest.raises(PlanError) as refused:
        make(devices=devices, memory="1B")
    share, size = re.findall(r"needs (\S+) of the model on each of them \((\S+) bytes\)", str(refused.value))[0]
    for memory in (share, f"{size.replace(',', '')}B"):
        assert make(devices=devices, memory=memory).devices == devices


@pytest.mark.parametrize("devices", range(2, 17))
def test_lop_slices_are_contiguous_and_even(devices: int) -> None:
    plan = make(devices=devices, method="lop", importance=None)
    surplus = np.zeros(devices, dtype=int)
    for layer, shards in zip(LAYERS, plan.shards, strict=True):
        units = np.zeros(devices, dtype=int)
        for shard in shards:
            assert len(shard.holders) == 1
            assert shard.neurons == tuple(range(shard.neurons[0], shard.neurons[-1] + 1))
            units[shard.devices[0]] = len(shard.neurons) // layer.group
        assert [shard.devices[0] for shard in shards] == sorted(shard.devices[0] for shard in shards)
        assert units.max() - units.min() <= 1
        surplus += units - units.sum() // devices
    assert surplus.max() - surplus.min() <= 1  # the larger slices go round
    assert [mask.sum() for mask in plan.surviving_neurons(range(devices))] == [0] * 4


def test_memory_falls_short() -> None:
    least = make(threshold=math.inf)
    assert make(memory=least.memory_share).memory_share == least.memory_share
    with pytest.raises(PlanError, match=r"needs 0\.\d{4} of the model .*use more devices"):
        make(memory=least.memory_share - 1e-6)
    with pytest.raises(PlanError, match=rf"\({least.bytes_per_device[0]:,} bytes\)"):
        make(memory="1KB")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 100), st.integers(2, 6), st.floats(0.2, 1), st.sampled_from(["minmax", "rank"]))
def test_memory_is_kept_and_used(seed: int, devices: int, share: float, how: str) -> None:
    layers, importance = network(seed)
    arguments: dict[str, Any] = {"devices": devices, "layers": layers, "importance": importance, "normalisation": how}
    least = make(threshold=math.inf, **arguments).memory_share
    if share < least:
        with pytest.raises(PlanError, match="allow so much memory"):
            make(memory=share, **arguments)
        return
    plan = make(memory=share, **arguments)
    assert least <= plan.memory_share <= share
    # No threshold of a fine grid is noticeably better.
    shares = (make(threshold=t, **arguments).memory_share for t in np.geomspace(1e-3, 1.8, 40))
    assert plan.memory_share >= max((s for s in shares if s <= share), default=0) - 0.03


def test_memory_for_everything_gives_everything() -> None:
    total = make(threshold=0).total_bytes
    for memory in (1, 1.0, "1", f"{total}B", "2GB"):
        plan = make(memory=memory)
        assert plan.settings["thresholds"] == [0.0] * 4
        assert plan.memory_share == 1
    assert make(memory=f"{total - 1} b").memory_share < 1


def test_few_clusterings_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*arguments: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        return cluster(*arguments)

    monkeypatch.setattr(budget_module, "cluster", counted)
    scores = [normalise(of_layer) for of_layer in IMPORTANCE.scores]
    total = 4 * sum(layer.neurons * layer.neuron_weights for layer in LAYERS)
    for budget in range(total // 3, total, total // 20):
        calls = 0
        solve_threshold(LAYERS, scores, 4, budget, 0, [Kinds()] * len(LAYERS))
        assert calls <= 40 * len(LAYERS)


def test_amounts_of_memory() -> None:
    assert parse_memory(0.5, 1000) == parse_memory("0.5", 1000) == parse_memory(".5", 1000) == 500
    assert parse_memory("500KB", 7) == parse_memory(" 0.5 mb ", 7) == 500_000
    assert parse_memory("1.5GB", 7) == 1_500_000_000
    assert parse_memory("80B", 7) == 80
    assert parse_memories("10B, 0.5", 100, 2) == (10, 50)
    assert parse_memories(0.5, 100, 3) == parse_memories("50B", 100, 3) == (50, 50, 50)
    for held in range(1, 1000):
        assert parse_memory(held / 999, 999) == held  # a plan's own share is always enough for it


@pytest.mark.parametrize(
    "memory", [0, -0.1, 1.01, 80, math.nan, math.inf, "", "MB", "80 TB", "0", "80", "-1MB", "1e", "nan", "0.5%"]
)
def test_refuses_what_is_no_memory(memory: float | str) -> None:
    with pytest.raises(PlanError, match=r"memory .* is not .*'80MB'"):
        parse_memory(memory, 1000)


def renamed(name: str) -> Importance:
    names = (*IMPORTANCE.names[:-1], name)
    return Importance(names, IMPORTANCE.scores, IMPORTANCE.columns, MODEL)


def shortened() -> Importance:
    scores = (IMPORTANCE.scores[0][1:], *IMPORTANCE.scores[1:])
    return Importance(IMPORTANCE.names, scores, IMPORTANCE.columns, MODEL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "unknown method 'best'; known: robustdice, lop, cdc, full"),
        ({"devices": 1}, "2 to 16 devices, not 1"),
        ({"devices": 17}, "2 to 16 devices, not 17"),
        ({"layers": []}, "no layer that can be partitioned"),
        ({"importance": None}, "needs importance scores"),
        ({"memory": 0.5, "threshold": 0.1}, "memory 0.5 and threshold 0.1 .*; give one"),
        ({"method": "lop", "memory": 0.5}, r"method lop takes no memory \(got 0.5\)"),
        ({"method": "full", "threshold": 0.0}, r"method full takes no threshold \(got 0.0\)"),
        ({"threshold": -0.1}, "0 or larger; got -0.1"),
        ({"threshold": math.nan}, "0 or larger; got nan"),
        ({"threshold": [0.1, 0.2]}, "2 thresholds for 4 layers"),
        ({"threshold": 0.1, "normalisation": "log"}, "unknown normalisation 'log'"),
        ({"threshold": 0.1, "columns": ["s4"]}, "no score 's4'"),
        ({"threshold": 0.1, "columns": []}, "one or more of s1, s2, s3"),
        ({"importance": renamed("fc2")}, "layer 3 is 'fc' in the model, 'fc2' in the scores"),
        ({"layers": LAYERS[:3]}, "3 layers in the model, 4 in the scores"),
        ({"importance": shortened()}, "layer conv1 has 48 units to deal out, the scores have 47"),
        ({"model": ModelReference("other.pt2", "cd" * 32)}, "digest abababababab, the model is other.pt2 with cdcdcd"),
    ],
)
def test_refuses_requests_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make(**arguments)


def test_layers_smaller_than_the_number_of_devices() -> None:
    layers = [Layer("tiny", neurons=2, group=1, neuron_weights=3, neuron_macs=4, neuron_outputs=1)]
    scores = Importance(("tiny",), (np.array([[0.0], [0.1]]),), ("s1",), MODEL)
    for method in METHODS:
        plan = make(layers=layers, importance=scores, devices=5, method=method, shared_weights=0)
        assert plan.surviving_neurons([])[0].all()
    assert [shard.devices for shard in make(layers=layers, method="lop").shards[0]] == [(0,), (1,)]


def test_needs_numpy_only() -> None:
    code = "import sys, robustdice.partitioning; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
