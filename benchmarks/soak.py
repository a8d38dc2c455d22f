"""Four real processes that fail all the time: every frame is answered, and rightly, and memory stays as it is.

    python benchmarks/soak.py --seed 1 --minutes 10 [--model FILE] [--split neurons|auto] [--memory 0.5] [--images N]
        [--frames N] [--builds DIR]

CIFAR's test images, over and over, first as fast as they go while nothing fails, then while every 0.3 to 1.5 s a device
is killed or frozen: 10,000 of them, a few at once and spread evenly over the time (``--frames 0``: as fast as they go).
What was killed starts again after a while, what was frozen goes on; one device that is well is left alone at any time,
and one (by the seed) is only ever frozen, so that its process is as old as the run. Every answer is compared, as it
comes, with what the bundles give in one process for the devices that it says were down; only counters are kept.

Ends with 1, and says why, when a frame was lost or answered wrongly, when a process that lived through all of it takes
more memory at the end than at the start, when a device ends by itself, or when full coverage does not come back.
``--model`` may be ``resnet56:resnet56``, with random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from expected import Expected, coverages, load_expected, outputs_of, views
from faults import SETTLED_SECONDS, Faults, resident_bytes
from numpy.typing import NDArray

from robustdice.errors import RobustdiceError
from robustdice.runtime.answer import Answer
from robustdice.runtime.cluster import LocalCluster

SHARED = Path(__file__).resolve().parents[2] / "shared"
DEVICES = 4
HEALTHY_SECONDS = 15.0
RETURN_SECONDS = 20.0
"""So long full coverage may take to come back after the last fault; processes that were killed last start meanwhile."""
GROWTH, SLACK_BYTES = 0.03, 2_000_000
"""By more than both together memory has grown."""
FINE = math.log(1.01)
"""Latencies are counted in steps of one percent."""


@dataclass
class Tally:
    """What has come back, whatever the number of frames: counters only. Seconds."""

    expected: Expected
    sent: int = 0
    answered: int = 0
    full_coverage: int = 0
    compared: int = 0
    wrong: int = 0
    short: int = 0
    """They cover less than the devices could that had been well for a second before the frame left."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why frames have no answer."""
    seconds: float = 0.0
    longest_silence: float = 0.0
    latency_most: float = 0.0
    latencies: Counter[int] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """The first answers that were wrong."""

    def add(self, answer: Answer, image: int, able: float, since_last: float) -> None:
        """``able`` is the coverage that was to be expected, ``since_last`` how long ago the last answer came."""
        self.sent += 1
        self.longest_silence = max(self.longest_silence, since_last)
        self.latency_most = max(self.latency_most, answer.latency_seconds)
        image %= len(self.expected.images)
        self.latencies[int(math.log(max(answer.latency_seconds, 1e-6)) / FINE)] += 1
        if answer.outputs is None:
            self.reasons[str(answer.refused)] += 1
            return
        right = self.expected.judge(answer, image)
        self.answered += 1
        self.full_coverage += answer.coverage == 1.0
        self.short += answer.coverage < able - 1e-6
        self.compared += right is not None
        self.wrong += right is False
        if right is False and len(self.examples) < 5:
            what = (
                f"frame {answer.number} by device {answer.device}, down {answer.down}, coverage {answer.coverage:.3f}"
            )
            self.examples.append(what)

    def latency(self, share: float) -> float:
        """Which a share of the frames stayed below."""
        left = share * self.sent
        for step in sorted(self.latencies):
            left -= self.latencies[step]
            if left <= 0:
                return math.exp((step + 1) * FINE)
        return 0.0

    def figures(self) -> dict[str, Any]:
        """For people, and for programs."""
        return {
            "seconds": round(self.seconds, 1),
            "sent": self.sent,
            "answered": self.answered,
            "full_coverage": self.full_coverage,
            "compared": self.compared,
            "wrong": self.wrong,
            "short": self.short,
            "frames_per_second": round(self.answered / self.seconds, 1) if self.seconds else 0.0,
            "longest_silence_ms": round(1e3 * self.longest_silence),
            "latency_ms": {
                "p50": round(1e3 * self.latency(0.5), 1),
                "p99": round(1e3 * self.latency(0.99), 1),
                "max": round(1e3 * self.latency_most, 1),
            },
            "reasons": dict(self.reasons),
        }


@dataclass
class Memory:
    """Resident bytes of processes over a run, in parts of it: medians of the start, the middle and the end."""

    samples: dict[str, list[list[int]]] = field(default_factory=dict)

    def look(self, processes: Mapping[str, int | str | None], elapsed_share: float) -> None:
        """Once a second or so. What is loaded and filled in the first tenth does not count."""
        part = next(
            (k for k, (a, b) in enumerate(((0.1, 0.2), (0.5, 0.6), (0.9, 1.0))) if a <= elapsed_share < b), None
        )
        for name, process in processes.items():
            found = resident_bytes(process)
            if part is not None and found is not None:
                self.samples.setdefault(name, [[], [], []])[part].append(found)

    def medians(self) -> dict[str, list[int | None]]:
        """Start, middle and end of each."""
        return {
            name: [int(statistics.median(part)) if part else None for part in parts]
            for name, parts in self.samples.items()
        }


@dataclass(frozen=True)
class Soak:
    """What came of it. ``back_frames`` and ``back_seconds``: from the last device being told to go on, or to start,
    until all answers have full coverage from primaries again; None when that did not happen."""

    seed: int
    never_killed: int
    healthy: dict[str, Any]
    under_faults: dict[str, Any]
    faults: dict[str, int]
    back_frames: int | None
    back_seconds: float | None
    resident_bytes: dict[str, list[int | None]]
    problems: list[str]
    restarts_by_hand: int = 0


class _Run:
    """A stream of frames through a cluster, and what is counted of it."""

    def __init__(self, cluster: LocalCluster, expected: Expected) -> None:
        self.cluster, self.expected = cluster, expected
        self.memory = Memory()
        self._every = set(range(cluster.devices))
        self._next = self._first = 0
        """Of all images that were sent: the number of the next one, and of the first one of a stream."""
        self._looked = 0.0

    def stream(self, seconds: float, faults: Faults | None = None, rate: float = 0.0) -> Iterator[tuple[Tally, Answer]]:
        """For so long: as fast as frames are answered, or so many in a second, a window of them at once. With every
        answer, what has been counted up to it."""
        tally, client = Tally(self.expected), self.cluster.client
        started = last = time.monotonic()
        while (left := started + seconds - time.monotonic()) > 0:
            for answer in client.stream(self._frames(client.window if rate else None, left, faults, started, seconds)):
                now = time.monotonic()
                well = self._every if faults is None else _well(faults, now - answer.latency_seconds)
                able = self.expected.coverage.get(tuple(sorted(self._every - well)), 0.0)
                tally.add(answer, tally.sent + self._first, able, now - last)
                last = now
                yield tally, answer
            if rate:
                last = max(last, started + tally.sent / rate)
                time.sleep(max(0.0, last - time.monotonic()))
        tally.seconds = time.monotonic() - started
        self._first += tally.sent

    def _frames(
        self, count: int | None, left: float, faults: Faults | None, started: float, seconds: float
    ) -> Iterator[NDArray[np.float32]]:
        """So many, while there is time ``left``; once a second it is looked what processes take."""
        end, images = time.monotonic() + left, self.expected.images
        while (now := time.monotonic()) < end and count != 0:
            if faults is not None and now > self._looked + 1.0:
                self._looked = now
                faults.check()
                devices = {f"device {d}": self.cluster.process(d) for d in self._every}
                self.memory.look({"client": "self", **devices}, (now - started) / seconds)
            yield images[self._next % len(images)]
            self._next += 1
            count = None if count is None else count - 1


def _well(faults: Faults, moment: float) -> set[int]:
    return {device for device, since in faults.well_since.copy().items() if since + SETTLED_SECONDS < moment}


def soak(
    directory: Path, expected: Expected, seconds: float, seed: int, timeout_seconds: float = 2.0, frames: int = 0
) -> Soak:
    """Run the build in ``directory`` for so long under faults, with so many frames (0: as many as there is time for).
    ClusterError when a device has ended by itself."""
    with LocalCluster(directory, timeout_seconds=timeout_seconds) as cluster:
        run, never_killed = _Run(cluster, expected), seed % cluster.devices
        healthy = under = after = Tally(expected)
        for tally, _ in run.stream(min(HEALTHY_SECONDS, seconds / 4)):
            healthy = tally
        faults = Faults(cluster, seed, never_killed)
        faults.start()
        for tally, _ in run.stream(seconds, faults, frames / seconds):
            under = tally
        stopped = faults.stop()
        back_frames, back_seconds = 0, 0.0
        whole = False
        for tally, answer in run.stream(RETURN_SECONDS):
            whole = answer.coverage == 1.0 and answer.from_spares == 0.0 and not answer.down
            if not whole:
                back_frames, back_seconds = tally.sent, time.monotonic() - stopped
            elif time.monotonic() - stopped - back_seconds > RETURN_SECONDS / 4:
                break
        after = tally
        cluster.wait()
        complaints = faults.complaints
    tallies = {"while nothing failed": healthy, "under faults": under, "after the last fault": after}
    problems = [text for when, tally in tallies.items() for text in problems_of(tally, when)] + complaints
    if not whole:
        problems.append(f"full coverage was not back {RETURN_SECONDS:g} s after the last fault")
    resident = run.memory.medians()
    problems += [text for name in ("client", f"device {never_killed}") for text in growth_of(name, resident.get(name))]
    return Soak(
        seed=seed,
        never_killed=never_killed,
        healthy=healthy.figures(),
        under_faults=under.figures(),
        faults=dict(faults.count),
        back_frames=back_frames if whole else None,
        back_seconds=round(back_seconds, 2) if whole else None,
        resident_bytes=resident,
        problems=problems,
    )


def problems_of(tally: Tally, when: str) -> list[str]:
    """Frames that were lost, and wrong answers, as sentences."""
    found = [f"{count} frames were lost {when}: {reason}" for reason, count in tally.reasons.items()]
    if tally.wrong:
        found.append(f"{tally.wrong} answers were wrong {when}: {'; '.join(tally.examples)}")
    return found


def growth_of(name: str, resident: list[int | None] | None) -> list[str]:
    """That a process takes more at the end than at the start, as a sentence; or that nobody knows."""
    start, _, end = resident or (None, None, None)
    if start is None or end is None:
        return [f"the memory of {name} was not seen"]
    if end <= start * (1 + GROWTH) + SLACK_BYTES:
        return []
    return [f"{name} has grown from {start / 1e6:.1f} to {end / 1e6:.1f} MB"]


def keep_bytecode(root: Path) -> None:
    """So that a device that starts again does not compile what it is made of, whatever the environment says: where the
    package is installed, it does not either."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(root.resolve() / "bytecode")


def prepare(root: Path, model: str, split: str, memory: float, images: int) -> tuple[Path, Expected]:
    """A build, and what is expected of it, worked out in processes that end with this: PyTorch is in the way of whoever
    wants to see what a client's memory does. It takes minutes."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        place, chosen = pool.apply(_prepare, (root, model, split, memory, images))
        known = place / f"expected-{len(chosen)}.npz"
        if not known.exists():
            found = views(place)
            outputs = pool.starmap(outputs_of, [(place, chosen, view) for view in found], chunksize=1)
            Expected(chosen, dict(zip(found, outputs, strict=True)), coverages(place, found)).save(known)
    return place, load_expected(known)


def _prepare(root: Path, model: str, split: str, memory: float, images: int) -> tuple[Path, NDArray[np.float32]]:
    from builds import Builds, network_of  # noqa: PLC0415

    import robustdice as rd  # noqa: PLC0415

    place, network = Builds(root).build(model, split, DEVICES, memory=memory, certified=True), network_of(model)
    data = rd.load_data(str(SHARED / "data" / "cifar10-test.zip"), network.preprocessing, network.outputs)
    return place, data.sample(images).images()


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="under faults (default: %(default)s)")
    parser.add_argument("--model", default=str(SHARED / "models" / "alexnet_cifar10.pt2"))
    parser.add_argument("--split", default="neurons", help="as of bench_devices.py (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=0.5, help="share that a device holds (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1000, help="different ones (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=10_000, help="under faults (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds for a frame (default: %(default)s)")
    parser.add_argument("--builds", type=Path, help="where builds are kept from run to run")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            root = options.builds or Path(temporary)
            keep_bytecode(root)
            place, expected = prepare(root, options.model, options.split, options.memory, options.images)
            result = soak(place, expected, 60 * options.minutes, options.seed, options.timeout, options.frames)
    except RobustdiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(result), indent=1))
    for problem in result.problems:
        print(problem, file=sys.stderr)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
