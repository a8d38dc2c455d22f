"""Real device processes on this machine: streams, kills, freezes, restarts, strangers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq

from bundles import INPUT_SHAPE, Floats, Network, make_plan, write_bundles, write_whole_bundles
from robustdice.errors import BundleError, ClusterError, DataError
from robustdice.runtime.answer import Answer
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.device import run_device
from robustdice.runtime.inprocess import InProcess
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.config import Cluster
from robustdice.runtime.wire.founding import write_cluster
from robustdice.runtime.wire.keys import read_secret
from robustdice.runtime.wire.line import set_options
from robustdice.runtime.wire.messages import Hello

FRAMES = np.random.default_rng(7).standard_normal((600, *INPUT_SHAPE)).astype(np.float32)


def build(directory: Path, devices: int, spares: str = "standby", holders: int = 2, **network: int) -> InProcess:
    plan = make_plan(devices, holders)
    bundles = write_bundles(directory, plan, Network(**network), spares)
    write_cluster(directory, devices, plan.digest)
    return InProcess(bundles)


@contextlib.contextmanager
def running(directory: Path, **settings: float) -> Iterator[LocalCluster]:
    """A cluster, after which no process and no file is left."""
    with LocalCluster(directory, **settings) as cluster:  # type: ignore[arg-type]
        processes = {pid for device in range(cluster.devices) if (pid := cluster.process(device)) is not None}
        yield cluster
        processes |= {pid for device in range(cluster.devices) if (pid := cluster.process(device)) is not None}
    assert not [pid for pid in processes if psutil.pid_exists(pid)]


def close(answer: Answer, expected: Floats) -> bool:
    return answer.outputs is not None and np.allclose(answer.outputs, expected, rtol=1e-4, atol=1e-5)


def until_whole(cluster: LocalCluster, seconds: float = 20.0) -> float:
    """Seconds until answers come from primaries alone, with nobody down."""
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        answer = cluster.infer(FRAMES[0])
        if answer.coverage == 1.0 and answer.from_spares == 0.0 and not answer.down:
            return time.monotonic() - start
        time.sleep(0.02)
    raise AssertionError(f"full coverage did not return; {cluster.log(0)}")


@pytest.mark.parametrize("spares", ["standby", "hot"])
def test_a_stream_through_kill_freeze_and_return(tmp_path: Path, spares: str) -> None:
    reference = build(tmp_path, 4, spares)
    whole = reference.run(FRAMES)
    with running(tmp_path, timeout_seconds=5.0) as cluster:
        for answer in cluster.client.stream(FRAMES[:100]):
            assert close(answer, whole[answer.number])
            assert answer.coverage == 1.0
            assert answer.probabilities is not None
            assert abs(float(answer.probabilities.sum()) - 1) < 1e-5
            assert answer.class_index == whole[answer.number].argmax()
        first = len(FRAMES[:100])

        answers = []
        for k, answer in enumerate(cluster.client.stream(FRAMES[:100])):  # two holders each: no shard is lost
            if k == 20:
                cluster.kill(1)
            assert close(answer, whole[k])
            assert answer.coverage == 1.0
            answers.append(answer)
        assert [answer.number for answer in answers] == list(range(first, first + 100))
        assert answers[-1].down == (1,)
        assert answers[-1].from_spares > 0

        cluster.restart(1)
        cluster.wait()
        until_whole(cluster)

        for k, answer in enumerate(cluster.client.stream(FRAMES[:100])):
            if k == 20:
                cluster.freeze(2)
            assert close(answer, whole[k])
            assert answer.coverage == 1.0
        assert answer.down == (2,)
        cluster.thaw(2)
        until_whole(cluster)
        assert [line for line in cluster.log(0).splitlines() if "device 2 is suspect" in line]

        for device in (0, 3):  # neighbours: the shards that only these two hold are lost
            cluster.kill(device)
        expected = reference.run(FRAMES[:20], {0, 3})
        answers = list(cluster.client.stream(FRAMES[:20]))
        assert all(close(answer, expected[k]) for k, answer in enumerate(answers[-10:], 10))
        assert answers[-1].coverage == 0.75
        assert answers[-1].down == (0, 3)


def test_one_survivor_equals_the_reference_and_nobody_left_is_said(tmp_path: Path) -> None:
    reference = build(tmp_path, 3)
    with running(tmp_path, timeout_seconds=1.0) as cluster:
        assert cluster.infer(FRAMES[0]).coverage == 1.0
        cluster.kill(0)
        cluster.kill(1)
        expected = reference.run(FRAMES[:5], {0, 1})
        answers = list(cluster.client.stream(FRAMES[:5]))
        assert close(answers[-1], expected[-1])
        assert answers[-1].device == 2
        assert answers[-1].coverage < 1.0
        cluster.kill(2)
        last = cluster.infer(FRAMES[0])
        assert last.probabilities is None
        assert last.refused is not None
        assert last.latency_seconds < 2.0


def test_wrong_frames_keys_and_bytes_do_no_harm(tmp_path: Path) -> None:
    build(tmp_path, 2)
    other = tmp_path / "other"
    other.mkdir()
    write_cluster(other, 2, "0" * 64)
    with running(tmp_path) as cluster:
        with pytest.raises(DataError, match=r"shape \(3, 8, 8\)"):
            cluster.infer(np.zeros((3, 8, 8), np.float32))
        with (
            Client(tmp_path / "cluster.toml", other / "client.key", timeout_seconds=1.0) as stranger,
            pytest.raises(ClusterError, match="refuses our key"),
        ):
            stranger.infer(FRAMES[0])

        address = cluster.cluster.devices[0].address.removeprefix("tcp://")
        host, port = address.split(":")
        random = np.random.default_rng(3)
        for size in (1, 64, 5000, 100_000):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 2) as raw:
                raw.sendall(random.bytes(size))
        context = zmq.Context()
        plain = context.socket(zmq.DEALER)
        plain.linger = 0
        plain.connect(f"tcp://{address}")
        plain.send_multipart([b"x", b"y" * 1000])
        mirror = context.socket(zmq.DEALER)  # somebody who speaks with the device's own key
        first, own = cluster.cluster.devices[0], read_secret(tmp_path / "device-0" / "secret.key")
        set_options(mirror, "curve", own, first.public_key.encode(), 10_000)
        mirror.connect(first.address)
        mirror.send_multipart(Codec(cluster.cluster.plan_digest).encode(Hello(0, "another", reply=True)))
        client = cluster.client  # an authenticated client that talks nonsense
        for parts in ([b""], [b"{}"], [random.bytes(100), random.bytes(1000)], [b"[" * 50_000]):
            assert client._lines[0].send(parts)
        answers = list(client.stream(FRAMES[:50]))
        assert all(answer.coverage == 1.0 and not answer.down for answer in answers)
        plain.close()
        mirror.close()
        context.term()
        assert client.status()[0]["dropped_messages"] == 4
        assert "its key is not listed" in cluster.log(0)


def test_what_keeps_a_device_from_starting_is_said(tmp_path: Path) -> None:
    build(tmp_path, 2)
    cluster = Cluster.read(tmp_path / "cluster.toml")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(cluster.devices[0].address.rsplit(":", 1)[1])))
        taken.listen()
        with pytest.raises(ClusterError, match=rf"cannot listen on {cluster.devices[0].address}: it is in use; stop"):
            run_device(tmp_path / "device-0")
        with pytest.raises(ClusterError, match=r"device 0 could not start: .*it is in use"), LocalCluster(tmp_path):
            pass
    Cluster("0" * 64, cluster.devices, cluster.clients).write(tmp_path / "cluster.toml")
    with pytest.raises(BundleError, match="the cluster runs plan 000000000000"):
        run_device(tmp_path / "device-0")
    cluster.write(tmp_path / "cluster.toml")
    secret = (tmp_path / "device-1" / "secret.key").read_text()
    assert (tmp_path / "device-1" / "secret.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "device-0" / "secret.key").write_text(secret)
    with pytest.raises(ClusterError, match="does not belong to its public key"):
        run_device(tmp_path / "device-0")
    (tmp_path / "device-0" / "secret.key").write_text("no key")
    with pytest.raises(ClusterError, match="is not a secret key"):
        run_device(tmp_path / "device-0")
    (tmp_path / "cluster.toml").write_text("x = ")
    with pytest.raises(ClusterError, match="is not TOML"):
        run_device(tmp_path / "device-0")
    (tmp_path / "cluster.toml").unlink()
    with pytest.raises(ClusterError, match="--cluster"):
        run_device(tmp_path / "device-0")


def test_no_device_at_all_is_an_error(tmp_path: Path) -> None:
    build(tmp_path, 2)
    with Client(tmp_path / "cluster.toml", timeout_seconds=0.2) as client, pytest.raises(ClusterError, match="reached"):
        client.infer(FRAMES[0])


def test_without_exchange_frames_go_to_one_device_each(tmp_path: Path) -> None:
    network = Network()
    reference = InProcess(write_whole_bundles(tmp_path, network, 3))
    write_cluster(tmp_path, 3, "f" * 64)
    whole = reference.run(FRAMES[:300])
    with running(tmp_path, timeout_seconds=5.0) as cluster:
        used = set()
        for k, answer in enumerate(cluster.client.stream(FRAMES[:300])):
            if k == 50:
                cluster.kill(0)
            if k == 150:
                cluster.freeze(1)
            assert close(answer, whole[k]), f"frame {k}: {answer.refused}"
            assert answer.coverage == 1.0
            used.add((k // 50, answer.device))
        assert {(0, 0), (0, 1), (0, 2)} <= used
        assert {device for part, device in used if part == 5} == {2}
        cluster.thaw(1)
        cluster.restart(0)
        cluster.wait()
        assert {answer.device for answer in cluster.client.stream(FRAMES[:60])} == {0, 1, 2}


def test_without_exchange_hot_spares_compute_every_frame_too(tmp_path: Path) -> None:
    reference = InProcess(write_whole_bundles(tmp_path, Network(), 2, "hot"))
    write_cluster(tmp_path, 2, "f" * 64)
    whole = reference.run(FRAMES[:60])
    with running(tmp_path, timeout_seconds=5.0) as cluster:
        assert not cluster.client.model.in_turn
        assert all(close(cluster.infer(FRAMES[k]), whole[k]) for k in range(20))
        answered = [said["answered"] for said in cluster.client.status().values()]
        assert sum(answered) > 20  # in turn each would have had half of them
        cluster.freeze(0)
        slowest = max(answer.latency_seconds for answer in cluster.client.stream(FRAMES[20:60]) if answer.device == 1)
        assert slowest < 0.5  # the other one computes it anyway: nobody is waited for


def test_devices_end_with_whoever_started_them_frozen_ones_too(tmp_path: Path) -> None:
    build(tmp_path, 2)
    script = (
        "import sys, time\n"
        "from robustdice.runtime.cluster import LocalCluster\n"
        f"with LocalCluster({str(tmp_path)!r}) as cluster:\n"
        "    cluster.freeze(1)\n"
        "    print(cluster.process(0), cluster.process(1), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    children: list[int] = []
    try:
        assert parent.stdout is not None
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
        end = time.monotonic() + 10
        while any(map(alive, children)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not [child for child in children if alive(child)]
    finally:
        parent.kill()
        parent.communicate()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_device_stops_when_it_is_asked_to(tmp_path: Path) -> None:
    build(tmp_path, 2, holders=1)
    stop = threading.Event()
    thread = threading.Thread(target=run_device, args=(tmp_path / "device-0",), kwargs={"stop": stop})
    thread.start()
    try:
        with Client(tmp_path / "cluster.toml") as client:
            end = time.monotonic() + 20
            while not (status := client.status(0.5)) and time.monotonic() < end:
                pass
            assert status[0]["up"] == [0]
            assert 0 < client.infer(FRAMES[0]).coverage < 1
    finally:
        stop.set()
        thread.join()


def test_a_client_that_is_not_closed_is_cleaned_up(tmp_path: Path) -> None:
    build(tmp_path, 2)
    script = f"from robustdice.runtime.client import Client; c = Client({str(tmp_path / 'cluster.toml')!r})"
    for rest in ("", "; del c"):
        found = subprocess.run(
            [sys.executable, "-W", "error", "-c", script + rest],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (found.returncode, found.stderr) == (0, "")


def test_the_device_side_does_not_need_torch() -> None:
    script = "import robustdice.runtime.device, robustdice.runtime.client, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_frame_outlives_the_devices_that_were_asked_first(tmp_path: Path) -> None:
    reference = build(tmp_path, 2)
    with running(tmp_path, timeout_seconds=10.0) as cluster:
        cluster.infer(FRAMES[0])
        cluster.kill(0)
        cluster.freeze(1)

        def replace() -> None:
            cluster.kill(1)
            cluster.restart(0)

        for back in (replace, lambda: cluster.restart(1)):  # the one that was asked is dead, then only frozen
            timer = threading.Timer(0.2, back)
            timer.start()
            answer = cluster.infer(FRAMES[1])
            timer.join()
            there = 0 if back is replace else 1
            assert close(answer, reference.run(FRAMES[1:2], {1 - there})[0])
            assert answer.device == there
            cluster.freeze(there)
