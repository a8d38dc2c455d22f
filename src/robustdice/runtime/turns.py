"""Plans without an exchange: each frame is computed by one device, and devices take turns.

Pure: times are passed in, in seconds of any one clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from robustdice.runtime.protocol.deadlines import Estimate
from robustdice.runtime.protocol.events import Settings

PATIENCE = Settings(initial_wait=0.5, minimum_wait=0.1, maximum_wait=5.0)


class Turns:
    """Whom a frame is given to, and how long its answer is waited for before the next device gets it too."""

    def __init__(self, devices: int) -> None:
        """Nothing is known of the devices yet."""
        self._latency = [Estimate() for _ in range(devices)]
        self._silent: set[int] = set()
        """Devices that did not answer in time, until anything comes from them."""

    def heard(self, device: int) -> None:
        """Anything came from a device."""
        self._silent.discard(device)

    def answered(self, device: int, seconds: float) -> None:
        """A device has answered a frame so long after it was sent."""
        self._latency[device].observe(seconds)

    def order(self, frame: int, loads: Mapping[int, int], had: Collection[int]) -> list[int]:
        """The devices to offer a frame to, best first: those that answer, then those with the fewest frames to compute
        (``loads``), then whose turn it is. Not those that have ``had`` it."""
        devices = len(self._latency)
        candidates = (device for device in range(devices) if device not in had)
        return sorted(candidates, key=lambda d: (d in self._silent, loads.get(d, 0), (d - frame) % devices))

    def overdue_at(self, device: int, asked_at: float, load: int) -> float:
        """When an answer is overdue that a device was asked for at ``asked_at`` and has ``load`` frames to compute."""
        latency = self._latency[device]
        return asked_at + latency.deadline(PATIENCE) + load * (latency.mean or 0.0)

    def missed(self, devices: Iterable[int]) -> None:
        """Devices did not answer in time: the others come first from now on."""
        self._silent.update(devices)
