"""What a device learns while it runs: how long to wait, and what to report."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from robustdice.runtime.protocol.events import Settings
from robustdice.runtime.protocol.inflight import InFlight

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

    def deadline(self, settings: Settings) -> float:
        """How long to wait, in seconds."""
        if self.mean is None:
            return settings.initial_wait
        return min(max(self.mean + 4 * self.deviation, settings.minimum_wait), settings.maximum_wait)


class Deadlines:
    """A device's knowledge of how long its peers and its own computations take, per stage."""

    def __init__(self, stages: int, settings: Settings) -> None:
        """Nothing is known yet."""
        self._settings = settings
        self.waits = [Estimate() for _ in range(stages)]
        """From publishing a stage's own shards to having all; of frames that nobody left meanwhile."""
        self.computes = [Estimate() for _ in range(stages)]

    def arm(self, frame: InFlight, now: float, factor: float = 1.0) -> None:
        """Let a frame wait as long as peers may need: what was observed, and they may be within a stage of another
        frame. But leave time for what may still follow before the frame's own deadline."""
        means = [estimate.mean or 0.0 for estimate in self.computes]
        wait = factor * self.waits[frame.stage].deadline(self._settings) + means[frame.stage] + max(means)
        fair = max((self.hurry_at(frame) - now) / 4, self._settings.minimum_wait)
        wait = min(wait, fair)
        frame.wait_until, frame.nudge_at, frame.rearmed = now + wait, now + wait / 2, False

    def hurry_at(self, frame: InFlight) -> float:
        """From when on a frame waits for nothing, so that its answer leaves in time."""
        rest = sum(estimate.mean or 0.0 for estimate in self.computes[frame.stage + 1 :])
        return frame.deadline - self._settings.answer_margin - 1.5 * rest


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
