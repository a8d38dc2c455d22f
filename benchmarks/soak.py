"""A cluster of real processes that fail all the time: ``python benchmarks/soak.py DIR --seconds 600 --seed 1``.

``DIR`` is a build whose cluster file is of this machine. Every 0.3 to 1.5 s a device is killed, or frozen; what was
killed starts again after a while, what was frozen goes on, and at least one device that serves is left alone at any
time. Images, random ones, are streamed all the while. Every frame has to be answered, and with what the bundles give in
one process for the same devices being down: that is compared for answers with full coverage, and for those that say
that they were computed in one view from first to last (bundles of a certified plan); the others are counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.read import load_bundle
from robustdice.runtime.answer import Answer
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.inprocess import InProcess

IMAGES = 50
"""Different ones, over and over."""
SETTLED_SECONDS = 1.0
"""After it has begun to serve, a device counts as healthy."""
PAUSES = 0.3, 1.5
"""Between two faults, in seconds."""


@dataclass(frozen=True)
class Soak:
    """What came of it. ``mismatches`` are answers that are not what the bundles give; ``compared`` is how many could be
    compared. ``rss_bytes`` are the most that any device had resident in the first and in the second half, then the
    client; latencies are seconds."""

    seed: int
    seconds: float
    frames: int
    answered: int
    full_coverage: int
    compared: int
    mismatches: int
    reasons: dict[str, int]
    faults: dict[str, int]
    frames_per_second: float
    latency_p50: float
    latency_p99: float
    latency_most: float
    device_rss_bytes: tuple[int, int]
    client_rss_bytes: tuple[int, int]

    @property
    def holds(self) -> bool:
        """Every frame was answered, and none wrongly."""
        return self.answered == self.frames and not self.mismatches


class Faults(threading.Thread):
    """Kills, freezes and restarts on a random schedule, until it is told to ``stop``."""

    def __init__(self, cluster: LocalCluster, seed: int) -> None:
        """Nothing fails before :meth:`start`."""
        super().__init__(name="faults", daemon=True)
        self._cluster, self._random = cluster, random.Random(seed)  # noqa: S311
        self._over = threading.Event()
        self._healthy_from = dict.fromkeys(range(cluster.devices), 0.0)
        """Devices that nothing is wrong with, and since when they serve."""
        self._due: list[tuple[float, str, int]] = []
        self._starts = dict.fromkeys(range(cluster.devices), 1)
        self.count: Counter[str] = Counter()
        self.error: Exception | None = None

    def stop(self) -> None:
        """Go on with nothing, and bring everybody back."""
        self._over.set()
        self.join()
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        """The schedule."""
        try:
            while not self._over.wait(self._random.uniform(*PAUSES)):
                self._next()
        except Exception as error:
            self.error = error

    def _next(self) -> None:
        now = time.monotonic()
        for due in [due for due in self._due if due[0] <= now]:
            self._due.remove(due)
            self._end(*due[1:])
        for device in range(self._cluster.devices):
            busy = device in self._healthy_from or any(d == device for _, _, d in self._due)
            if not busy and self._cluster.log(device).count(" listens on ") == self._starts[device]:
                self._healthy_from[device] = now
        healthy = [d for d, since in self._healthy_from.items() if now - since > SETTLED_SECONDS]
        if len(healthy) < 2:
            return
        device = self._random.choice(healthy)
        del self._healthy_from[device]
        kind, again = self._random.choice([("kill", "restart"), ("freeze", "thaw")])
        getattr(self._cluster, kind)(device)
        self.count[kind] += 1
        self._due.append((now + self._random.uniform(0.1, 2.0), again, device))

    def _end(self, kind: str, device: int) -> None:
        getattr(self._cluster, kind)(device)
        self._starts[device] += kind == "restart"


def soak(directory: Path, seconds: float, seed: int, timeout_seconds: float = 2.0) -> Soak:
    """Run the build in ``directory`` for so long under faults."""
    manifest = load_bundle(directory / "device-0").manifest
    images = np.random.default_rng(seed).standard_normal((IMAGES, *manifest.input_shape)).astype(np.float32)
    answers: list[Answer] = []
    client_rss, device_rss = [_rss("self")], [0, 0]
    with LocalCluster(directory, timeout_seconds=timeout_seconds) as cluster:
        cluster.infer(images[0])
        faults = Faults(cluster, seed)
        started = time.monotonic()
        faults.start()

        def frames() -> Iterator[NDArray[np.float32]]:
            k, looked = 0, 0.0
            while (now := time.monotonic()) < started + seconds:
                if now > looked + 1.0:
                    half, looked = int(now > started + seconds / 2), now
                    device_rss[half] = max(
                        device_rss[half], *(_rss(cluster.process(d)) for d in range(cluster.devices))
                    )
                yield images[k % IMAGES]
                k += 1

        answers.extend(cluster.client.stream(frames()))
        taken = time.monotonic() - started
        client_rss.append(_rss("self"))
        faults.stop()
    compared, mismatches = _compare(directory, images, answers)
    latencies = sorted(answer.latency_seconds for answer in answers)
    given = [answer for answer in answers if answer.outputs is not None]
    return Soak(
        seed=seed,
        seconds=round(taken, 1),
        frames=len(answers),
        answered=len(given),
        full_coverage=sum(answer.coverage == 1.0 for answer in given),
        compared=compared,
        mismatches=mismatches,
        reasons=dict(Counter(str(answer.refused) for answer in answers if answer.outputs is None)),
        faults=dict(faults.count),
        frames_per_second=round(len(given) / taken, 1),
        latency_p50=round(statistics.median(latencies), 4),
        latency_p99=round(latencies[int(0.99 * (len(latencies) - 1))], 4),
        latency_most=round(latencies[-1], 4),
        device_rss_bytes=(device_rss[0], device_rss[1]),
        client_rss_bytes=(client_rss[0], client_rss[1]),
    )


def _compare(directory: Path, images: NDArray[np.float32], answers: Sequence[Answer]) -> tuple[int, int]:
    """How many answers say what they are to be, and how many of those are not that."""
    devices = len(list(directory.glob("device-*")))
    reference = InProcess([load_bundle(directory / f"device-{device}") for device in range(devices)])
    known: dict[tuple[int, ...], NDArray[np.float32]] = {}
    first, compared, mismatches = answers[0].number, 0, 0
    for answer in answers:
        down = answer.down if answer.expected_accuracy is not None else () if answer.coverage == 1.0 else None
        if answer.outputs is None or down is None:
            continue
        if down not in known:
            known[down] = reference.run(images, down)
        expected = known[down][(answer.number - first) % IMAGES]
        compared += 1
        mismatches += not np.allclose(answer.outputs, expected, rtol=1e-3, atol=1e-4)
    return compared, mismatches


def _rss(process: int | str | None) -> int:
    """Resident bytes of a process, 0 of one that is not there."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * 4096


def main() -> int:
    """Print one JSON object; 1 when a frame was lost or answered wrongly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a build for this machine")
    parser.add_argument("--seconds", type=float, default=600.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds for a frame (default: %(default)s)")
    options = parser.parse_args()
    result = soak(options.directory, options.seconds, options.seed, options.timeout)
    print(json.dumps(asdict(result), indent=1))
    return 0 if result.holds else 1


if __name__ == "__main__":
    sys.exit(main())
