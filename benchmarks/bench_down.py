"""Frames per second of four devices while none to three of them are down, by split: processes that are really killed.

    python benchmarks/bench_down.py [--models alexnet ...] [--splits ...] [--memory 0.5] [--rounds N] [--seconds S]
        [--builds DIR] [--out FILE]

Plans with copies, as many as fit into ``--memory`` (``replicas`` take what they take), random weights, 224x224, four
frames in flight. The four devices share two cores, two on each, so that those that are left have more of a core each:
what is measured is that answers keep coming, and what standing in for others costs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from builds import SPLITS, Builds, name_of, try_build
from paired import Results, spread

from robustdice.runtime.cluster import LocalCluster

DEVICES = 4
SETTLING_SECONDS = 1.5


def rate(cluster: LocalCluster, seconds: float) -> tuple[float, float, int]:
    """Frames per second, the least coverage, and how many had no answer."""
    frame = np.random.default_rng(0).standard_normal(cluster.client.model.input_shape, dtype=np.float32)
    start = time.perf_counter()
    frames = itertools.takewhile(lambda _: time.perf_counter() - start < seconds, itertools.repeat(frame))
    answers = list(cluster.client.stream(frames))
    answered = [answer.coverage for answer in answers if answer.outputs is not None]
    return len(answered) / (time.perf_counter() - start), min(answered, default=0.0), len(answers) - len(answered)


def main() -> None:
    """Print a line for each model and split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["alexnet"], metavar="NAME")
    parser.add_argument("--splits", nargs="+", default=["neurons", "hidden", "rows", "replicas"], choices=SPLITS)
    parser.add_argument("--memory", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--builds", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        builds = Builds(options.builds or Path(temporary))
        for model in options.models:
            for split in options.splits:
                if (build := try_build(builds, model, split, DEVICES, memory=options.memory)) is None:
                    continue
                found: list[list[tuple[float, float, int]]] = [[] for _ in range(DEVICES)]
                pinned = [[cores[device % len(cores)]] for device in range(DEVICES)]
                with LocalCluster(build, cores=pinned, timeout_seconds=10.0) as cluster:
                    rate(cluster, 1.0)
                    for _ in range(options.rounds):
                        for down in range(DEVICES):
                            if down:
                                cluster.kill(DEVICES - down)
                                rate(cluster, SETTLING_SECONDS)
                            found[down].append(rate(cluster, options.seconds))
                        for device in range(1, DEVICES):
                            cluster.restart(device)
                        cluster.wait()
                        rate(cluster, SETTLING_SECONDS)
                for down, rounds in enumerate(found):
                    results.say(
                        f"{name_of(model)}, {split}, {down} of {DEVICES} down: {spread([each[0] for each in rounds])} "
                        f"frames/s, coverage at least {min(each[1] for each in rounds):.2f}, "
                        f"{sum(each[2] for each in rounds)} frames without an answer"
                    )


if __name__ == "__main__":
    main()
