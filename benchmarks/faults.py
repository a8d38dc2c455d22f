"""Devices of a local cluster that fail all the time, on a random schedule, and what their processes have in memory."""

from __future__ import annotations

import random
import resource
import threading
import time
from collections import Counter
from pathlib import Path

from robustdice.errors import ClusterError
from robustdice.runtime.cluster import LocalCluster

SETTLED_SECONDS = 1.0
"""After it has begun to serve, a device counts as well."""
PAUSES = 0.3, 1.5
"""Between two faults, in seconds."""
LASTS = 0.1, 2.0
"""What was frozen goes on after so many seconds, what was killed starts again."""


class Faults(threading.Thread):
    """Kills, freezes and restarts, until it is told to ``stop``. One device that is well is left alone at any time;
    ``never_killed`` is only frozen, so that its process lives as long as the run."""

    def __init__(self, cluster: LocalCluster, seed: int, never_killed: int | None = None) -> None:
        """Nothing fails before :meth:`start`."""
        super().__init__(name="faults", daemon=True)
        self._cluster, self._random = cluster, random.Random(seed)  # noqa: S311
        self._never_killed = never_killed
        self._over = threading.Event()
        self.well_since = dict.fromkeys(range(cluster.devices), 0.0)
        """Devices that nothing is wrong with, and since when they serve. Other threads may copy it."""
        self._due: list[tuple[float, str, int]] = []
        self._logs = [Log(cluster, device) for device in range(cluster.devices)]
        self._starts = dict.fromkeys(range(cluster.devices), 1)
        self.count: Counter[str] = Counter()
        self.error: Exception | None = None

    def stop(self) -> float:
        """Go on with nothing, and bring everybody back; when the last device was told to. Raises as :meth:`check`."""
        self._over.set()
        self.join()
        self.check()
        for _, kind, device in self._due:
            self._end(kind, device)
        return time.monotonic()

    def check(self) -> None:
        """Raise what the thread has failed with, if it has: ClusterError when a device has ended by itself."""
        if self.error is not None:
            raise self.error

    @property
    def complaints(self) -> list[str]:
        """What went wrong inside devices, as far as their logs say: the first lines of it."""
        return [complaint for log in self._logs for complaint in log.read().complaints]

    def run(self) -> None:
        """The schedule."""
        try:
            while not self._over.wait(self._random.uniform(*PAUSES)):
                self._next(time.monotonic())
        except Exception as error:
            self.error = error

    def _next(self, now: float) -> None:
        for due in [due for due in self._due if due[0] <= now]:
            self._due.remove(due)
            self._end(*due[1:])
        for device in range(self._cluster.devices):
            busy = device in self.well_since or any(d == device for _, _, d in self._due)
            if not busy and self._logs[device].read().starts == self._starts[device]:
                self.well_since[device] = now
        for device in self.well_since:
            if self._cluster.process(device) is None:
                last = " | ".join(self._cluster.log(device).strip().splitlines()[-3:])
                raise ClusterError(f"device {device} has ended by itself; it said last: {last}")
        settled = [d for d, since in self.well_since.items() if now - since > SETTLED_SECONDS]
        if len(settled) < 2:
            return
        device = self._random.choice(settled)
        del self.well_since[device]
        kind, again = self._random.choice([("kill", "restart"), ("freeze", "thaw")])
        if device == self._never_killed:
            kind, again = "freeze", "thaw"
        getattr(self._cluster, kind)(device)
        self.count[kind] += 1
        self._due.append((now + self._random.uniform(*LASTS), again, device))

    def _end(self, kind: str, device: int) -> None:
        getattr(self._cluster, kind)(device)
        self._starts[device] += kind == "restart"


class Log:
    """What a device writes, read as it grows; of it only counters are kept."""

    def __init__(self, cluster: LocalCluster, device: int) -> None:
        """Nothing is read yet."""
        self._cluster, self._device = cluster, device
        self._read = 0
        self.starts = 0
        """So often the device has begun to serve."""
        self.complaints: list[str] = []
        """The first lines of it that say that something is wrong with the device itself."""

    def read(self) -> Log:
        """Up to the last line that is complete."""
        new = self._cluster.log(self._device, self._read)
        new = new[: new.rfind("\n") + 1]
        self._read += len(new.encode())
        self.starts += new.count(" listens on ")
        wrong = [line for line in new.splitlines() if line.startswith("Traceback") or " failed" in line]
        self.complaints += [f"device {self._device}: {line}" for line in wrong][: 5 - len(self.complaints)]
        return self


def resident_bytes(process: int | str | None) -> int | None:
    """Of a process; None of one that is not there."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * resource.getpagesize()
