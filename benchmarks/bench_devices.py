"""Two devices on one core each beside the whole model in one process on one core, by model, split and window.

    python benchmarks/bench_devices.py [--models alexnet vgg16_bn ...] [--splits neurons hidden rows auto ...]
        [--windows 4 1] [--rounds N] [--seconds S] [--builds DIR] [--out FILE]

Random weights, frames of 224x224 through real sockets, encrypted. A window of several frames in flight is for
throughput; with one alone, the ratio says how many times shorter a frame takes. The ceiling is what the machine itself
allows: two processes at once, each with the whole model on a core of its own, over one such process. It is below 2
where the two cores share the memory's bandwidth. ``replicas`` are what a user would do without splitting: whole
models, which take frames in turn. What the busiest device's processor takes for a frame, beside what one process takes,
says the same whatever else the machine does: it bounds the ratio of throughputs. ``--builds`` keeps builds from run to
run, ``--out`` appends what is printed to a file.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from builds import SPLITS, Builds, name_of, try_build
from paired import Results, spread

from robustdice.meter.handing import processor_seconds_of
from robustdice.meter.throughput import measure_processes, measure_whole
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.wire.config import CLUSTER_NAME

SECONDS = {"vgg16_bn": 10.0}
"""Of each measurement, where it is not 4."""


def rate(client: Client, seconds: float) -> tuple[int, float, float]:
    """Frames while the window is kept full, their median latency in milliseconds, and in how many seconds."""
    frame = np.random.default_rng(0).standard_normal(client.model.input_shape, dtype=np.float32)
    start = time.perf_counter()
    frames = itertools.takewhile(lambda _: time.perf_counter() - start < seconds, itertools.repeat(frame))
    latencies = []
    for answer in client.stream(frames):
        if answer.outputs is None or answer.coverage < 1:
            raise SystemExit(f"frame {answer.number} was not answered in full: {answer.refused or 'time is up'}")
        latencies.append(answer.latency_seconds)
    return len(latencies), 1e3 * statistics.median(latencies), time.perf_counter() - start


def ceiling(model: Path, shape: Sequence[int], seconds: float, rounds: int, cores: Sequence[int]) -> list[float]:
    """What two processes at once reach over one, in pairs."""
    found = []
    for number in range(rounds):
        measured = {}
        for some in (cores[:1], cores) if number % 2 else (cores, cores[:1]):
            measured[len(some)] = sum(measure_whole(model, shape, seconds, some))
        found.append(measured[len(cores)] / measured[1])
    return found


@dataclass(frozen=True)
class Round:
    """Of two devices: frames per second, median latency in ms, and what the busiest one's processor takes for a frame;
    and of one process beside them. Seconds."""

    rate: float
    latency: float
    processor: float
    alone: float
    alone_processor: float


def compare(
    build: Path, whole: Path, windows: Sequence[int], seconds: float, rounds: int, cores: Sequence[int]
) -> tuple[dict[int, list[Round]], tuple[int, ...]]:
    """The rounds of every window, and the model's input shape."""
    found: dict[int, list[Round]] = {window: [] for window in windows}
    with LocalCluster(build, cores=[[core] for core in cores], timeout_seconds=30.0) as cluster:
        shape = cluster.client.model.input_shape
        pids = [pid for device in range(len(cores)) if (pid := cluster.process(device)) is not None]
        clients = {window: Client(build / CLUSTER_NAME, timeout_seconds=30.0, window=window) for window in windows}
        for client in clients.values():
            rate(client, min(seconds, 1.0))
        for number in range(rounds):
            order: list[int] = [0, *windows]
            measured: dict[int, tuple[float, ...]] = {}
            for window in order if number % 2 else reversed(order):
                if not window:
                    measured[window] = measure_processes(whole, shape, seconds, cores[:1])[0]
                    continue
                before = [processor_seconds_of(pid) for pid in pids]
                frames, latency, elapsed = rate(clients[window], seconds)
                spent = [processor_seconds_of(pid) - then for pid, then in zip(pids, before, strict=True)]
                measured[window] = frames / elapsed, latency, max(spent) / frames
            for window in windows:
                found[window].append(Round(*measured[window], *measured[0]))
        for client in clients.values():
            client.close()
    return found, shape


def said(rounds: Sequence[Round]) -> str:
    """Medians, and ratios with their spread."""
    middle = {name: statistics.median(getattr(each, name) for each in rounds) for name in Round.__annotations__}
    return (
        f"{middle['rate']:.2f} frames/s, {middle['latency']:.0f} ms a frame, one process {middle['alone']:.2f}, "
        f"ratio {spread([each.rate / each.alone for each in rounds])}; processor, ms a frame: "
        f"{1e3 * middle['processor']:.1f} of {1e3 * middle['alone_processor']:.1f}, "
        f"{spread([each.alone_processor / each.processor for each in rounds])} times less"
    )


def main() -> None:
    """Print a line for each model, split and window, and one for the model's ceiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["alexnet", "vgg16_bn"], metavar="NAME")
    parser.add_argument("--splits", nargs="+", default=["neurons"], choices=SPLITS)
    parser.add_argument("--windows", nargs="+", type=int, default=[4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--builds", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("this benchmark needs two cores")
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        builds = Builds(options.builds or Path(temporary))
        for model in options.models:
            seconds = options.seconds or SECONDS.get(model, 4.0)
            whole, name, shape = builds.whole(model), name_of(model), None
            for split in options.splits:
                if (build := try_build(builds, model, split, len(cores))) is None:
                    continue
                found, shape = compare(build, whole, options.windows, seconds, options.rounds, cores)
                for window, rounds in found.items():
                    results.say(f"{name}: 2 devices, {split}, window {window}: {said(rounds)}")
            if shape is not None:
                found_ceiling = ceiling(whole, shape, seconds, options.rounds, cores)
                results.say(f"{name}: ceiling {spread(found_ceiling)}")


if __name__ == "__main__":
    main()
