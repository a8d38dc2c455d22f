"""Listening on an address that may not be there yet: after a power cut everything comes up at once."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from typing import Any

import zmq

from robustdice.errors import ClusterError
from robustdice.runtime.journal import say
from robustdice.runtime.wire.address import ANY, Address, Lookup

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 5.0
SAY_SECONDS = 60.0
STOP_POLL_SECONDS = 0.05
IN_USE_SECONDS = 1.0
"""So long another may listen at the port: a device that has just ended, and that this one takes the place of."""
LONGEST_IN_USE_SECONDS = 60.0
"""And so long whoever else has it: not everybody who listens can be found by asking."""
NOT_YET = {errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENETDOWN, errno.ENETUNREACH}
"""What binding says while a network interface or its address is missing."""


def bind_in_time(router: zmq.Socket[Any], address: Address, device: int, stop: threading.Event) -> Address | None:
    """Bind ``router`` to ``address``; the numeric address that it is bound to, or None when ``stop`` was set before.

    As long as this machine has no such address, or cannot say what a name means, or a connection of somebody's happens
    to have the port, it is tried again, less and less often, and the log says so once a minute. ClusterError when
    waiting would not help; where another listens at the port, after a moment, and after a minute in any case.
    """
    wait, said_at, started = FIRST_WAIT_SECONDS, float("-inf"), time.monotonic()
    while True:
        lookup = Lookup(address)
        while not lookup.done.wait(STOP_POLL_SECONDS):
            if stop.is_set():
                return None
        if not lookup.found:
            reason = f"its name has no address ({lookup.error})"
        elif (hindrance := _bind(router, lookup.found[0], time.monotonic() - started)) is None:
            return lookup.found[0]
        else:
            reason = hindrance
        now = time.monotonic()
        if now >= said_at + SAY_SECONDS:
            said_at = now
            text = (
                f"device {device} cannot listen on {address} yet: {reason}; it is tried again. If others "
                "are not to reach it there, correct cluster.toml (listen = ... where the two differ)"
            )
            say(log, text, event="waiting", device=device, reason=reason, level=logging.WARNING)
        if stop.wait(wait):
            return None
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def is_here(address: Address) -> bool:
    """Does this machine have the address, or the one that a name means?"""
    if address.host == ANY:
        return True
    try:
        family, kind, _, _, place = socket.getaddrinfo(address.host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(place)
    except (OSError, UnicodeError):
        return False
    return True


def _bind(router: zmq.Socket[Any], address: Address, waited: float) -> str | None:
    """Why not yet, if that may change; ``waited``: for so many seconds others could have let go of the port."""
    router.ipv6 = address.ipv6
    try:
        router.bind(str(address))
    except zmq.ZMQError as error:
        if error.errno in NOT_YET or (error.errno == errno.EINVAL and "%" in address.host):  # no such interface yet
            return f"this machine has no address {address.host}"
        if error.errno == errno.EADDRINUSE:
            if waited < LONGEST_IN_USE_SECONDS and (waited < IN_USE_SECONDS or not _somebody_listens(address)):
                return f"port {address.port} is in use"
            reason, remedy = "it is in use", "stop the other program, or give the device another address"
        elif error.errno == errno.EACCES:
            reason, remedy = "not permitted", "ports below 1024 are the system's: give the device another port"
        else:
            reason, remedy = zmq.strerror(error.errno or 0), "give the device another address"
        raise ClusterError(f"cannot listen on {address}: {reason}; {remedy} in cluster.toml") from None
    return None


def _somebody_listens(address: Address) -> bool:
    """Else it is a connection to elsewhere that has the port, which ends sooner or later."""
    host = "localhost" if address.host == ANY else address.host
    try:
        socket.create_connection((host, address.port), STOP_POLL_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # its queue is full
        return True
    return True
