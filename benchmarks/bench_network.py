"""Four devices behind a switch of 1 Gbit/s and of 100 Mbit/s, by model, split and what travels.

    python benchmarks/bench_network.py [--models NAME ...] [--splits ...] [--wires ...] [--megabits ...] [--window N]
        [--rounds N] [--seconds S] [--builds DIR] [--out FILE]

Every device is in a network namespace of its own, on a port of a bridge that carries so much either way; the client's
port is as fast as the machine. All share two cores. Frames per second are shown as a share of what bounds them: what
the same devices reach behind a switch that is as fast as the machine (all four computing on the two cores), or what a
port can carry of the bytes that the busiest device sends or receives for a frame, its input included, headers and
encryption not. Needs root; where namespaces are not permitted it says so and does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from builds import SPLITS, Builds, name_of, try_build
from netns import Switch, one_switch, permitted
from paired import Results, spread

from robustdice.cost.model import handed_over
from robustdice.plan import Plan
from robustdice.runtime.wire.config import CLUSTER_NAME
from robustdice.wire_format import WIRES

DEVICES = 4
STREAM = """
import json, sys, time
from pathlib import Path
from robustdice.meter.throughput import bench_running
from robustdice.runtime.client import Client
build, seconds, window, devices = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with Client(Path(build) / "cluster.toml") as client:
    end, found = time.monotonic() + 60, {}
    while len(found) < devices or min(len(said["up"]) for said in found.values()) < devices:
        if time.monotonic() > end:
            sys.exit(f"not all devices see each other: {found}")
        found = client.status(0.5)
found = bench_running(build, seconds=seconds, rounds=1, window=window)
print(json.dumps([found.frames_per_second, found.coverage, found.unanswered / found.images, found.latency_p50_ms]))
"""
"""The client, in a namespace of its own: frames per second, mean coverage, share of frames unanswered, latency."""


def link_bytes(plan: Plan, input_shape: tuple[int, ...]) -> float:
    """Bytes that the busiest device sends, or receives, for a frame."""
    sent, received = 0.0, 4.0 * math.prod(input_shape)
    for index in range(len(plan.layers)):
        if values := plan.exchanged(index):
            published = handed_over(plan, index) * plan.exchanged_bytes(index) / values
            sent += published.max() * (plan.devices - 1)
            received += published.sum() - published.min()
    return max(sent, received)


@contextlib.contextmanager
def running(build: Path, where: Switch) -> Iterator[None]:
    """The devices of a build, each in its namespace, on one core each."""
    cores = sorted(os.sched_getaffinity(0))
    processes = []
    try:
        for device in range(DEVICES):
            command = [*where.prefix(device), sys.executable, "-m", "robustdice.runtime.device"]
            command += [str(build / f"device-{device}"), "--cluster", str(build / CLUSTER_NAME), "--watch-stdin"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)  # noqa: S603
            os.sched_setaffinity(process.pid, {cores[device % len(cores)]})
            processes.append(process)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def stream(build: Path, where: Switch, seconds: float, window: int) -> tuple[float, float, float, float]:
    """What :data:`STREAM` says."""
    command = [*where.prefix(DEVICES), sys.executable, "-c", STREAM, str(build)]
    command += [str(seconds), str(window), str(DEVICES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"the client has failed: {done.stderr.strip()[-500:]}")
    fps, coverage, unanswered, latency = json.loads(done.stdout)
    return fps, coverage, unanswered, latency


def measure(build: Path, title: str, options: argparse.Namespace, where: Switch, results: Results) -> None:
    """Print a line for each link."""
    plan = Plan.load(build / "plan.json")
    manifest = json.loads((build / "device-0" / "manifest.json").read_text())
    needed = 8e-6 * link_bytes(plan, tuple(manifest["input_shape"]))
    links: list[float | None] = [None, *options.megabits]
    found: dict[float | None, list[tuple[float, float, float, float]]] = {link: [] for link in links}
    with running(build, where):
        for number in range(options.rounds):
            for link in links if number % 2 else reversed(links):
                where.limit(range(DEVICES), link)
                found[link].append(stream(build, where, options.seconds, options.window))
    for link in options.megabits:
        shares, rates, bounds = [], [], []
        for free, behind in zip(found[None], found[link], strict=True):
            bound = min(free[0], link / needed)
            rates.append(behind[0])
            bounds.append(bound)
            shares.append(behind[0] / bound)
        computing = "link" if link / needed < min(free[0] for free in found[None]) else "computing"
        results.say(
            f"{title}, {link:g} Mbit/s: {spread(rates)} frames/s of {spread(bounds)} ({computing}; "
            f"{needed / 8:.2f} MB a frame), share {spread(shares)}, coverage {min(f[1] for f in found[link]):.3f}, "
            f"unanswered {max(f[2] for f in found[link]):.3f}"
        )


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["alexnet", "vgg16_bn", "convnext_tiny"], metavar="NAME")
    parser.add_argument("--splits", nargs="+", default=["neurons", "auto"], choices=SPLITS)
    parser.add_argument("--wires", nargs="+", default=list(WIRES), choices=WIRES)
    parser.add_argument("--megabits", nargs="+", type=float, default=[1000.0, 100.0])
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--builds", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if reason := permitted():
        print(f"skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that namespaces are removed
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as temporary, one_switch(DEVICES + 1) as where:
        builds = Builds(options.builds or Path(temporary))
        for model in options.models:
            for split in options.splits:
                for wire in options.wires:
                    hosts = tuple(map(where.address, range(DEVICES)))
                    if build := try_build(builds, model, split, DEVICES, wire=wire, hosts=hosts):
                        measure(build, f"{name_of(model)}, {split}, {wire}", options, where, results)


if __name__ == "__main__":
    main()
