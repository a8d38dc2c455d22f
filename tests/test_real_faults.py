"""Real device processes, and what may happen to them: floods, clients that do not read, strangers, full disks, clocks,
cut links."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from soak import soak

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from robustdice.meter.netns import one_switch, permitted
from robustdice.plan import Certificate, Plan, failure_sets
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.inprocess import InProcess
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster
from robustdice.runtime.wire.founding import write_cluster

FRAMES = np.random.default_rng(7).standard_normal((200, *INPUT_SHAPE)).astype(np.float32)
A_YEAR = "31536000"


def build(directory: Path, devices: int) -> InProcess:
    failed = [down for size in range(devices) for down in failure_sets(devices, size)]
    certificate = Certificate("data", "0", 100, 1.0, {down: 1 - len(down) / devices for down in failed})
    plan: Plan = replace(make_plan(devices), certificate=certificate)
    bundles = write_bundles(directory, plan, Network())
    write_cluster(directory, devices, plan.digest)
    return InProcess(bundles)


@contextlib.contextmanager
def device(directory: Path, number: int, *prefix: str, cluster: Path | None = None, log: str = "log") -> Iterator[None]:
    """A device process, started by the words of ``prefix``."""
    command = [*prefix, sys.executable, "-m", "robustdice.runtime.device", str(directory / f"device-{number}")]
    command += ["--cluster", str(cluster or directory / CLUSTER_NAME), "--watch-stdin"]
    with (directory / log).open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=output)
        try:
            yield
        finally:
            process.terminate()
            process.communicate(timeout=10)


def until_up(client: Client, devices: list[int], by: int = 0) -> None:
    """Until device ``by`` sees these."""
    end = time.monotonic() + 60.0
    while client.status(0.5).get(by, {}).get("up") != devices:
        assert time.monotonic() < end, f"devices {devices} do not see each other"


def whole_and_right(client: Client, reference: InProcess, frames: int = 60) -> bool:
    """Every answer has full coverage, and is what the bundles give."""
    expected = reference.run(FRAMES[:frames])
    answers = list(client.stream(FRAMES[:frames]))
    return all(
        answer.outputs is not None and answer.coverage == 1.0 and np.allclose(answer.outputs, value, 1e-4, 1e-5)
        for answer, value in zip(answers, expected, strict=True)
    )


def test_a_flood_of_bytes_and_a_client_that_does_not_read_harm_nobody(tmp_path: Path) -> None:
    reference, over = build(tmp_path, 2), threading.Event()
    bytes_ = np.random.default_rng(1).bytes(1 << 16)

    def flood(address: str) -> None:
        host, port = address.removeprefix("tcp://").split(":")
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1) as raw:
                raw.settimeout(1)
                raw.sendall(bytes_)

    with LocalCluster(tmp_path, timeout_seconds=5.0) as cluster, Client(tmp_path / CLUSTER_NAME) as deaf:
        threads = [threading.Thread(target=flood, args=[entry.address]) for entry in cluster.cluster.devices]
        for thread in threads:
            thread.start()
        try:
            assert deaf.model.exchanges
            for _ in range(5):
                for k in range(4):  # with the other's four as many as devices work on at once: they share that window
                    deaf._submit(FRAMES[k])  # and nothing that comes back is read
                assert whole_and_right(cluster.client, reference, 12)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert [status["up"] for status in cluster.client.status().values()] == [[0, 1], [0, 1]]


def test_a_device_with_another_key_takes_no_part_and_the_others_answer(tmp_path: Path) -> None:
    reference = build(tmp_path, 2)
    ours, elsewhere = Cluster.read(tmp_path / CLUSTER_NAME), tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_bundles(elsewhere, make_plan(2), Network())
    write_cluster(elsewhere, 2, ours.plan_digest)
    theirs = (elsewhere / CLUSTER_NAME).read_text("utf-8")
    for mine, other in zip(ours.devices, Cluster.read(elsewhere / CLUSTER_NAME).devices, strict=True):
        theirs = theirs.replace(other.address, mine.address)
    (elsewhere / CLUSTER_NAME).write_text(theirs, "utf-8")
    with device(tmp_path, 0), device(elsewhere, 1), Client(tmp_path / CLUSTER_NAME, timeout_seconds=2.0) as client:
        until_up(client, [0])
        end = time.monotonic() + 30
        while "another key" not in (tmp_path / "log").read_text("utf-8"):
            assert time.monotonic() < end
            time.sleep(0.05)
        answers = list(client.stream(FRAMES[:20]))
        assert all(answer.down == (1,) and answer.outputs is not None for answer in answers)
        expected = reference.run(FRAMES[:20], {1})
        assert all(np.allclose(a.outputs, e, 1e-4, 1e-5) for a, e in zip(answers, expected, strict=True))  # type: ignore[arg-type]


def test_a_device_whose_log_is_on_a_full_disk_serves(tmp_path: Path) -> None:
    reference = build(tmp_path, 2)
    (tmp_path / "full").symlink_to("/dev/full")
    with device(tmp_path, 0, log="full"), device(tmp_path, 1), Client(tmp_path / CLUSTER_NAME) as client:
        until_up(client, [0, 1])
        assert whole_and_right(client, reference)


def test_devices_whose_clocks_are_a_year_apart_work_together(tmp_path: Path) -> None:
    prefix = ["unshare", "--time", "--monotonic", A_YEAR, "--boottime", A_YEAR]
    found = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"clocks of their own are not permitted: {found.stderr.strip()}")
    reference = build(tmp_path, 2)
    with (
        device(tmp_path, 0),
        device(tmp_path, 1, *prefix),
        Client(tmp_path / CLUSTER_NAME, timeout_seconds=5.0) as client,
    ):
        until_up(client, [0, 1])
        assert whole_and_right(client, reference)
        assert not [line for line in (tmp_path / "log").read_text("utf-8").splitlines() if "is suspect" in line]


CUT_STREAM = """
import json, sys, time
import numpy as np
from robustdice.runtime.client import Client
client = Client(sys.argv[1], timeout_seconds=3.0)
frame = np.zeros((1, 8, 8), np.float32)
def settled(up, seconds=30):
    end = time.monotonic() + seconds
    while [s["up"] for _, s in sorted(client.status(0.5).items())] != up:
        if time.monotonic() > end: return False
    return True
for line in sys.stdin:
    answers = [client.infer(frame) for _ in range(30)]
    print(json.dumps({
        "coverage": min(a.coverage for a in answers), "down": sorted({d for a in answers[-5:] for d in a.down}),
        "most_ms": max(a.latency_seconds for a in answers) * 1e3, "settled": settled(json.loads(line)),
    }), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("one_way", [False, True])
def test_a_cut_link_costs_no_answer_and_the_device_is_back_when_it_is_whole(tmp_path: Path, one_way: bool) -> None:
    if reason := permitted():
        pytest.skip(reason)
    build(tmp_path, 3)
    with one_switch(4) as switch, contextlib.ExitStack() as running:
        text = (tmp_path / CLUSTER_NAME).read_text("utf-8")
        for number, entry in enumerate(Cluster.read(tmp_path / CLUSTER_NAME).devices):
            text = text.replace(entry.address, f"tcp://{switch.address(number)}:7000")
        (tmp_path / CLUSTER_NAME).write_text(text, "utf-8")
        for number in range(3):
            running.enter_context(device(tmp_path, number, *switch.prefix(number), log=f"log-{number}"))
        command = [*switch.prefix(3), sys.executable, "-c", CUT_STREAM, str(tmp_path / CLUSTER_NAME)]
        environment = {**os.environ}
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        running.callback(client.communicate)

        def stream(up: list[list[int]]) -> dict[str, object]:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(json.dumps(up) + "\n")
            client.stdin.flush()
            found: dict[str, object] = json.loads(client.stdout.readline())
            return found

        assert stream([[0, 1, 2]] * 3)["settled"]
        assert stream([[0, 1, 2]] * 3)["coverage"] == 1.0
        for peer in (0, 1):
            switch.cut(2, peer)  # what device 2 sends does not leave it
            if not one_way:
                switch.cut(peer, 2)
        cut = stream([[0, 1], [0, 1], [2]])
        assert cut["coverage"] == 1.0, "two holders each: the other two have everything"
        assert cut["settled"], cut
        after = stream([[0, 1], [0, 1], [2]])
        assert (after["coverage"], after["down"]) == (1.0, [2])
        for peer in (0, 1):
            switch.heal(2, peer)
            switch.heal(peer, 2)
        assert stream([[0, 1, 2]] * 3)["settled"], "it is not back"
        assert stream([[0, 1, 2]] * 3) | {"most_ms": 0} == {"coverage": 1.0, "down": [], "most_ms": 0, "settled": True}


@pytest.mark.slow
def test_under_kills_freezes_and_restarts_every_frame_is_answered_and_right(tmp_path: Path) -> None:
    build(tmp_path, 4)
    result = soak(tmp_path, seconds=20.0, seed=3)
    assert result.holds, result
    assert sum(result.faults.values()) >= 5
    assert result.compared > result.frames / 2
    assert result.device_rss_bytes[1] < 1.2 * result.device_rss_bytes[0]
