"""Real device processes: one has an address that only it and the client know, so it can send, and hears nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from processes import device
from robustdice.runtime.client import Client
from robustdice.runtime.inprocess import InProcess
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster
from robustdice.runtime.wire.founding import write_cluster

FRAMES = np.random.default_rng(7).standard_normal((40, *INPUT_SHAPE)).astype(np.float32)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_answers_claim_only_what_they_were_computed_from_when_a_device_can_send_and_hears_nothing(
    tmp_path: Path,
) -> None:
    plan = make_plan(4)
    reference = InProcess(write_bundles(tmp_path, plan, Network()))
    whole = reference.run(FRAMES)
    write_cluster(tmp_path, 4, plan.digest)
    old, new = tmp_path / CLUSTER_NAME, tmp_path / "moved.toml"
    cluster = Cluster.read(old)
    moved = replace(cluster.devices[3], address=f"tcp://127.0.0.1:{free_port()}")
    new.write_text(old.read_text("utf-8").replace(cluster.devices[3].address, moved.address), "utf-8")
    with contextlib.ExitStack() as running:
        for number in range(4):
            running.enter_context(device(tmp_path, number, cluster=new if number == 3 else old, log=f"log-{number}"))
        client = running.enter_context(Client(new, timeout_seconds=5.0))
        end = time.monotonic() + 20.0
        while len(client.status(0.5)) < 4:
            assert time.monotonic() < end
        others, in_full = [], 0
        while time.monotonic() < end:
            answers = list(client.stream(FRAMES))
            full = [answer for answer in answers if answer.coverage == 1.0]
            in_full += len(full)
            for answer in full:
                assert answer.outputs is not None
                assert np.allclose(answer.outputs, whole[answer.number % len(FRAMES)], rtol=1e-4, atol=1e-5)
            status = client.status(0.5)
            others = [[who["device"] for who in status[k]["one_way"]] for k in range(4)]
            if others == [[3], [3], [3], [0, 1, 2]]:
                break
        assert in_full, "the others have everything between them"
        assert others == [[3], [3], [3], [0, 1, 2]]
        assert [status[k]["up"] for k in range(4)] == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [3]]
    for number in range(4):
        assert "one way only" in (tmp_path / f"log-{number}").read_text("utf-8")
