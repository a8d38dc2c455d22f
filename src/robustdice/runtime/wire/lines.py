"""The lines from a device or a client to the devices of its cluster, and what is the matter with each."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

import zmq

from robustdice.runtime.journal import say
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.config import DeviceEntry
from robustdice.runtime.wire.line import Line, Reach
from robustdice.runtime.wire.refusals import Reminders
from robustdice.runtime.wire.watch import Socket, Watch

log = logging.getLogger(__name__)

_COMPLAINTS = {
    Reach.REFUSED: "refused-by",
    Reach.OTHER_KEY: "other-key",
    Reach.OTHER_TRANSPORT: "other-transport",
}


class Lines(dict[int, Line]):
    """A line to each of some devices, by device number."""

    def __init__(
        self,
        context: zmq.Context[Any],
        watch: Watch,
        devices: Mapping[int, DeviceEntry],
        transport: str,
        keys: tuple[bytes, bytes],
        limit: int,
        speaker: int | None = None,
    ) -> None:
        """Nothing is dialled before :meth:`tend`. ``speaker`` is the device that these are of; None: they are a
        client's."""
        super().__init__(
            (
                number,
                Line(context, watch, Address.parse(entry.address), transport, keys, entry.public_key, limit),
            )
            for number, entry in devices.items()
        )
        self._speaker = speaker
        self.restless = set(self)
        """Devices whose lines :meth:`tend` has something to do for, sooner or later; none while all lines stand."""
        self._reminders = Reminders()
        self._other_builds: dict[int, str] = {}
        """Devices that speak of another plan, and what the difference is; until they say something else."""

    @property
    def due(self) -> float | None:
        """When :meth:`tend` has something to do."""
        return min((due for device in self.restless if (due := self[device].due) is not None), default=None)

    def tend(self, now: float) -> None:
        """Dial whoever is to be dialled."""
        for device in list(self.restless):
            self[device].tend(now)
            if self[device].due is None:
                self.restless.discard(device)

    def changes(self, ready: Collection[Socket]) -> list[tuple[int, bool]]:
        """Connections made (True) and lost (False), where these sockets are ready."""
        found: list[tuple[int, bool]] = []
        for device, line in self.items():
            if line.monitor in ready:
                now = time.monotonic()
                changes = line.changes(now)
                if False in changes:
                    self._other_builds.pop(device, None)  # whoever comes next says again what it is
                found += [(device, up) for up in changes]
                self._look_after(device, line, now)
        return found

    def meet_other_build(self, device: int, difference: str, now: float) -> None:
        """A device has said something that shows that it is of another build."""
        self._other_builds[device] = f"is of another build: {difference}"
        self._complain(device, "other-build", self._other_builds[device], now)

    def meet_same_build(self, device: int | None) -> None:
        """A device has said something that makes sense."""
        if self._other_builds:
            self._other_builds.pop(device, None)  # type: ignore[arg-type]

    def states(self) -> dict[int, str]:
        """How each device can be reached: what follows its name in a sentence."""
        return {device: line.reach.value for device, line in self.items()} | self._other_builds

    def troubles(self) -> dict[int, str]:
        """Why devices cannot be asked, by device number, as far as it is known by now: what follows its name in a
        sentence, such as "refuses our key"."""
        return {device: state for device, state in self.states().items() if state != Reach.CONNECTED.value}

    def unreachable(self, here: bool) -> str:
        """Why no device answers, as far as that is known, and a client's way out; ``here``: all are of this machine."""
        troubles = self.troubles()
        if not troubles:
            return "no device answered in time"
        if len(set(troubles.values())) == 1:
            addresses = ", ".join(str(self[device].address) for device in troubles)
            reasons = f"each {troubles[min(troubles)]} ({addresses})"
        else:
            reasons = "; ".join(f"device {d} at {self[d].address} {trouble}" for d, trouble in troubles.items())
        if set(troubles.values()) <= {Reach.NOBODY.value, Reach.UNKNOWN_NAME.value}:
            on_each = "'robustdice device DIR/device-K' on each, and see that they are on"
            remedy = "start them with " + ("'robustdice up DIR'" if here else on_each)
        elif Reach.REFUSED.value in troubles.values():
            remedy = "list this client's public key in the devices' cluster.toml and restart them"
        elif Reach.FULL.value in troubles.values():
            remedy = "close other clients that use this key, or list a key of this one's own"
        else:
            remedy = "copy all of one build to the devices and here, and restart them"
        return f"none of {len(self)} devices can be reached: {reasons}; {remedy}"

    def close(self) -> None:
        """Disconnect all of them."""
        for line in self.values():
            line.close()

    def _look_after(self, device: int, line: Line, now: float) -> None:
        """Something has happened to a line: is there anything to do later, or to say?"""
        if line.due is not None:
            self.restless.add(device)
        if (event := _COMPLAINTS.get(line.reach)) is not None:
            self._complain(device, event, line.reach.value, now, "; it is tried again")
        elif line.connected and self._reminders.settled(device):
            text = f"device {device} ({line.address}) can be reached now"
            say(log, text, event="reached", device=self._speaker, peer=device)

    def _complain(self, device: int, event: str, reason: str, now: float, more: str = "") -> None:
        if self._reminders.due(device, reason, now):
            text = f"device {device} ({self[device].address}) {reason}{more}"
            say(log, text, event=event, device=self._speaker, peer=device, reason=reason, level=logging.WARNING)
