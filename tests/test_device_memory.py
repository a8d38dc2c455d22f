"""What is resident on a device follows the bytes of its weights, and its status says so."""

import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from nets import Plain, network_of, random_coarse, random_images, random_plan, relative_error, seeded, shared_network
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.meter.throughput import DeviceFigures, bench_running
from robustdice.model.network import Network
from robustdice.partitioning import partition
from robustdice.plan import Holder, Plan
from robustdice.report import cluster_tables
from robustdice.report.tables import process_bytes
from robustdice.representation import Correction
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.executor import Executor
from robustdice.runtime.protocol.events import Forget, RunStage
from robustdice.runtime.wire.messages import FrameId
from robustdice.runtime.worker import Worker
from robustdice.workshop import build
from test_coarse_bundles import predicted


@pytest.fixture(scope="module")
def wide() -> Network:
    """8.4 million weights, nearly all in two linear layers: [2, 4, 4] -> 8."""
    return network_of(
        seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 2048), nn.Linear(2048, 4096), nn.Linear(4096, 8))),
        2,
        4,
        4,
    )


def whole(network: Network, kind: str) -> Plan:
    """Everything on both devices, in one representation."""
    plan = partition(
        network.plan_layers,
        None,
        devices=2,
        method="full",
        shared_weights=network.shared_weights,
        model=network.reference,
    )
    shards = tuple(
        tuple(replace(shard, holders=tuple(Holder(device, kind) for device in shard.devices)) for shard in of_layer)
        for of_layer in plan.shards
    )
    kept = [] if kind == "float32" else network.layers
    return replace(plan, shards=shards, coarse={(k, kind): random_coarse(layer, kind) for k, layer in enumerate(kept)})


LOADED = """
import sys
from robustdice.bundle.read import load_bundle
from robustdice.runtime.executor import Executor
from robustdice.runtime.memory import rss_bytes
before = rss_bytes()
executor = Executor(load_bundle(sys.argv[1]))
print(rss_bytes() - before)
"""
"""What a bundle adds to an empty process."""


def test_what_loading_took_is_given_back(tmp_path: Path) -> None:
    layers = [nn.Conv2d(2, 192, 3, padding=1), *(nn.Conv2d(192, 192, 3, padding=1) for _ in range(10))]
    network = network_of(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 2, 4, 4)
    plan = whole(network, "float32")
    bundle, _ = write_bundles(network, plan, tmp_path / "build")
    done = subprocess.run([sys.executable, "-c", LOADED, str(bundle)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.3 * plan.bytes_per_device[0] + 15e6, done.stdout  # ONNX Runtime's own


def test_weights_of_linear_layers_are_used_where_they_lie(wide: Network, tmp_path: Path) -> None:
    """Packed for products of matrices, they are twice in memory at first, and every frame takes longer."""
    plan = partition(
        wide.plan_layers, None, devices=2, method="lop", shared_weights=wide.shared_weights, model=wide.reference
    )
    bundle, _ = write_bundles(wide, plan, tmp_path / "build")
    peak = LOADED.replace("rss_bytes", "peak_rss_bytes")
    done = subprocess.run([sys.executable, "-c", peak, str(bundle)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < plan.bytes_per_device[0], done.stdout  # ONNX Runtime itself takes 10 MB


RUN = (
    LOADED
    + """
import numpy as np
values = {executor.manifest.input: np.ones((1, *executor.manifest.input_shape), np.float32)}
for number, stage in enumerate(executor.manifest.stages):
    values = executor.run_local(number, values)
    for piece in range(len(stage.pieces)):
        executor.run_piece(number, piece, values)
    values = executor.keep(number, values)
    for exchange in (executor.manifest.exchanges[position] for position in stage.exchanges):
        values[exchange.value] = np.ones((1, *exchange.shape), np.float32)
print(rss_bytes() - before)
"""
)


def test_stages_compute_in_the_same_memory(tmp_path: Path) -> None:
    layers = [nn.Conv2d(2, 16, 3, padding=1), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(11))]
    network = network_of(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 2, 192, 192)
    plan = partition(
        network.plan_layers,
        None,
        devices=2,
        method="lop",
        shared_weights=network.shared_weights,
        model=network.reference,
    )
    bundle, _ = write_bundles(network, plan, tmp_path / "build")
    done = subprocess.run([sys.executable, "-c", RUN, str(bundle)], capture_output=True, text=True, check=True)
    loaded, ran = map(int, done.stdout.split())
    map_bytes = 4 * 16 * 192 * 192
    assert ran - loaded < 12 * map_bytes, done.stdout  # 2.4 MB each, of which every layer needs two or three


def test_a_frame_keeps_what_a_stage_has_read_only_while_a_piece_of_it_may_be_asked_for(tmp_path: Path) -> None:
    network = shared_network(Plain, 1, 8, 8)
    sliced = partition(
        network.plan_layers,
        None,
        devices=3,
        method="lop",
        shared_weights=network.shared_weights,
        model=network.reference,
    )
    for name, plan, spares in (("sliced", sliced, False), ("spares", random_plan(network, 3, 1), True)):
        bundle, *_ = write_bundles(network, plan, tmp_path / name)
        executor = Executor(load_bundle(bundle))
        assert (len(executor.manifest.stages[0].pieces) > 1) == spares
        worker, frame = Worker(executor, lambda: None), FrameId("c", 1)
        worker.start()
        try:
            array = random_images(1, network.input_shape)
            read = weakref.ref(array)
            worker.give(RunStage(frame, 0, array, (), (0,), frozenset()))
            del array
            while (done := worker.result()) is None:
                time.sleep(0.001)
            assert done.error is None
            del done
            assert (read() is not None) == spares
            worker.give(Forget(frame))
            worker.give(RunStage(frame, 0, random_images(1, network.input_shape), (), (), frozenset()))
            while worker.result() is None:
                time.sleep(0.001)
            assert read() is None
        finally:
            worker.stop()


def test_resident_memory_follows_the_bytes(wide: Network, tmp_path: Path) -> None:
    figures: dict[str, DeviceFigures] = {}
    for kind in ("float32", "int3"):
        plan = whole(wide, kind)
        with LocalCluster(build(wide, plan, tmp_path / kind), timeout_seconds=30.0) as cluster:
            image = random_images(1, wide.input_shape)
            answers = list(cluster.client.stream(image[0] for _ in range(8)))
            assert {answer.device for answer in answers} == {0, 1}  # each frame is computed by one of them
            for answer in answers:
                assert answer.outputs is not None
                assert relative_error(answer.outputs[None], predicted(wide, plan, image, frozenset())) < 1e-4
            (figures[kind],) = bench_running(tmp_path / kind, seconds=0.1, rounds=1, window=1).devices[:1]
        assert figures[kind].weights_bytes == plan.bytes_per_device[0]
        least, most = process_bytes(plan.bytes_per_device[0])  # as 'plan' and 'build' say
        assert 0.9 * least < figures[kind].peak_rss_bytes < 1.15 * most, (kind, figures[kind])
    taken = {kind: device.rss_bytes - device.empty_rss_bytes for kind, device in figures.items()}
    saved = figures["float32"].weights_bytes - figures["int3"].weights_bytes
    assert taken["float32"] - taken["int3"] > 0.75 * saved  # what is unpacked at a time costs a few megabytes
    assert figures["float32"].peak_rss_bytes - figures["int3"].peak_rss_bytes > 0.75 * saved


def test_status_says_whose_corrections_are_applied(tmp_path: Path) -> None:
    network = shared_network(Plain, 1, 8, 8)
    plan = random_plan(network, 3, 1)
    fixed = tuple(
        Correction.of(np.ones(layer.neurons, np.float16), np.zeros(layer.neurons, np.float16)) for layer in plan.layers
    )
    larger = replace(plan, corrections={frozenset({1, 2}): fixed, frozenset({0, 1}): fixed})
    with LocalCluster(build(network, larger, tmp_path / "larger"), timeout_seconds=30.0) as cluster:
        names = [device.name for device in cluster.cluster.devices]
        cluster.kill(1)
        cluster.client.infer(random_images(1, network.input_shape)[0])
        found = cluster.client.status()
        assert "no corrections" not in (cluster_tables.status_table(names, found, {}).caption or "")
    plan = replace(plan, corrections={frozenset({1}): fixed})
    with LocalCluster(build(network, plan, tmp_path / "build"), timeout_seconds=30.0) as cluster:
        names = [device.name for device in cluster.cluster.devices]
        for victim, expected in ((1, [1]), (0, [1])):
            cluster.kill(victim)
            cluster.client.infer(random_images(1, network.input_shape)[0])
            found = cluster.client.status()
            assert found[2]["corrected_for"] == expected
            said = cluster_tables.status_table(names, found, {}).caption or ""
            note = f"{names[2]} has no corrections for 0,1 down: those for 1 are applied."
            assert (note in said) == (victim == 0)
