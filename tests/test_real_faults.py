"""Real device processes, and what may happen to them: floods, clients that do not read, strangers, full disks, clocks,
cut links."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq
from expected import expect, load_expected
from soak import Tally, growth_of, problems_of, soak

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from links import cut_link, heal_link
from processes import client_elsewhere, device, until_up, whole_and_right
from robustdice.meter.netns import one_switch, permitted
from robustdice.plan import Certificate, Plan, failure_sets
from robustdice.runtime.answer import Answer
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.inprocess import InProcess
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster
from robustdice.runtime.wire.founding import write_cluster
from robustdice.runtime.wire.keys import CLIENT_KEY_NAME, read_secret
from robustdice.runtime.wire.line import set_options
from robustdice.runtime.wire.messages import StatusRequest

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
def deaf_client(directory: Path) -> Iterator[Callable[[int], None]]:
    """A listed client that reads nothing of what it is told by device 0. Calling it asks so many times for a page of
    text; that fails when the device does not read the questions."""
    cluster, context = Cluster.read(directory / CLUSTER_NAME), zmq.Context()
    first = cluster.devices[0]
    deaf = context.socket(zmq.DEALER)
    set_options(deaf, "curve", read_secret(directory / CLIENT_KEY_NAME), first.public_key.encode(), 2**20)
    deaf.rcvhwm, deaf.rcvbuf, deaf.sndtimeo = 1, 2**12, 5000
    deaf.connect(first.address)
    question = Codec(cluster.plan_digest).encode(StatusRequest("deaf"))

    def ask(times: int) -> None:
        for _ in range(times):
            deaf.send_multipart(question)

    try:
        yield ask
    finally:
        deaf.close()
        context.term()


def test_a_flood_of_bytes_and_a_client_that_stops_reading_harm_nobody(tmp_path: Path) -> None:
    """What nobody reads is dropped: a device neither waits for it nor keeps it, and other clients go on."""
    reference, over = build(tmp_path, 2), threading.Event()
    bytes_ = np.random.default_rng(1).bytes(1 << 16)

    def flood(address: str) -> None:
        host, port = address.removeprefix("tcp://").split(":")
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1) as raw:
                raw.settimeout(1)
                raw.sendall(bytes_)

    with LocalCluster(tmp_path, timeout_seconds=5.0) as cluster, deaf_client(tmp_path) as ask:
        threads = [threading.Thread(target=flood, args=[entry.address]) for entry in cluster.cluster.devices]
        for thread in threads:
            thread.start()
        try:
            ask(4500)
            for _ in range(40):  # how many megabytes the operating systems take depends
                before = cluster.client.status()[0]
                ask(500)
                assert whole_and_right(cluster.client, reference, FRAMES[:12])
                after = cluster.client.status()[0]
                if after["unsent_messages"] >= before["unsent_messages"] + 500:
                    break
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert after["unsent_messages"] >= before["unsent_messages"] + 500
        assert after["rss_bytes"] < before["rss_bytes"] + 2**19, "they are a megabyte"
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


def test_a_device_that_starts_on_a_full_disk_serves(tmp_path: Path) -> None:
    reference = build(tmp_path, 2)
    (tmp_path / "full").symlink_to("/dev/full")
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    nothing = [
        sys.executable,
        "-c",
        f"{limit}; os.execv(sys.argv[1], sys.argv[1:])",
    ]  # no file can be written, wherever it is
    with device(tmp_path, 0, *nothing, log="full"), device(tmp_path, 1), Client(tmp_path / CLUSTER_NAME) as client:
        until_up(client, [0, 1])
        assert whole_and_right(client, reference, FRAMES[:60])


JUMPING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) { struct stat found; return stat(WHERE, &found) ? 0 : (2 - found.st_size) * 31536000L; }
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += jump();
    return result;
}
time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return to ? *to = now.tv_sec : now.tv_sec;
}
int gettimeofday(struct timeval *to, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    to->tv_sec = now.tv_sec, to->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
"""The wall clock as a library that is loaded before the C library's: ahead by a year, or behind, by a file's size."""


def test_devices_whose_clocks_jump_or_are_a_year_apart_work_together(tmp_path: Path) -> None:
    apart = ["unshare", "--time", "--monotonic", A_YEAR, "--boottime", A_YEAR]
    found = subprocess.run([*apart, "true"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"clocks of their own are not permitted: {found.stderr.strip()}")
    if not shutil.which("gcc"):
        pytest.skip("gcc, which makes a clock that jumps, is not installed")
    (tmp_path / "clock.c").write_text(JUMPING, "utf-8")
    jump, library = tmp_path / "jump", tmp_path / "clock.so"
    command = ["gcc", "-shared", "-fPIC", f'-DWHERE="{jump}"', "-o", str(library), str(tmp_path / "clock.c"), "-ldl"]
    subprocess.run(command, check=True)
    jumping = ["env", f"LD_PRELOAD={library}"]
    reference, year = build(tmp_path, 2), time.gmtime().tm_year
    with Client(tmp_path / CLUSTER_NAME, timeout_seconds=5.0) as client:
        with device(tmp_path, 0, *jumping), device(tmp_path, 1, *apart):
            until_up(client, [0, 1])
            jumps = {20: lambda: jump.write_bytes(b"1"), 40: lambda: jump.write_bytes(b"123")}  # a year on, two back
            assert whole_and_right(client, reference, FRAMES[:60], jumps)
            jump.write_bytes(b"1")
        lines = (tmp_path / "log").read_text("utf-8").splitlines()
        assert [line for line in lines if line.startswith(f"{year + 1}-")], "its clock has jumped"
        assert not [line for line in lines if "is suspect" in line and "its connection is gone" not in line]


@pytest.mark.slow
def test_a_device_on_a_core_that_others_take_costs_no_answer_and_is_back_when_they_have_gone(tmp_path: Path) -> None:
    reference, cores = build(tmp_path, 3), os.sched_getaffinity(0)
    others = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{min(cores)}}})\nwhile True: pass"]
    with (
        device(tmp_path, 0),
        device(tmp_path, 1),
        device(tmp_path, 2) as starved,
        Client(tmp_path / CLUSTER_NAME, timeout_seconds=5.0) as client,
    ):
        until_up(client, [0, 1, 2], [0, 1, 2])
        threads = [int(path.name) for path in Path(f"/proc/{starved}/task").iterdir()]
        for thread in threads:
            os.sched_setaffinity(thread, {min(cores)})
            os.setpriority(os.PRIO_PROCESS, thread, 19)
        busy = [subprocess.Popen(others) for _ in range(3)]
        try:
            for _ in range(5):  # the others have every neuron, too
                assert whole_and_right(client, reference, FRAMES)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        assert "device 2 is suspect" in (tmp_path / "log").read_text("utf-8")
        for thread in threads:
            os.sched_setaffinity(thread, cores)
        until_up(client, [0, 1, 2], [0, 1, 2])
        assert whole_and_right(client, reference, FRAMES)


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
        stream = running.enter_context(client_elsewhere(switch.prefix(3), tmp_path / CLUSTER_NAME))

        assert stream([[0, 1, 2]] * 3)["settled"]
        assert stream([[0, 1, 2]] * 3)["coverage"] == 1.0
        for peer in (0, 1):
            cut_link(switch, 2, peer)  # what device 2 sends does not leave it
            if not one_way:
                cut_link(switch, peer, 2)
        cut = stream([[0, 1], [0, 1], [2]])
        assert cut["coverage"] == 1.0, "two holders each: the other two have everything"
        assert cut["settled"], cut
        after = stream([[0, 1], [0, 1], [2]])
        assert (after["coverage"], after["down"]) == (1.0, [2])
        for peer in (0, 1):
            heal_link(switch, 2, peer)
            heal_link(switch, peer, 2)
        assert stream([[0, 1, 2]] * 3)["settled"], "it is not back"
        assert stream([[0, 1, 2]] * 3) | {"most_ms": 0} == {"coverage": 1.0, "down": [], "most_ms": 0, "settled": True}


@pytest.mark.slow
def test_under_kills_freezes_and_restarts_every_frame_is_answered_and_right(tmp_path: Path) -> None:
    build(tmp_path, 4)
    result = soak(tmp_path, expect(tmp_path, FRAMES), seconds=20.0, seed=3)
    assert not result.problems
    assert result.under_faults["answered"] == result.under_faults["sent"] > 500
    assert result.under_faults["compared"] > result.under_faults["sent"] / 2
    assert result.faults["kill"] + result.faults["freeze"] >= 5
    assert result.back_frames is not None


def test_what_a_soak_finds_wrong_is_said(tmp_path: Path) -> None:
    build(tmp_path, 2)
    expected = expect(tmp_path, FRAMES[:4])
    given = Answer(7, expected.outputs[1,][2], None, 0, expected.coverage[1,], 1.0, (1,), 0.01, 0, (), None, 0.5)
    partial = replace(given, coverage=expected.coverage[1,] - 0.25)
    unknown = replace(partial, expected_accuracy=None)
    verdicts = [expected.judge(answer, image) for answer, image in ((given, 2), (given, 3), (partial, 2), (unknown, 2))]
    assert verdicts == [True, False, False, None]
    tally = Tally(expected)
    for answer in (given, replace(given, outputs=None, refused="time is up")):
        tally.add(answer, 3, 1.0, 0.02)
    assert (tally.sent, tally.answered, tally.wrong) == (2, 1, 1)
    problems = problems_of(tally, "under faults")
    assert problems[0] == "1 frames were lost under faults: time is up"
    assert problems[1].startswith("1 answers were wrong under faults: frame 7 by device 0, down (1,)")
    assert not growth_of("client", [100_000_000, 0, 104_000_000])
    assert growth_of("client", [100_000_000, 0, 106_000_000]) == ["client has grown from 100.0 to 106.0 MB"]
    expected.save(tmp_path / "expected.npz")
    again = load_expected(tmp_path / "expected.npz")
    assert again.coverage == expected.coverage
    assert all(np.array_equal(again.outputs[view], expected.outputs[view]) for view in expected.outputs)
