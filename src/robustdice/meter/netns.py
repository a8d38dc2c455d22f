"""Slow networks on this machine, of network namespaces: one link that all share, or a switch with a port for each.

Needs root and Linux's iproute2 (``ip``, ``tc``). Namespaces are removed again, also those that a process which was
killed has left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustdice.errors import ClusterError

BURST_BYTES = 8_000
BURST_SECONDS = 0.001
"""A faster link sends what it may within this time at once: timers are no finer."""
PREFIX = "robustdice"


def permitted() -> str | None:
    """Why namespaces cannot be used here, or None when they can."""
    if not shutil.which("ip") or not shutil.which("tc"):
        return "iproute2 (ip, tc) is not installed"
    try:
        with one_switch(1) as switch:
            switch.limit([0], 100.0)
    except ClusterError as error:
        return f"network namespaces, bridges and limits are not permitted: {error}"
    return None


@dataclass(frozen=True)
class Switch:
    """Network namespaces on one bridge, numbered from 0, each with an address of its own."""

    hub: str
    members: tuple[str, ...]

    def prefix(self, number: int) -> list[str]:
        """The words to put in front of a command that is to run in one."""
        return words(self.members[number])

    def address(self, number: int) -> str:
        """Where it is reached."""
        return f"10.213.0.{number + 1}"

    def limit(self, numbers: Sequence[int], megabits: float | None, queue_ms: float = 50.0) -> None:
        """From now on the ports of these carry so much, either way (None: as much as the machine does)."""
        for number in numbers:
            for name, device in ((self.members[number], "eth0"), (self.hub, f"port{number}")):
                with contextlib.suppress(ClusterError):  # there was no limit
                    within(name, "tc", "qdisc", "del", "dev", device, "root")
                if megabits is not None:
                    limit(name, device, megabits, queue_ms)


@contextlib.contextmanager
def one_switch(count: int) -> Iterator[Switch]:
    """So many namespaces, and one more for the bridge between them, which is as fast as the machine."""
    with namespaces("hub", *map(str, range(count))) as (hub, *members):
        switch = Switch(hub, tuple(members))
        for name in (hub, *members):
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for number, name in enumerate(members):
            port = f"port{number}"
            _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{switch.address(number)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield switch


@contextlib.contextmanager
def namespaces(*wanted: str) -> Iterator[list[str]]:
    """One for each word, until the end; first, what processes that have ended left is cleared away."""
    for left in _left_behind():
        with contextlib.suppress(ClusterError):  # another process has cleared it away
            _ip("netns", "delete", left)
    names = [f"{PREFIX}-{os.getpid()}-{word}" for word in wanted]
    with contextlib.ExitStack() as made:
        for name in names:
            _ip("netns", "add", name)
            made.callback(_ip, "netns", "delete", name)
        yield names


def _left_behind() -> list[str]:
    found = [line.split()[0].split("-") for line in _ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]
    return ["-".join(each) for each in found if len(each) > 2 and not Path("/proc", each[1]).exists()]


def limit(name: str, device: str, megabits: float, queue_ms: float) -> None:
    """What a namespace's ``device`` sends is so much from now on; what is too fast waits up to ``queue_ms``, and is
    dropped beyond."""
    burst = max(BURST_BYTES, int(megabits * 1e6 / 8 * BURST_SECONDS))
    shape = ["rate", f"{megabits}mbit", "burst", str(burst), "latency", f"{queue_ms}ms"]
    within(name, "tc", "qdisc", "add", "dev", device, "root", "tbf", *shape)


def words(name: str) -> list[str]:
    """What stands in front of a command that is to run in a namespace."""
    return ["ip", "netns", "exec", name]


def within(name: str, *command: str) -> None:
    """Run a command in a namespace; ClusterError when it fails."""
    _run([*words(name), *command])


def _ip(*words: str) -> str:
    return _run(["ip", *words])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise ClusterError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
    return done.stdout
