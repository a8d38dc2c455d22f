"""Several calls of one client at once, calls that are broken off, clusters that do not come up: on real processes."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundles import INPUT_SHAPE
from robustdice.errors import ClusterError, OutputError
from robustdice.meter import throughput
from robustdice.report.cluster_tables import answers_table
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.protocol.events import Settings
from test_runtime_processes import build, running

FRAMES = np.random.default_rng(3).standard_normal((24, *INPUT_SHAPE)).astype(np.float32)


def test_streams_of_one_client_give_all_answers_though_they_share_its_room(tmp_path: Path) -> None:
    build(tmp_path, 2)
    with running(tmp_path, timeout_seconds=10.0) as cluster:
        both = list(zip(cluster.client.stream(FRAMES), cluster.client.stream(FRAMES), strict=True))
        assert len(both) == len(FRAMES)
        for one, other in both:
            np.testing.assert_array_equal(one.outputs, other.outputs)
        assert len(list(cluster.client.stream(FRAMES[:3]))) == 3


def test_a_call_that_is_broken_off_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, 2)
    with running(tmp_path, timeout_seconds=10.0) as cluster:
        client = cluster.client
        assert client.infer(FRAMES[0]).coverage == 1.0
        with monkeypatch.context() as patch:
            patch.setattr(client, "_pump", interrupted)
            for _ in range(2 * client.window):
                with pytest.raises(KeyboardInterrupt):
                    client.infer(FRAMES[0])
        assert [answer.coverage for answer in client.stream(FRAMES[:3])] == [1.0] * 3


def interrupted(_: float) -> None:
    raise KeyboardInterrupt


def test_no_more_frames_are_sent_at_once_than_devices_work_on(tmp_path: Path) -> None:
    build(tmp_path, 2)
    with running(tmp_path, timeout_seconds=10.0, window=4 * Settings.window) as cluster:
        answers = list(cluster.client.stream(np.concatenate([FRAMES] * 5)))
        assert [(answer.refused, answer.coverage) for answer in answers] == [(None, 1.0)] * len(answers)


def test_what_devices_serve_is_asked_for_until_the_time_is_up(tmp_path: Path) -> None:
    build(tmp_path, 2)
    with running(tmp_path) as cluster, Client(tmp_path / "cluster.toml", timeout_seconds=20.0) as client:
        for device in range(2):
            cluster.freeze(device)
        later = threading.Timer(1.0, cluster.thaw, [1])
        later.start()
        try:
            assert client.model.input_shape == INPUT_SHAPE
        finally:
            later.join()
            cluster.thaw(0)


@pytest.mark.parametrize("killed", [[1], [0, 1]])
def test_a_device_that_is_killed_while_it_starts_is_an_error(
    tmp_path: Path, killed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, 2)
    start = LocalCluster._start

    def start_and_kill(self: LocalCluster, device: int) -> None:
        start(self, device)
        if device in killed:
            self._processes[device].send_signal(signal.SIGKILL)
            self._processes[device].wait()

    monkeypatch.setattr(LocalCluster, "_start", start_and_kill)
    with pytest.raises(ClusterError, match=f"device {killed[0]} was killed while it started"), LocalCluster(tmp_path):
        pass


def test_a_whole_model_that_cannot_run_is_an_error_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ClusterError, match="could not be computed in one process"):
        throughput.measure_whole(tmp_path / "model.onnx", INPUT_SHAPE, 0.1, [0])


def test_a_whole_model_that_finds_no_room_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, 2)
    monkeypatch.setattr(throughput, "_whole_model", lambda *_: (b"model", None))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device; say where there is room with TMPDIR"):
        throughput.bench_build(tmp_path, seconds=0.1, rounds=1, window=1)


@pytest.mark.parametrize(
    ("paths", "caption"),
    [(["a/x.png", "/b/y.png"], None), (["a/x.png", "a/y.png"], "a"), (["/b/x.png", "/b/y.png"], "/b")],
)
def test_answers_about_images_anywhere_are_shown(paths: list[str], caption: str | None) -> None:
    answer: dict[str, Any] = {"class_index": None, "probability": None, "down": None, "latency_ms": 1.0}
    sheet = answers_table([{**answer, "path": path} for path in paths])
    assert sheet.caption == (None if caption is None else f"Images in {caption}")


def test_a_call_gives_up_at_devices_that_say_nothing(tmp_path: Path) -> None:
    build(tmp_path, 2)
    with running(tmp_path) as cluster, Client(tmp_path / "cluster.toml", timeout_seconds=1.0) as client:
        for device in range(2):
            cluster.freeze(device)
        start = time.monotonic()
        with pytest.raises(ClusterError):
            _ = client.model
        assert time.monotonic() - start >= 1.0
