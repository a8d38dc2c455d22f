"""Real devices behind a real slow link: CIFAR AlexNet on four of them, and 20 Mbit/s that all of them share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from builds import Builds

from links import shared_link
from processes import client_elsewhere, device
from robustdice.meter.netns import one_switch, permitted
from robustdice.runtime.wire.config import CLUSTER_NAME

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "alexnet_cifar10.pt2"
FRAMES = 60
STREAM = """
import json, sys
import numpy as np
from robustdice.runtime.cluster import LocalCluster
with LocalCluster(sys.argv[1], window=4) as cluster:
    images = np.random.default_rng(0).standard_normal((8, *cluster.client.model.input_shape)).astype(np.float32)
    answers = list(cluster.client.stream(images[k % 8] for k in range(int(sys.argv[2]))))
    logs = "".join(cluster.log(device) for device in range(4))
print(json.dumps({"coverage": [a.coverage for a in answers], "suspicions": logs.count("is suspect")}))
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := permitted():
        pytest.skip(reason)
    if not MODEL.exists():
        pytest.skip(f"{MODEL} is not here")
    folder = tmp_path_factory.mktemp("shaped")
    robustdice = [sys.executable, "-m", "robustdice"]
    plan, build = folder / "plan.json", folder / "build"
    subprocess.run([*robustdice, "plan", MODEL, "--devices", "4", "--method", "lop", "-o", plan], check=True)
    subprocess.run([*robustdice, "build", plan, "-o", build], check=True)
    return build


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("queue_ms", [20.0, 200.0])
def test_behind_a_shared_link_of_20_megabits_every_frame_is_answered(build: Path, queue_ms: float) -> None:
    with shared_link(20, queue_ms) as prefix:
        command = [*prefix, sys.executable, "-c", STREAM, str(build), str(FRAMES)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout)
    assert min(found["coverage"]) > 0.0, "a frame was not answered in time"
    assert sum(found["coverage"]) / FRAMES > 0.9  # 0.4 when devices suspect each other in turn
    assert found["suspicions"] <= 2  # of the first moments, before anything was learnt


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_behind_a_switch_of_100_megabits_neither_a_crash_nor_a_freeze_costs_a_frame(tmp_path: Path) -> None:
    if reason := permitted():
        pytest.skip(reason)
    if not MODEL.exists():
        pytest.skip(f"{MODEL} is not here")
    with one_switch(5) as switch, contextlib.ExitStack() as running:
        hosts = tuple(switch.address(number) for number in range(4))
        build = Builds(tmp_path).build(str(MODEL), "neurons", 4, memory=0.5, hosts=hosts)
        switch.limit(range(5), 100)
        processes = [running.enter_context(device(build, k, *switch.prefix(k), log=f"log-{k}")) for k in range(4)]
        stream = running.enter_context(client_elsewhere(switch.prefix(4), build / CLUSTER_NAME))
        everyone = [[0, 1, 2, 3]] * 4
        assert stream(everyone)["settled"]
        assert stream(everyone) | {"most_ms": 0} == {"coverage": 1.0, "down": [], "most_ms": 0, "settled": True}
        for number, fault in ((3, signal.SIGSTOP), (2, signal.SIGKILL)):
            timer = threading.Timer(0.3, os.kill, [processes[number], fault])
            timer.start()
            left = [device for device in range(4) if device != number]
            failing = stream([left] * 3)
            timer.join()
            assert failing["settled"], failing
            assert failing["coverage"] > 0.5, "what the others have of a plan with half of the model on each"
            assert stream([left] * 3)["down"] == [number]
            if fault == signal.SIGSTOP:
                os.kill(processes[number], signal.SIGCONT)
                assert stream(everyone)["settled"]


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout  # noqa: S607
    return {line.split()[0] for line in listed.splitlines()}


def test_namespaces_that_a_killed_process_has_left_are_removed_by_the_next_one() -> None:
    if reason := permitted():
        pytest.skip(reason)
    dies = "import os\nfrom robustdice.meter.netns import one_switch\nwith one_switch(2): os.kill(os.getpid(), 9)"
    process = subprocess.Popen([sys.executable, "-c", dies])
    assert process.wait() == -signal.SIGKILL
    left = {name for name in namespaces() if f"-{process.pid}-" in name}
    assert len(left) == 3
    with one_switch(1) as where:
        assert not left & namespaces()
        assert {where.hub, *where.members} <= namespaces()
    assert not {where.hub, *where.members} & namespaces()
