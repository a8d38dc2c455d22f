"""What a client makes of what comes back: which answer it takes, and how many frames it has under way.

Pure: times are passed in, in seconds of any one clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from robustdice.runtime.protocol.deadlines import Estimate
from robustdice.runtime.protocol.events import Settings

GRACE = Settings(initial_wait=0.25, minimum_wait=0.05, maximum_wait=60.0)
COMFORTABLE, LATE = 0.6, 0.75
"""Shares of the time that a frame may take."""


@dataclass
class _Habit:
    """What a device's answers are like."""

    coverage: float = 1.0
    """Of its last answer; before the first, as good as any."""
    lag: Estimate = field(default_factory=Estimate)
    """Seconds from a frame's first answer to this device's."""
    silent: bool = False
    """It did not answer when it should have, and nothing has come from it since."""


class Choice:
    """When is the best answer so far the one to take?

    At once when it covers everything, or when no device that is still to answer has lately given a better one; else as
    soon as those that have are later than they usually are. So a device that sees nobody but itself, and answers first,
    is not believed as long as others together know more; and a device that is dead is waited for once.
    """

    def __init__(self, devices: int) -> None:
        """Nothing is known of the devices yet."""
        self._habits = [_Habit() for _ in range(devices)]

    def heard(self, device: int) -> None:
        """Anything came from a device."""
        self._habits[device].silent = False

    def answered(self, device: int, coverage: float, lag_seconds: float) -> None:
        """A device has answered a frame, ``lag_seconds`` after the first one that did; also when it was decided by
        then."""
        habit = self._habits[device]
        habit.coverage = coverage
        habit.lag.observe(lag_seconds)

    def due(self, coverages: Mapping[int, float], waiting: Collection[int], first_at: float | None) -> float | None:
        """When to take the best of ``coverages`` (device -> its answer's coverage): minus infinity for now, None when
        nothing but more answers can tell. ``waiting`` were asked and have said nothing about the frame yet;
        ``first_at`` is when the first answer came."""
        if first_at is None:
            return None if waiting else -math.inf
        hopes = self._hopes(coverages, waiting)
        if max(coverages.values()) == 1.0 or not hopes:
            return -math.inf
        return max(first_at + self._habits[d].lag.deadline(GRACE) for d in hopes)

    def expire(self, coverages: Mapping[int, float], waiting: Collection[int], first_at: float, now: float) -> None:
        """Those that are later than they usually are count as silent from now on."""
        for device in self._hopes(coverages, waiting):
            habit = self._habits[device]
            habit.silent = now >= first_at + habit.lag.deadline(GRACE)

    def _hopes(self, coverages: Mapping[int, float], waiting: Collection[int]) -> list[int]:
        best = max(coverages.values(), default=-1.0)
        return [d for d in waiting if not self._habits[d].silent and self._habits[d].coverage > best]


class Pace:
    """How many frames a client has under way at once, and how long devices may take for them.

    The first frame goes alone. There may be more of them as long as each would come back early even if more frames took
    longer in proportion, and fewer as soon as they come back late.
    """

    def __init__(self, window: int, timeout_seconds: float, devices: int) -> None:
        """At most ``window`` of them."""
        self._window, self._timeout_seconds = window, timeout_seconds
        self._under_way = [Estimate() for _ in range(devices)]
        self._heard_at = [-math.inf] * devices
        self.allowed = 1
        """The number of frames."""

    def finished(self, latency_seconds: float, among: int, late: bool = False) -> None:
        """A frame has come back, or its time has run out; ``among`` were under way when it left, it included. ``late``:
        devices had no time to wait for each other."""
        used = latency_seconds / self._timeout_seconds
        if late or used > LATE:
            self.allowed = min(self.allowed, max(1, among // 2))
        elif used * (self.allowed + 1) / among < COMFORTABLE:
            self.allowed = min(self._window, self.allowed + 1)

    def answered(self, device: int, under_way_seconds: float, now: float) -> None:
        """A frame and its answer were under way for so long, without the time that the device took."""
        self._under_way[device].observe(max(0.0, under_way_seconds))
        self._heard_at[device] = now

    def unanswered(self, asked: Mapping[int, float]) -> None:
        """Nobody has answered a frame in time; these were asked, and when. What was known then of the ways of those
        that have answered nothing since is not true any more."""
        for device, asked_at in asked.items():
            if self._heard_at[device] < asked_at:
                self._under_way[device] = Estimate()

    def given(self, devices: Collection[int], remaining_seconds: float) -> float:
        """How long ``devices`` that work on a frame together may take, so that two of their answers are here in time,
        if their ways are as they were.

        All of them equally long, also those that are further away: whoever has less time than others goes on without
        them, and leaves them to do without what it could have had.
        """
        known = sorted(self._under_way[device].bound for device in devices if self._under_way[device].mean is not None)
        under_way = known[min(1, len(known) - 1)] if known else 0.0
        return max(remaining_seconds - under_way, remaining_seconds / 4)
