"""The unpartitioned model in a process of its own, for comparison: ``python -m robustdice.meter.single MODEL ...``.

Prints the frames per second that it reached and the seconds of its processor that a frame took, on one core: with
weights as they are, or as ONNX Runtime packs them, whichever is faster.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.runtime.sessions import open_session


def main() -> None:
    """Measure, and print one number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("shape", help="input shape without the batch axis, with commas")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--core", type=int, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    shape = [1, *map(int, options.shape.split(","))]
    frame = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    sessions = [open_session(options.model, 1, packs=packs) for packs in (True, False)]
    session = min(sessions, key=lambda each: min(_seconds(each, frame) for _ in range(3)))
    del sessions
    frames, start, busy = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < options.seconds:
        _seconds(session, frame)
        frames += 1
    print(frames / elapsed, (time.process_time() - busy) / frames)


def _seconds(session: Any, frame: NDArray[np.float32]) -> float:
    """Of one run."""
    start = time.perf_counter()
    session.run(None, {session.get_inputs()[0].name: frame})
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
