"""A cluster of device processes on this machine, for trying out, demos, benchmarks and tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import ClusterError
from robustdice.runtime.answer import Answer
from robustdice.runtime.client import Client
from robustdice.runtime.sessions import AUTO
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster
from robustdice.runtime.wire.listen import is_here

START_SECONDS = 60.0


class LocalCluster:
    """Runs every device of the build in ``directory`` as a process of its own; a context manager.

    ``threads`` are used inside one computation; ``cores[k]`` are the CPU cores that device k may use (default: all).
    Entering waits until all devices serve and see each other; ClusterError, with what the device said last, when one
    does not. The processes end with :meth:`close`, or when this process ends in any way.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        threads: int = 1,
        cores: Sequence[Sequence[int]] | None = None,
        timeout_seconds: float = 2.0,
        window: int = 4,
        provider: str = AUTO,
    ) -> None:
        """Read the cluster file; nothing is started yet. The timeout and the window are the client's, the provider is
        every device's."""
        self.directory = Path(directory)
        self.cluster = Cluster.read(self.directory / CLUSTER_NAME)
        self.devices = len(self.cluster.devices)
        self._threads, self._cores, self._provider = threads, cores, provider
        self._client_settings = timeout_seconds, window
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: dict[int, Path] = {}
        self._resources = contextlib.ExitStack()
        self._client: Client | None = None

    def __enter__(self) -> LocalCluster:
        for entry in self.cluster.devices:
            if not is_here(Address.parse(entry.listens_on)):
                raise ClusterError(
                    f"this machine has no address {entry.listens_on}, on which {entry.name} listens: only a cluster on "
                    "one machine can be run here; on a device, 'robustdice device' runs its own bundle"
                )
        try:
            folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="robustdice-"))
            self._logs = {device: Path(folder) / f"device-{device}.log" for device in range(self.devices)}
            self._client = self._resources.enter_context(
                Client(self.directory / CLUSTER_NAME, None, *self._client_settings)
            )
            for device in range(self.devices):
                self._start(device)
            self.wait()
            if killed := [device for device in range(self.devices) if self.process(device) is None]:
                raise ClusterError(f"device {killed[0]} was killed while it started: memory may have run out")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def client(self) -> Client:
        """A client of this cluster; ClusterError outside of the ``with`` statement."""
        if self._client is None:
            raise ClusterError("the cluster is not running; use it in a 'with' statement")
        return self._client

    def infer(self, image: NDArray[np.float32]) -> Answer:
        """The answer for one frame, float32 ``[C, H, W]``; see :meth:`Client.infer`."""
        return self.client.infer(image)

    def process(self, device: int) -> int | None:
        """The process id of a device, or None while it is down."""
        process = self._processes.get(device)
        return process.pid if process is not None and process.poll() is None else None

    def log(self, device: int, start: int = 0) -> str:
        """What a device has written to its log so far, from byte ``start`` on."""
        path = self._logs.get(device)
        if path is None or not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode("utf-8", "replace")

    def last_words(self, device: int) -> str:
        """The last lines that a device has written to its log."""
        lines = self.log(device).strip().splitlines()
        return " | ".join(lines[-3:]) if lines else "it said nothing"

    def kill(self, device: int) -> None:
        """End a device at once, as a power cut would (SIGKILL)."""
        process = self._running(device)
        process.kill()
        self._reap(device, process)

    def freeze(self, device: int) -> None:
        """Stop a device in its tracks (SIGSTOP): its connections stay, it says nothing."""
        self._running(device).send_signal(signal.SIGSTOP)

    def thaw(self, device: int) -> None:
        """Let a frozen device go on (SIGCONT)."""
        self._running(device).send_signal(signal.SIGCONT)

    def restart(self, device: int) -> None:
        """Start a device that is down; returns at once, :meth:`wait` waits until it takes part."""
        if self.process(device) is not None:
            raise ClusterError(f"device {device} is running; kill it first")
        self._start(device)

    def wait(self, timeout_seconds: float = START_SECONDS) -> None:
        """Until every device that runs serves, and sees all others that run; ClusterError when one ends or does not."""
        end = time.monotonic() + timeout_seconds
        while True:
            running = {device for device in self._processes if self.process(device) is not None}
            if ended := [d for d, process in self._processes.items() if process.poll() not in {None, -signal.SIGKILL}]:
                raise ClusterError(f"device {ended[0]} could not start: {self.last_words(ended[0])}")
            views = {device: set(status["up"]) for device, status in self.client.status(0.2).items()}
            if all(running <= views.get(device, set()) for device in running):
                return
            if time.monotonic() > end:
                late = min(device for device in running if not running <= views.get(device, set()))
                raise ClusterError(
                    f"device {late} does not see all others after {timeout_seconds:.0f} s: {self.last_words(late)}"
                )
            time.sleep(0.02)

    def close(self) -> None:
        """End every process, frozen ones too, and clean up; more than once is fine."""
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        end = time.monotonic() + 3.0
        for device, process in list(self._processes.items()):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
            self._reap(device, process)
        self._client = None
        self._resources.close()

    def _start(self, device: int) -> None:
        command = [sys.executable, "-m", "robustdice.runtime.device", str(self.directory / f"device-{device}")]
        command += ["--cluster", str(self.directory / CLUSTER_NAME), "--threads", str(self._threads), "--watch-stdin"]
        command += ["--provider", self._provider]
        with self._logs[device].open("ab") as log:
            process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log
            )
        self._processes[device] = process
        if self._cores is not None:
            os.sched_setaffinity(process.pid, self._cores[device])

    def _running(self, device: int) -> subprocess.Popen[bytes]:
        process = self._processes.get(device)
        if process is None or process.poll() is not None:
            raise ClusterError(f"device {device} is not running; restart it first")
        return process

    def _reap(self, device: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        del self._processes[device]
