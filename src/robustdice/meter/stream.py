"""A client in a process of its own, which can be in another network: ``python -m robustdice.meter.stream BUILD ...``.

Waits until all devices see each other, measures them, and prints what it found, a :class:`BenchResult`, as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from robustdice.errors import ClusterError, RobustdiceError
from robustdice.meter.throughput import bench_running
from robustdice.runtime.client import Client
from robustdice.runtime.wire.config import CLUSTER_NAME

START_SECONDS = 120.0


def main() -> int:
    """Measure, and print one line; on standard error what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--frames", type=Path, help="a .npy file, [n, C, H, W]; without: a random frame")
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        frames = None if options.frames is None else np.load(options.frames, mmap_mode="r")
        _wait_for_all(options.build)
        how = {"seconds": options.seconds, "samples": options.samples, "window": options.window}
        found = bench_running(options.build, rounds=1, frames=frames, **how)
    except RobustdiceError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(found)))
    return 0


def _wait_for_all(build: Path) -> None:
    end = time.monotonic() + START_SECONDS
    with Client(build / CLUSTER_NAME) as client:
        everyone = set(range(len(client.cluster.devices)))
        while True:
            views = {device: set(said["up"]) for device, said in client.status(0.5).items()}
            if views.keys() == everyone and all(view == everyone for view in views.values()):
                return
            if time.monotonic() > end:
                raise ClusterError(f"after {START_SECONDS:.0f} s not all devices see each other: {views}")
            time.sleep(0.05)


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not through sys.stdin, whose lock a thread may not hold when Python ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
