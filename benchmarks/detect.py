"""What one fault costs on real processes: of four devices one is killed or frozen and comes back; a frame at a time.

    python benchmarks/detect.py [--trials 12] [--model FILE] [--split neurons] [--memory 0.5] [--builds DIR]

What a fault costs is what the slowest frame takes, of those that are under way or leave in the half second after it,
beyond the median of frames that are computed while the device is known to be down, which have the spare's compute in
them too. Beside it stands the same for a half second in which nothing happens: processes that share cores are never
equally fast. And beside it, when the last of the others has noticed the fault, by its log: until then a frame waits,
and nobody computes. ``later`` counts frames that left after that half second, and were a tenth of a second slower than
the median: a fault is to cost once. Full coverage is
back after the last answer that is not from primaries alone, in seconds and frames since a frozen device went on, or a
killed one listened again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from faults import Log
from numpy.typing import NDArray
from soak import SHARED, keep_bytecode, prepare

from robustdice.runtime.cluster import LocalCluster

BEFORE, DOWN, AFTER = 2.0, 2.0, 1.5
"""Seconds of a trial before the fault, between it and the return, and with full coverage after it."""
PATIENCE = 20.0
SETTLED = 0.5
"""After a fault: until then it may cost something."""
SLOW_SECONDS = 0.1


@dataclass(frozen=True)
class Seen:
    """A frame: when it left, when its answer came, and whether that is from primaries alone."""

    left: float
    came: float
    whole: bool

    @property
    def seconds(self) -> float:
        """What it took."""
        return self.came - self.left


@dataclass(frozen=True)
class Trial:
    """Seconds (and frames). ``idle`` is what ``cost`` is at a moment when nothing happens; ``noticed`` is when the last
    of the others says that the device is suspect; ``start`` is what a process takes until it listens."""

    cost: float
    idle: float
    noticed: float
    later: int
    back: float
    back_frames: int
    start: float | None


def trial(cluster: LocalCluster, images: NDArray[np.float32], device: int, kind: str) -> Trial:
    """One device fails and returns. ClusterError when it does not."""
    seen: list[Seen] = []
    moments: dict[str, float] = {}
    log = Log(cluster, device).read()
    others = {other: len(cluster.log(other).encode()) for other in range(cluster.devices) if other != device}
    again = log.starts + 1

    def act(what: str) -> None:
        moments[what], moments["clock"] = time.monotonic(), moments.get("clock", time.time())
        getattr(cluster, what)(device)

    back = "restart" if kind == "kill" else "thaw"
    timers = [threading.Timer(BEFORE, act, [kind]), threading.Timer(BEFORE + DOWN, act, [back])]
    for timer in timers:
        timer.start()
    whole_since: float | None = None
    started = time.monotonic()

    def frames() -> Iterator[NDArray[np.float32]]:
        while time.monotonic() < started + PATIENCE:
            if whole_since is not None and time.monotonic() > whole_since + AFTER:
                return
            yield images[len(seen) % len(images)]

    for answer in cluster.client.stream(frames()):
        now = time.monotonic()
        whole = answer.coverage == 1.0 and answer.from_spares == 0.0 and not answer.down
        seen.append(Seen(now - answer.latency_seconds, now, whole))
        if kind == "kill" and back in moments and "listens" not in moments and log.read().starts == again:
            moments["listens"] = now
        if not whole or back not in moments:
            whole_since = None
        elif whole_since is None:
            whole_since = now
    for timer in timers:
        timer.join()
    cluster.wait()
    fault, returned = moments[kind], moments[back]
    usual = _median(seen, fault + SETTLED, returned - SETTLED)
    calm = _median(seen, started + SETTLED, fault - SETTLED)
    last = max((each.came for each in seen if not each.whole and each.came > fault), default=fault)
    ready = moments.get("listens", returned)
    return Trial(
        cost=_slowest(seen, fault) - usual,
        idle=_slowest(seen, fault - 2.5 * SETTLED) - calm,
        noticed=max(_noticed(cluster.log(*other), device) for other in others.items()) - moments["clock"],
        later=sum(
            each.seconds > usual + SLOW_SECONDS for each in seen if fault + SETTLED < each.left < returned - SETTLED
        ),
        back=last - ready,
        back_frames=sum(ready < each.came <= last for each in seen),
        start=None if kind == "freeze" else ready - returned,
    )


def _noticed(log: str, device: int) -> float:
    """By the clock, when it says for the first time that a device is suspect."""
    line = next((line for line in log.splitlines() if f"device {device} is suspect" in line), None)
    if line is None:
        raise SystemExit(f"another device never noticed that device {device} was down; its log: {log[-500:]}")
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def _median(seen: Sequence[Seen], since: float, until: float) -> float:
    """Of the frames that left in between."""
    found = [each.seconds for each in seen if since < each.left < until]
    if not found:
        raise SystemExit(f"no frame is answered within {until - since:g} s: take a smaller model")
    return statistics.median(found)


def _slowest(seen: Sequence[Seen], moment: float) -> float:
    """Of the frames that were under way at a moment, or left soon after it."""
    return max((each.seconds for each in seen if each.left < moment + SETTLED and each.came > moment), default=0.0)


def spread(values: Sequence[float], unit: str = "ms", factor: float = 1e3) -> str:
    """The median and the worst."""
    return f"{factor * statistics.median(values):.0f} {unit}, worst {factor * max(values):.0f}"


def main() -> None:
    """Print a line for each kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="of each kind (default: %(default)s)")
    parser.add_argument("--model", default=str(SHARED / "models" / "alexnet_cifar10.pt2"))
    parser.add_argument("--split", default="neurons")
    parser.add_argument("--memory", type=float, default=0.5)
    parser.add_argument("--builds", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.builds or Path(temporary)
        keep_bytecode(root)
        place, expected = prepare(root, options.model, options.split, options.memory, 20)
        images = expected.images
        for kind in ("kill", "freeze"):
            with LocalCluster(place, timeout_seconds=2.0, window=1) as cluster:
                trials = [trial(cluster, images, number % cluster.devices, kind) for number in range(options.trials)]
            starts = [each.start for each in trials if each.start is not None]
            print(
                f"{kind}, {len(trials)} trials: costs a frame {spread([each.cost for each in trials])} beyond "
                f"the spare's compute (while nothing happens {spread([each.idle for each in trials])}), all others "
                f"have noticed after {spread([each.noticed for each in trials])}, later "
                f"{sum(each.later for each in trials)} frames; full coverage is back after "
                f"{spread([each.back for each in trials])}, "
                f"{spread([each.back_frames for each in trials], 'frames', 1)}"
                + (f"; a process listens {spread(starts)} after its start" if starts else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
