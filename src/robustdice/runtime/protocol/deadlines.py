"""What a device learns while it runs: how long to wait, and what to report."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.protocol.early import Early
from robustdice.runtime.protocol.events import Settings
from robustdice.runtime.protocol.inflight import InFlight
from robustdice.runtime.protocol.state import Phase

RATE_SECONDS = 5.0


@dataclass
class Estimate:
    """A deadline from observed durations: mean plus four mean deviations (as TCP's, RFC 6298)."""

    mean: float | None = None
    deviation: float = 0.0

    def observe(self, seconds: float) -> None:
        """Take one duration into account."""
        if self.mean is None:
            self.mean, self.deviation = seconds, seconds / 2
        else:
            self.deviation += (abs(seconds - self.mean) - self.deviation) / 4
            self.mean += (seconds - self.mean) / 8

    @property
    def bound(self) -> float:
        """What is rarely exceeded, in seconds; 0 as long as nothing was observed."""
        return 0.0 if self.mean is None else self.mean + 4 * self.deviation

    def deadline(self, settings: Settings) -> float:
        """How long to wait, in seconds."""
        if self.mean is None:
            return settings.initial_wait
        return min(max(self.bound, settings.minimum_wait), settings.maximum_wait)


EXTENSION = 3.0
"""So much longer may a device take that nobody can stand in for."""
GENEROSITY = 1.5
ALONE = 1.5
"""So much longer may computing take when a device has to stand in for others."""
STAGE_BYTES = 16 * 2**10
"""What an exchange costs beside its bytes, expressed in bytes."""


class Deadlines:
    """A device's knowledge of how long its peers and its own computations take, per stage."""

    def __init__(self, manifest: Manifest, settings: Settings) -> None:
        """Nothing is known yet."""
        self._settings = settings
        self._weights = [_weight(manifest, stage) for stage in range(len(manifest.stages))]
        self._weights_from = [*accumulate(reversed(self._weights))][::-1]
        self.waits = [Estimate() for _ in manifest.stages]
        """From publishing a stage's own shards to having all; of frames that nobody left meanwhile."""
        self.computes = [Estimate() for _ in manifest.stages]
        self._learn()
        self._hurries = Estimate()
        """Of frames that wait for nothing any more, seconds per stage until they are answered."""
        self.introductions = Estimate()
        """From hearing of a frame by a peer to hearing of it by its client."""
        self.awake_since = -math.inf
        """Since when this device has not stood still: what began before tells nothing of anybody's habits."""

    def observe(self, estimate: Estimate, since: float, now: float) -> None:
        """Learn how long something has taken, unless this device stood still meanwhile."""
        if since >= self.awake_since:
            estimate.observe(now - since)

    def arm(self, frame: InFlight, now: float, factor: float = 1.0) -> None:
        """Let a frame wait as long as peers may need: what was observed, and they may be within a stage of another
        frame. But leave time for what may still follow before the frame's own deadline."""
        mean = self.computes[frame.stage].mean or 0.0
        wait = factor * self.waits[frame.stage].deadline(self._settings) + mean + self._longest
        wait = min(wait, max(frame.patient_until - now, self._settings.minimum_wait))
        frame.wait_until, frame.nudge_at, frame.rearmed = now + wait, now + wait / 2, False

    def be_patient(self, frame: InFlight, now: float) -> None:
        """Say how long the frame may wait in its stage for shards that are on the way: as long as later stages have the
        time that they usually need, but at least its share of the time that is left, by the bytes that are moved."""
        left = max(0.0, self.hurry_at(frame) - now)
        rest = self._weights_from[frame.stage]
        share = min(1.0, GENEROSITY * self._weights[frame.stage] / rest) if rest else 1.0
        usual = min(left, GENEROSITY * self._waiting_after[frame.stage])
        frame.patient_until = now + max(share * left, left - usual)

    def early_until(self, early: Early) -> float:
        """How long a frame that only peers speak of may be on its way; how long it is remembered afterwards."""
        settings = self._settings
        if early.told:
            return early.since + settings.maximum_wait
        least = settings.minimum_wait if early.expected else settings.pass_after
        return early.since + min(max(least, self.introductions.bound), settings.maximum_wait)

    def hurry_at(self, frame: InFlight) -> float:
        """From when on a frame waits for nothing, so that its answer leaves in time."""
        usual = (self._hurries.mean or 0.0) * (len(self.computes) - frame.stage)
        return frame.deadline - self._settings.answer_margin - ALONE * max(self._computing_after[frame.stage], usual)

    def hurries(self, frames: Iterable[InFlight], now: float) -> Iterator[tuple[InFlight, float]]:
        """As ``hurry_at`` for all that are waiting, the youngest first, where ``frames`` are all that are not answered,
        the oldest first: one must also leave the younger ones the time for their work, which comes after its own. But
        not those that are too late already, as one with next to no time is from the start."""
        younger = math.inf
        for frame in reversed(list(frames)):
            own = self.hurry_at(frame)
            due = min(own, younger - self._computing_after[frame.stage])
            if frame.phase is Phase.WAITING:
                yield frame, due
            if own >= now:
                younger = due

    def _learn(self) -> None:
        """Sum up what was observed. Once for each frame: it would take longer than an exchange to do so in each."""
        computes = [estimate.mean or 0.0 for estimate in self.computes]
        waits = [
            math.inf if estimate.mean is None else estimate.mean if weight else 0.0
            for estimate, weight in zip(self.waits, self._weights, strict=True)
        ]
        self._longest = max(computes)
        self._computing_after, self._waiting_after = (
            [*accumulate([0.0, *reversed(of_stages[1:])])][::-1] for of_stages in (computes, waits)
        )
        """What the stages after each one usually take, and wait; infinite where that is not known."""

    def finished(self, frame: InFlight, now: float) -> None:
        """Learn from a frame that was answered or given up."""
        self._learn()
        if frame.hurried is not None:
            stage, since = frame.hurried
            if since >= self.awake_since:
                self._hurries.observe((now - since) / (len(self.computes) - stage))


def _weight(manifest: Manifest, stage: int) -> float:
    exchanges = [manifest.exchanges[number] for number in manifest.stages[stage].exchanges]
    return sum(4 * math.prod(exchange.shape) for exchange in exchanges) + STAGE_BYTES * bool(exchanges)


class Record:
    """What a device has done so far, for its status."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.answered = 0
        self.fault: tuple[int, float, str] | None = None
        """The last one: device, when, why."""
        self._recent: deque[float] = deque(maxlen=512)

    def answer(self, now: float) -> None:
        """A frame was answered."""
        self.answered += 1
        self._recent.append(now)

    def status(self, now: float) -> dict[str, Any]:
        """Frames per second over the last seconds, and the last fault."""
        recent = sum(now - moment <= RATE_SECONDS for moment in self._recent)
        fault = self.fault
        return {
            "answered": self.answered,
            "frames_per_second": recent / RATE_SECONDS,
            "last_fault": fault and {"device": fault[0], "seconds_ago": now - fault[1], "reason": fault[2]},
        }
