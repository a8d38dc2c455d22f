"""A slow network on this machine: a network namespace whose loopback interface carries so many bits per second.

Everything that runs in it shares the one link, as devices on one radio channel or behind one hub do. Needs root and
Linux's iproute2 (``ip``, ``tc``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

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


def _within(name: str, *command: str) -> None:
    _run(["ip", "netns", "exec", name, *command])


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
