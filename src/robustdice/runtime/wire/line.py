"""One outgoing connection, kept up: dialled again after whatever has ended it, and able to say why it is down."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any

import zmq

from robustdice.runtime.wire.address import Address, Lookup
from robustdice.runtime.wire.security import ANOTHER_MECHANISM, Greeting, secure
from robustdice.runtime.wire.watch import NOW, NOW_AND_MORE, Watch

COPIED_BYTES = 2**18
"""What is smaller is copied when it is sent: to be told when it is no longer in use takes longer."""
QUEUED_MESSAGES = 16
"""Per outgoing connection; beyond it messages are dropped, and asked for again where they matter."""
CURVE_OVERHEAD = 64
"""Bytes, rounded up, that encryption adds to a frame: command name, nonce, flags, authentication (RFC 26)."""
NO_MORE = 500
"""Why a connection was refused, in an authentication reply (RFC 27): its key has as many as it may have. To 300, which
says that too, libzmq hangs up without a word."""
HANDSHAKE_SECONDS = 2.0
PROBE_SECONDS = 1
"""A connection on which nothing has come for so long is asked whether the other host is still there, and again."""
GIVEN_UP_MS = 5000
"""A connection is closed when the other host acknowledges nothing for so long."""
FIRST_REDIAL_SECONDS = 0.1
LONGEST_REDIAL_SECONDS = 1.0
LOOKUP_POLL_SECONDS = 0.01
NAME_SECONDS = 10.0
"""A name that has led nowhere for this long is looked up again: its address may have changed."""
LINE_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)
FAILURES = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_DISCONNECTED,
}


def set_options(
    socket: zmq.Socket[bytes], transport: str, keys: tuple[bytes, bytes], server_key: bytes | None, limit: int
) -> None:
    """What all sockets have in common. ``keys`` are (public, secret), used as
    :func:`robustdice.runtime.wire.security.secure` says; ``limit`` is the largest frame in bytes.

    Whether the other host is still there is asked by TCP's keep-alive, never by ZeroMQ's heartbeats: libzmq 4.3 aborts
    the process (``Assertion failed: !_io_error``; compare its issues 3596 and 3937) when one is to be sent, or
    answered, on a connection whose input waits for a full queue to be read and whose peer has gone meanwhile. Peers
    that are frozen are found by their pulse. What a connecting side is sent is limited by what it asks for, so it reads
    without a limit.
    """
    socket.linger = 0
    socket.sndhwm = QUEUED_MESSAGES
    socket.maxmsgsize = limit + CURVE_OVERHEAD
    socket.handshake_ivl = int(1000 * HANDSHAKE_SECONDS)
    socket.tcp_keepalive = 1
    if server_key is None:
        socket.rcvhwm = 16 * QUEUED_MESSAGES
        socket.tcp_keepalive_idle = 30
    else:
        socket.rcvhwm = 0
        socket.tcp_keepalive_idle = socket.tcp_keepalive_intvl = PROBE_SECONDS
        socket.tcp_maxrt = GIVEN_UP_MS
        socket.reconnect_ivl = 10
        socket.reconnect_ivl_max = 200
    secure(socket, transport, keys, server_key)


def send_parts(socket: zmq.Socket[bytes], parts: Sequence[Any]) -> None:
    """Send a message of several parts, or zmq.Again."""
    for part in parts[:-1]:
        socket.send(part, NOW_AND_MORE, len(part) < COPIED_BYTES)
    socket.send(parts[-1], NOW, len(parts[-1]) < COPIED_BYTES)


class Reach(enum.Enum):
    """How a line stands; the value is for logs and ``status``, after the peer's name."""

    UNKNOWN_NAME = "cannot be found: its name has no address"
    NOBODY = "is down: nobody listens at its address"
    MUTE = "accepts the connection and says nothing"
    REFUSED = "refuses our key: it is not listed in its cluster.toml"
    FULL = "has as many connections of our key as it takes"
    OTHER_KEY = "has another key than in our cluster.toml (it is of another build, or no device)"
    OTHER_TRANSPORT = "is encrypted where our cluster.toml says plain, or the reverse (it is of another build)"
    CONNECTED = "connected"


class Line:
    """A DEALER to one peer, and what its monitor says about it.

    libzmq reconnects by itself after a connection has ended, but never again after some kinds of failed handshake, and
    a hundred times a second after others. So whatever fails before the connection stands ends the socket, and
    :meth:`tend` makes a new one a little later. libzmq gets numeric addresses only: its thread for input and output
    would stand still while it looks up a name.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        watch: Watch,
        address: Address,
        transport: str,
        keys: tuple[bytes, bytes],
        server_key: str,
        limit: int,
    ) -> None:
        """A line that :meth:`tend` will dial; the peer need not be there. Its monitor and its socket are
        ``watch``ed."""
        self.address = address
        self.connected = False
        self.reach = Reach.NOBODY
        """Why it is not connected, as far as that is certain."""
        self.due: float | None = 0.0
        """When :meth:`tend` has something to do; None: nothing, as long as nothing happens."""
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self._context = context
        self._options = (transport, keys, server_key.encode(), limit)
        self._watch = watch
        self._lookup: Lookup | None = None
        self._dialled = address
        self._dialled_at = 0.0
        self._dials = 0
        self._met = False
        """The last dial, or libzmq after it, found somebody who accepts connections."""
        self._settled = False
        """A second has passed since the last dial."""
        self._failures = 0
        """Handshakes that failed, one after another, without a word about the reason."""
        self._greeting: Greeting | None = None
        """What the peer speaks, asked after a handshake that failed for no reason that is known."""

    def tend(self, now: float) -> None:
        """Dial, when it is time to."""
        if self.due is None or now < self.due:
            return
        if self.socket is not None and not self._settled:  # nothing came of the last dial, whatever the one before gave
            self._settled = True
            self.reach = Reach.MUTE if self._met else Reach.NOBODY
            self.due = self._patience(now)
            return
        if self._lookup is None:
            self._lookup = Lookup(self.address)
        if not self._lookup.done.is_set():
            self.due = now + LOOKUP_POLL_SECONDS
            return
        found, self._lookup = self._lookup.found, None
        self._hang_up()
        self._dialled_at = now
        if not found:
            self.reach, self.due = Reach.UNKNOWN_NAME, now + LONGEST_REDIAL_SECONDS
            return
        self._dialled = found[self._dials % len(found)]
        self._dial(self._dialled)
        self._dials += 1
        self._met = self._settled = False
        self.due = now + LONGEST_REDIAL_SECONDS

    def changes(self, now: float) -> list[bool]:
        """Connections made (True) and lost (False) since the last call."""
        changes: list[bool] = []
        while self.monitor is not None and self.monitor.poll(0):
            event, value = struct.unpack_from("=HI", self.monitor.recv_multipart()[0])
            if event == zmq.EVENT_CONNECTED:
                if self.reach in {Reach.NOBODY, Reach.UNKNOWN_NAME}:
                    self.reach = Reach.MUTE
                self._dialled_at, self._met = now, True
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self.reach, self.due = True, Reach.CONNECTED, None
                self._failures, self._greeting, self._settled = 0, None, True
                assert self.socket is not None
                self.socket.getsockopt(zmq.EVENTS)  # lets the socket notice its new connection, so that sends succeed
                self._watch.used(self.socket)
                changes.append(True)
            elif event == zmq.EVENT_DISCONNECTED and self.connected:
                self.connected, self.reach = False, Reach.NOBODY
                self.due = self._patience(now)
                changes.append(False)
            elif event in FAILURES:
                self._fail(event, value, now)
        return changes

    def send(self, parts: list[Any]) -> bool:
        """Queue a message if there is a connection and room; never waits."""
        if self.socket is None:
            return False
        try:
            send_parts(self.socket, parts)
        except zmq.Again:
            return False
        finally:
            self._watch.used(self.socket)
        return True

    def close(self) -> None:
        """Disconnect for good."""
        self._hang_up()
        self.due = None

    def _patience(self, now: float) -> float | None:
        """Until when to leave reconnecting to libzmq, which goes on with the same numeric address."""
        return None if self.address.ip is not None else now + NAME_SECONDS

    def _dial(self, address: Address) -> None:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        set_options(socket, *self._options)
        socket.immediate = True
        socket.ipv6 = address.ipv6
        self.socket, self.monitor = socket, socket.get_monitor_socket(LINE_EVENTS)
        self._watch.register(self.monitor)
        self._watch.register(socket)
        socket.connect(str(address))

    def _hang_up(self) -> None:
        socket, monitor = self.socket, self.monitor
        self.socket = self.monitor = None
        if socket is None or monitor is None:
            return
        self._watch.unregister(monitor)
        self._watch.unregister(socket)
        socket.disable_monitor()
        monitor.close(0)
        socket.close(0)

    def _fail(self, event: int, value: int, now: float) -> None:
        """A handshake has failed. One that ended in silence says that the peer is slow or frozen; one that was broken
        off, twice in a row, that it cannot read what we say: once can be a device that is being stopped."""
        self._hang_up()
        told = event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == ANOTHER_MECHANISM
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH or told:
            refused = Reach.FULL if value == NO_MORE else Reach.REFUSED
            self.reach, self._failures = Reach.OTHER_TRANSPORT if told else refused, 0
            self._greeting = Greeting(self._dialled, self._options[0]) if told else None
            self.due = self._dialled_at + LONGEST_REDIAL_SECONDS
        elif now - self._dialled_at > HANDSHAKE_SECONDS / 2:
            self.reach, self._failures, self._greeting, self.due = Reach.MUTE, 0, None, now
        else:
            self._failures += 1
            if self._greeting is None:
                self._greeting = Greeting(self._dialled, self._options[0])
            elif self._greeting.done.is_set():
                other = self._greeting.mechanism not in {None, self._options[0].upper()}
                self.reach = Reach.OTHER_TRANSPORT if other else Reach.OTHER_KEY
                self._greeting = None
            wait = FIRST_REDIAL_SECONDS * 2.0 ** min(self._failures - 1, 10)
            self.due = self._dialled_at + min(wait, LONGEST_REDIAL_SECONDS)
