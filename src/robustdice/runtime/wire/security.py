"""How connections prove who is speaking, and whether they are encrypted: ZeroMQ's CURVE (RFC 26), or PLAIN (RFC 24).

In both, whoever connects shows that it has the secret half of a key pair. With CURVE it does so without telling it, so
does the listening side, and everything is encrypted and cannot be changed. With PLAIN the secret itself is the
password, which the listening side turns into the public key: strangers are kept out, but whoever can read or change
what is on the network, or can take a device's address, can do all that a device can. Keys that were used so are not
used for anything else.
"""

from __future__ import annotations

import socket as sockets
import threading
from collections.abc import Sequence

import zmq
from zmq.utils import z85

from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.keys import public_of

TRANSPORTS = ("curve", "plain")
ANOTHER_MECHANISM = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
"""What both sides are told when one is encrypted and the other is not."""
UNENCRYPTED = (
    "connections are not encrypted (transport = plain): whoever can read or change what is on the network can do so "
    "with images, answers and keys; for networks that are private already"
)


GREETING_BYTES = 64
GREETING_SECONDS = 1.0


class Greeting:
    """What whoever listens at a numeric address speaks, asked in a thread of its own.

    When two sides of different mechanisms meet, the first to notice hangs up, and the other is often told nothing. So
    this greets (RFC 23) up to the version, until the listening side has said what it speaks, and only then ends its
    greeting, for the other side to know, too.
    """

    def __init__(self, address: Address, transport: str) -> None:
        """Start to ask; ``transport`` is what this side speaks."""
        self.done = threading.Event()
        self.mechanism: str | None = None
        """Such as ``CURVE``; None while it is not known, or if it is no ZeroMQ."""
        self._address, self._own = address, transport.upper().encode()
        threading.Thread(target=self._run, name="greeting", daemon=True).start()

    def _run(self) -> None:
        try:
            place = self._address.host, self._address.port
            with sockets.create_connection(place, GREETING_SECONDS) as connection, connection.makefile("rb") as stream:
                connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
                found = stream.read(GREETING_BYTES)
                connection.sendall(b"\x00" + self._own.ljust(20, b"\0") + bytes(32))
            if found[:1] == b"\xff" and len(found) == GREETING_BYTES:
                self.mechanism = found[12:32].rstrip(b"\0").decode("ascii")
        except (OSError, ValueError):  # nobody is there any more, or it is something else
            pass
        self.done.set()


def secure(socket: zmq.Socket[bytes], transport: str, keys: tuple[bytes, bytes], server_key: bytes | None) -> None:
    """Set up a socket, before it connects to the device with ``server_key``, or (None) listens. ``keys`` are its own,
    (public, secret)."""
    if transport == "plain":
        if server_key is None:
            socket.plain_server = True
        else:
            socket.plain_username, socket.plain_password = keys
        return
    socket.curve_publickey, socket.curve_secretkey = keys
    if server_key is None:
        socket.curve_server = True
    else:
        socket.curve_serverkey = server_key


def proven_key(mechanism: bytes, credentials: Sequence[bytes]) -> bytes | None:
    """The public key (Z85) whose secret half somebody has who wants in, by what the ZeroMQ authentication protocol
    (RFC 27) says of it."""
    if mechanism == b"CURVE" and len(credentials) == 1:
        return z85.encode(credentials[0])
    if mechanism == b"PLAIN" and len(credentials) == 2:
        return public_of(credentials[1])
    return None
