"""A slow network on this machine: a network namespace whose loopback interface carries so many bits per second.

Everything that runs in it shares the one link, as devices on one radio channel or behind one hub do. Or several of them
on one switch, whose links can be cut. Needs root and Linux's iproute2 (``ip``, ``tc``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BURST_BYTES = 8_000


def permitted() -> str | None:
    """Why namespaces cannot be used here, or None when they can."""
    if not shutil.which("ip") or not shutil.which("tc"):
        return "iproute2 (ip, tc) is not installed"
    name = f"robustdice-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


@contextlib.contextmanager
def shared_link(megabits: float | None, queue_ms: float = 50.0) -> Iterator[list[str]]:
    """The words to put in front of a command so that it runs behind a link of ``megabits`` per second (None: as fast as
    the machine). What is sent too fast waits up to ``queue_ms`` (that is the delay of the loaded link), and is
    dropped beyond."""
    name = f"robustdice-{os.getpid()}"
    _ip("netns", "add", name)
    try:
        _within(name, "ip", "link", "set", "lo", "mtu", "1500", "up")
        if megabits is not None:
            shape = ["rate", f"{megabits}mbit", "burst", str(BURST_BYTES), "latency", f"{queue_ms}ms"]
            _within(name, "tc", "qdisc", "add", "dev", "lo", "root", "tbf", *shape)
        yield ["ip", "netns", "exec", name]
    finally:
        _ip("netns", "delete", name)


@dataclass(frozen=True)
class Switch:
    """Network namespaces on one bridge, numbered from 0, each with an address of its own."""

    name: str

    def prefix(self, number: int) -> list[str]:
        """The words to put in front of a command that is to run in one."""
        return ["ip", "netns", "exec", self._namespace(number)]

    def address(self, number: int) -> str:
        return f"10.213.0.{number + 1}"

    def cut(self, source: int, target: int) -> None:
        """What one sends to another gets lost."""
        _within(self._namespace(source), "ip", "route", "add", "blackhole", f"{self.address(target)}/32")

    def heal(self, source: int, target: int) -> None:
        """It arrives again."""
        with contextlib.suppress(subprocess.CalledProcessError):
            _within(self._namespace(source), "ip", "route", "delete", "blackhole", f"{self.address(target)}/32")

    def _namespace(self, number: int) -> str:
        return f"{self.name}-{number}"


@contextlib.contextmanager
def one_switch(count: int) -> Iterator[Switch]:
    """So many namespaces, and one more for the bridge between them."""
    switch = Switch(f"robustdice-{os.getpid()}")
    hub = f"{switch.name}-hub"
    names = [hub, *(f"{switch.name}-{number}" for number in range(count))]
    try:
        for name in names:
            _ip("netns", "add", name)
            _within(name, "ip", "link", "set", "lo", "up")
        _within(hub, "ip", "link", "add", "bridge", "type", "bridge")
        _within(hub, "ip", "link", "set", "bridge", "up")
        for number, name in enumerate(names[1:]):
            _within(hub, "ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _within(hub, "ip", "link", "set", f"port{number}", "master", "bridge", "up")
            _within(name, "ip", "address", "add", f"{switch.address(number)}/24", "dev", "eth0")
            _within(name, "ip", "link", "set", "eth0", "up")
        yield switch
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def _within(name: str, *command: str) -> None:
    _run(["ip", "netns", "exec", name, *command])


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
