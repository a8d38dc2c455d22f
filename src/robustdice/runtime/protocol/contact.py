"""What a device hears of a peer: is it there, how long does a word to it and back take, and is it behind?

Every device sends every peer a :class:`~robustdice.runtime.wire.messages.Pulse` a few times a second, on a way that its
shards do not use. So a peer whose data is still on a slow link is told apart from one that is gone (no pulse), and from
one that is slow itself (its pulse names the frames that wait for nothing but its own work).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from robustdice.runtime.protocol.deadlines import Estimate
from robustdice.runtime.protocol.events import Settings
from robustdice.runtime.wire.messages import FrameId, Pulse

REMEMBERED_SHARDS = 256


class Standing(enum.Enum):
    """Why a peer's shards are not there."""

    SILENT = "silent"  # it was asked, and has not answered in time
    BEHIND = "behind"  # it says that it has not done its part yet
    UNKNOWN = "unknown"  # it was asked, and a word from it may take so long
    ON_THE_WAY = "on the way"  # it says that it has done its part, or waits for others itself


@dataclass
class Contact:
    """One peer, as heard by this device. Times are this device's clock, in seconds, but for those in pulses."""

    heard_at: float = 0.0
    """When anything came from it last."""
    heard_of: bool = False
    """Something has come from it."""
    shards_at: float = 0.0
    """When shards came from it last."""
    lost: bool = False
    """It was silent for too long, and nothing has come since."""
    sent: int = 0
    """The serial number of the last shards that were handed over for it."""
    _underway: deque[tuple[int, float]] = field(default_factory=deque)
    """Shards that it has not said to have got: serial number, and when they were handed over."""
    _of_no_use: int = 0
    """Shards up to this serial number are of frames that went on without it."""
    round_trip: Estimate = field(default_factory=Estimate)
    """Of a word to it and back; what it does in between is not part of it."""
    _told: Pulse | None = None
    _clock: tuple[float, float] | None = None
    """The peer's clock in a pulse that was read as soon as it came, and this device's then."""
    got: int = 0
    """The highest serial number of the shards that came from it."""

    def connected(self, now: float) -> None:
        """A new connection stands: it has time to say something."""
        self.heard_at, self._told, self._clock, self.got = now, None, None, 0
        self._underway.clear()

    def heard(self, now: float) -> bool:
        """Anything has come; True when it was lost."""
        was_lost, self.lost, self.heard_at, self.heard_of = self.lost, False, now, True
        return was_lost

    def take_shards(self, serial: int, now: float) -> None:
        """Shards have come."""
        self.heard_at = self.shards_at = now
        self.heard_of = True
        self.got = max(self.got, serial)

    def take_pulse(self, pulse: Pulse, now: float, awake_since: float, waking: bool = False) -> None:
        """Its pulse has come; this device has not stood still since then. If it is ``waking`` up, nobody knows when the
        pulse came: taken for new, it would show the peer a round trip as long as this device has stood still."""
        self._told = pulse
        if not waking:
            self._clock = pulse.clock, now
        while self._underway and self._underway[0][0] <= pulse.got:
            self._underway.popleft()
        if pulse.echo is not None and awake_since <= pulse.echo <= now:
            self.round_trip.observe(now - pulse.echo)

    def echo(self, now: float) -> float | None:
        """The peer's clock, by a pulse and the time that has passed since."""
        return None if self._clock is None else self._clock[0] + (now - self._clock[1])

    def hand_over(self, serial: int, now: float) -> None:
        """Shards are sent to it."""
        self.sent = serial
        self._underway.append((serial, now))
        if len(self._underway) > REMEMBERED_SHARDS:
            self._underway.popleft()

    def unacknowledged(self, settings: Settings, now: float) -> bool:
        """Whether the first shards under way have been so for longer than it takes a peer that has them to say so."""
        return bool(self._underway) and now - self._underway[0][1] > 2 * settings.pulse

    def take_mark(self, serial: int) -> None:
        """All shards up to this one are here, or lost."""
        self.got = max(self.got, serial)

    def part(self) -> None:
        """A frame goes on without it: what is under way to it is of no use, and in the way of what would be."""
        self._of_no_use = self.sent

    def far(self, settings: Settings, now: float) -> bool:
        """Whether such shards are still under way."""
        while self._underway and now - self._underway[0][1] > settings.given_up:
            self._underway.popleft()
        return bool(self._underway) and self._underway[0][0] <= self._of_no_use

    def stood_still(self, seconds: float, now: float) -> None:
        """This device itself could hear nothing for so long."""
        self.heard_at = min(now, self.heard_at + seconds)

    def silent_at(self, settings: Settings) -> float:
        """From when on it is taken for gone, if nothing comes."""
        return self.heard_at + max(settings.silence, self._gap(settings))

    def _gap(self, settings: Settings) -> float:
        """Seconds between its pulses, as they come here, that are rarely exceeded; one may get lost."""
        return 2 * settings.pulse + self.round_trip.bound

    def standing(self, frame: FrameId, asked_at: float, now: float) -> Standing:
        """Why its shards of a frame are missing, when it was asked for its state at ``asked_at``."""
        if self._told is not None and self._told.echo is not None and self._told.echo >= asked_at:
            return Standing.BEHIND if frame in self._told.owes else Standing.ON_THE_WAY
        return Standing.UNKNOWN if now - asked_at < self.round_trip.bound else Standing.SILENT

    def has_delivered(self, frame: FrameId) -> bool:
        """It owes nothing to a frame, and nothing of it is on the way: what is missing was lost."""
        return self._told is not None and frame not in self._told.owes and self.got >= self._told.sent


class Contacts:
    """All peers of device ``me``, as it hears them."""

    def __init__(self, me: int, devices: int, settings: Settings) -> None:
        """Nothing was heard yet."""
        self._me, self._settings = me, settings
        self.of = {device: Contact() for device in range(devices) if device != me}
        self._serial = 0
        self.pulse_at = 0.0
        """When the peers are to hear the next pulse."""

    def hand_over(self, to: Iterable[int], now: float) -> int:
        """Shards are sent to these peers; their serial number."""
        self._serial += 1
        for device in to:
            self.of[device].hand_over(self._serial, now)
        return self._serial

    def pulse(self, device: int, owes: Iterable[FrameId], now: float, reply: bool = False) -> Pulse:
        """What to say to a peer."""
        contact = self.of[device]
        hears = now < contact.silent_at(self._settings)
        return Pulse(self._me, now, contact.echo(now), reply, contact.sent, contact.got, tuple(owes), hears)

    def silent(self, devices: Iterable[int], now: float) -> list[int]:
        """Those of ``devices`` that nothing has come from for too long."""
        return [device for device in devices if now >= self.of[device].silent_at(self._settings)]

    def stood_still(self, seconds: float, now: float) -> None:
        """This device heard nothing for so long, and that was its own fault."""
        for contact in self.of.values():
            contact.stood_still(seconds, now)
