"""Devices of a build on this machine, each a process in a network of its own behind a switch, and a client beside them.

Where network namespaces are not permitted they run on loopback, and whoever shows figures says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from robustdice.errors import ClusterError
from robustdice.meter.netns import Switch
from robustdice.meter.throughput import BenchResult, DeviceFigures
from robustdice.runtime.wire.config import CLUSTER_NAME

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Place:
    """Where devices run: the words in front of each one's command and of the client's, and the devices' hosts (None:
    all on loopback)."""

    devices: tuple[tuple[str, ...], ...]
    client: tuple[str, ...]
    hosts: tuple[str, ...] | None


def behind(switch: Switch, devices: int) -> Place:
    """On the first ports of a switch, with the client on the next one."""
    *prefixes, client = (tuple(switch.prefix(number)) for number in range(devices + 1))
    return Place(tuple(prefixes), client, tuple(map(switch.address, range(devices))))


def on_loopback(devices: int) -> Place:
    """All in this network, as fast as the machine."""
    return Place(((),) * devices, (), None)


@dataclass(frozen=True)
class Running:
    """The devices of a build, which run."""

    build: Path
    place: Place
    processes: tuple[subprocess.Popen[bytes], ...]
    logs: tuple[IO[bytes], ...]

    def measure(
        self, *, seconds: float = 1.0, samples: int | None = None, window: int = 4, frames: Path | None = None
    ) -> BenchResult:
        """From a client beside the devices, after up to a second that does not count: for ``seconds``, or for
        ``samples``, a random frame, or those of a .npy file in turn. ClusterError when a device ends, or no frame is
        answered."""
        command = [*self.place.client, sys.executable, "-m", "robustdice.meter.stream", str(self.build)]
        command += ["--seconds", str(seconds), "--window", str(window)]
        command += [] if samples is None else ["--samples", str(samples)]
        command += [] if frames is None else ["--frames", str(frames)]
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as wrong, contextlib.ExitStack() as started:
            client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=wrong)  # noqa: S603
            started.callback(_end, client)
            while client.poll() is None:
                self._check()
                time.sleep(LOOK_SECONDS)
            self._check()
            if client.returncode:
                raise ClusterError(f"the devices could not be measured: {_last_line(wrong)}")
            said.seek(0)
            return _result(json.loads(said.read()))

    def _check(self) -> None:
        for device, (process, log) in enumerate(zip(self.processes, self.logs, strict=True)):
            if process.poll() is not None:
                raise ClusterError(f"device {device} has ended: {_last_line(log)}")


@contextlib.contextmanager
def running(build: Path, place: Place) -> Iterator[Running]:
    """Start the devices of a build, on one core each (device k on core k modulo their number). They end with this, or
    when this process ends in any way."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as started:
        processes, logs = [], []
        for device, prefix in enumerate(place.devices):
            command = [*prefix, sys.executable, "-m", "robustdice.runtime.device", str(build / f"device-{device}")]
            command += ["--cluster", str(build / CLUSTER_NAME), "--watch-stdin"]
            logs.append(started.enter_context(tempfile.TemporaryFile()))
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=logs[-1], stderr=logs[-1])  # noqa: S603
            started.callback(_end, process)
            os.sched_setaffinity(process.pid, {cores[device % len(cores)]})
            processes.append(process)
        yield Running(build, place, tuple(processes), tuple(logs))


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _result(document: dict[str, Any]) -> BenchResult:
    devices = tuple(DeviceFigures(**device) for device in document.pop("devices"))
    return BenchResult(**{**document, "devices": devices})


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
