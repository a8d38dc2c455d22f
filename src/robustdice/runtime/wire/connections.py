"""The connections that a device has accepted: whose they are, and how much of what came on them nobody has read yet.

libzmq bounds the size of a part of a message and how many messages wait. It bounds neither the parts of a message,
which it gathers before anybody sees them, nor connections. But it says which file descriptor it has accepted (its
monitor) and which one a message came on (ZMQ_SRCFD), and the kernel counts what it has handed over of each (Linux:
TCP_INFO). What was handed over and not read as messages lies in libzmq's memory: whoever has more there than a client
needs is cut off, and what was gathered is dropped with the connection.

Descriptors belong to libzmq, which may close one and get the same number again at any time: they are duplicated for a
moment, and used only if they still lead to the address that they led to when they were accepted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket as sockets
import struct
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

MOST_OF_A_KEY = 32
"""Connections of a client's key."""
MOST_SILENT = 64
"""Connections that nothing was said on yet: whoever they are of is not known before."""
MOST_PARTS = 8
"""Of a client's message: a header and an array are two."""
HELD_BYTES = 2 * 2**20
HELD_FRAMES = 8
"""What may wait to be read of a key, on all its connections: so many bytes, and so many of the network's inputs."""
BESIDE_BYTES = 1024
"""What may have come with a message that is not in it: its encryption, and heartbeats since the one before, which a
client of another kind may send."""
LOOK_SECONDS = 0.02
QUIET_SECONDS = 600.0
"""Such heartbeats alone reach the bound, of one connection after hours, of a key's most in no less than this; a
connection that ends then is nobody's misuse, and comes back."""
_AT_ONCE = struct.pack("ii", 1, 0)
"""Of SO_LINGER: libzmq closes what was shut down, and the other side is told to stop sending, not just that nobody will
answer."""
_BYTES_RECEIVED = struct.Struct("=128xQ")
"""``tcpi_bytes_received`` of Linux's ``struct tcp_info``, since 4.1."""


class Misuse(NamedTuple):
    """A connection that was cut off: of which address, of whose key (None: it had said nothing), and why."""

    address: str
    key: str | None
    reason: str


@dataclass
class _Connection:
    peer: Any
    """Address and port of the other side, as the system gives them."""
    heard_at: float
    """When a message was read last; at first, when it was accepted."""
    key: str | None = None
    read: int = 0
    """Bytes that were read as messages, or came beside them."""
    held: int = 0
    """Bytes that wait in libzmq, when they were looked at last."""


class Connections:
    """Those that are not of devices: these are trusted. ``input_bytes`` is the size of a frame's array."""

    def __init__(self, input_bytes: int) -> None:
        """Nobody is connected."""
        self.limit = HELD_BYTES + HELD_FRAMES * input_bytes
        self.due = 0.0
        """When to :meth:`look` again."""
        self._open: dict[int, _Connection] = {}
        """By descriptor, those that were accepted first are first."""

    @property
    def any(self) -> bool:
        """Whether there is anybody to look at."""
        return bool(self._open)

    def opened(self, descriptor: int, port: int, now: float) -> Misuse | None:
        """libzmq has accepted a connection at this port. When too many are silent, the one that has been for longest is
        cut off."""
        self._open.pop(descriptor, None)
        with _borrowed(descriptor) as connection:
            peer = None if connection is None or connection.getsockname()[1] != port else _peer_of(connection)
        if peer is None:
            return None  # it is gone already; the number may be that of a connection to a peer by now
        self._open[descriptor] = _Connection(peer, now)
        silent = [each for each, known in self._open.items() if known.key is None]
        if len(silent) <= MOST_SILENT:
            return None
        return self._cut(silent[0], f"one of more than {MOST_SILENT} connections on which nothing was said")

    def closed(self, descriptor: int) -> None:
        """A connection is gone, or turned out to be a device's."""
        self._open.pop(descriptor, None)

    def knows(self, descriptor: int) -> bool:
        """Whether it is watched."""
        return descriptor in self._open

    def full(self, key: str) -> bool:
        """Whether a client's key has as many connections as it may have."""
        return sum(known.key == key for known in self._open.values()) >= MOST_OF_A_KEY

    def heard(self, descriptor: int, key: str, parts: int, size: int, now: float) -> Misuse | None:
        """A client with this key has said something in so many parts, on a connection that is known. When it may not,
        it is cut off, and what it said is to be dropped."""
        known = self._open[descriptor]
        if known.key != key and self.full(key):
            return self._cut(descriptor, f"its key has {MOST_OF_A_KEY} connections already", key)
        known.key, known.heard_at = key, now
        known.read += size + BESIDE_BYTES
        if parts > MOST_PARTS:
            return self._cut(descriptor, f"a message in more than {MOST_PARTS} parts")
        return None

    def look(self, now: float) -> list[Misuse]:
        """Cut off what holds most, of every key whose connections together hold too much."""
        self.due = now + LOOK_SECONDS
        sums: dict[str | None, int] = {}
        for descriptor, known in list(self._open.items()):
            handed_over = _handed_over(descriptor, known.peer)
            if handed_over is None:
                continue  # libzmq will say that it is gone
            known.read = min(known.read, handed_over)
            known.held = handed_over - known.read
            sums[known.key] = sums.get(known.key, 0) + known.held
        found = []
        for key in [key for key, held in sums.items() if held > self.limit]:
            descriptor, worst = max(
                (entry for entry in self._open.items() if entry[1].key == key), key=lambda entry: entry[1].held
            )
            reason = f"more than {self.limit} bytes wait to be read, or to become a whole message"
            misuse = self._cut(descriptor, reason)
            if now - worst.heard_at < QUIET_SECONDS:
                found.append(misuse)
        return found

    def _cut(self, descriptor: int, reason: str, key: str | None = None) -> Misuse:
        known = self._open.pop(descriptor)
        with _borrowed(descriptor, known.peer) as connection:
            if connection is not None:
                with contextlib.suppress(OSError):  # the other side was faster
                    connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, _AT_ONCE)
                    connection.shutdown(sockets.SHUT_RDWR)
        return Misuse(str(known.peer[0]), key or known.key, reason)


@contextlib.contextmanager
def _borrowed(descriptor: int, peer: Any = None) -> Iterator[sockets.socket | None]:
    """A duplicate for a moment; None when it is no connection any more, or none to ``peer``."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        yield None
        return
    try:
        connection = sockets.socket(fileno=copy)
    except OSError:
        os.close(copy)
        yield None
        return
    with connection:
        other = connection.family not in (sockets.AF_INET, sockets.AF_INET6)
        yield None if other or peer not in (None, _peer_of(connection)) else connection


def _peer_of(connection: sockets.socket) -> Any:
    """Who is at the other end; None when that has gone."""
    try:
        return connection.getpeername()
    except OSError:
        return None


def _handed_over(descriptor: int, peer: Any) -> int | None:
    """Bytes of a connection that libzmq has from the kernel; None when it is gone, or where the kernel does not say."""
    if sys.platform != "linux":
        return None
    with _borrowed(descriptor, peer) as connection:
        if connection is None:
            return None
        try:
            told = connection.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _BYTES_RECEIVED.size)
            (waiting,) = struct.unpack("=i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))
        except OSError:
            return None
        if len(told) < _BYTES_RECEIVED.size:
            return None
        return int(_BYTES_RECEIVED.unpack(told)[0]) - int(waiting)
