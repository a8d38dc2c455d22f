"""The transport between real devices: ZeroMQ over TCP, CURVE on every connection.

A device binds one ROUTER for what comes in, from peers and clients; what goes out to a peer has a DEALER of its own, so
that a slow or frozen receiver delays nobody else. Only listed keys are let in, and the key says who is speaking.
"""

from __future__ import annotations

import logging
import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils import z85

from robustdice.errors import ClusterError, MessageError
from robustdice.runtime.journal import say
from robustdice.runtime.protocol.events import PeerDown, PeerUp, Received
from robustdice.runtime.wire.config import Cluster
from robustdice.runtime.wire.messages import Codec, Frame, Message, StatusRequest

log = logging.getLogger(__name__)

QUEUED_MESSAGES = 16
"""Per outgoing connection; beyond it messages are dropped, and asked for again where they matter."""
CURVE_OVERHEAD = 64
"""Bytes, rounded up, that encryption adds to a frame: command name, nonce, flags, authentication (RFC 26)."""
DRAINED_AT_ONCE = 64
REMEMBERED_CLIENTS = 64
ZAP_ADDRESS = "inproc://zeromq.zap.01"
CONNECTION_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


def set_options(socket: zmq.Socket[bytes], keys: tuple[bytes, bytes], server_key: bytes | None, limit: int) -> None:
    """What all sockets have in common. ``keys`` are (public, secret), ``limit`` the largest frame in bytes.

    Heartbeats belong to the connecting side alone, and that side reads without a limit: libzmq 4.3 aborts the process
    (``Assertion failed: !_io_error``, compare its issues 3596 and 3937) when a heartbeat is due on a connection whose
    input waits, for a full queue or for authentication, and whose peer has gone. What a connecting side is sent is
    limited by what it asks for. TCP keep-alive clears away what the listening side has of dead peers.
    """
    socket.linger = 0
    socket.sndhwm = QUEUED_MESSAGES
    socket.maxmsgsize = limit + CURVE_OVERHEAD
    socket.handshake_ivl = 2000
    if server_key is None:
        socket.rcvhwm = 16 * QUEUED_MESSAGES
        socket.tcp_keepalive = 1
        socket.tcp_keepalive_idle = 30
    else:
        socket.rcvhwm = 0
        socket.heartbeat_ivl = 100
        socket.heartbeat_timeout = 300
        socket.reconnect_ivl = 10
        socket.reconnect_ivl_max = 200
    socket.curve_publickey, socket.curve_secretkey = keys
    if server_key is not None:
        socket.curve_serverkey = server_key


class Line:
    """One outgoing connection: a DEALER, and what its monitor says about it."""

    def __init__(
        self, context: zmq.Context[Any], address: str, keys: tuple[bytes, bytes], server_key: str, limit: int
    ) -> None:
        """Start to connect, and to reconnect for ever; the peer need not be there."""
        self.connected = False
        self.refused = False
        """The last attempt failed because the peer does not list our key."""
        self.socket = context.socket(zmq.DEALER)
        set_options(self.socket, keys, server_key.encode(), limit)
        self.socket.immediate = True
        self.monitor = self.socket.get_monitor_socket(CONNECTION_EVENTS)
        self.socket.connect(address)

    def changes(self) -> list[bool]:
        """Connections made (True) and lost (False) since the last call."""
        changes = []
        while self.monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            (event,) = struct.unpack_from("=H", self.monitor.recv_multipart()[0])
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.refused = True
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED and not self.connected:
                self.connected, self.refused = True, False
                self.socket.getsockopt(zmq.EVENTS)  # lets the socket notice its new connection, so that sends succeed
                changes.append(True)
            elif event == zmq.EVENT_DISCONNECTED and self.connected:
                self.connected = False
                changes.append(False)
        return changes

    def send(self, parts: list[Any]) -> bool:
        """Queue a message if there is a connection and room; never waits."""
        try:
            self.socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Disconnect."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


class ZeroMQTransport:
    """See :class:`robustdice.runtime.wire.transport.Transport`.

    ClusterError when the device's address cannot be bound, or ``keys`` are not those of the device.
    """

    def __init__(self, device: int, cluster: Cluster, keys: tuple[bytes, bytes], codec: Codec) -> None:
        """Listen, and start to connect to all peers."""
        entry = cluster.devices[device]
        if keys[0] != entry.public_key.encode():
            raise ClusterError(
                f"the secret key of device {device} does not belong to its public key in the cluster file: "
                "copy both from one 'robustdice build'"
            )
        self.dropped = 0
        self._device = device
        self._codec = codec
        self._allowed: dict[bytes, str] = {d.public_key.encode(): str(k) for k, d in enumerate(cluster.devices)}
        self._allowed |= {client.public_key.encode(): "client" for client in cluster.clients}
        self._clients: OrderedDict[str, bytes] = OrderedDict()
        """A client's name -> where to send its replies; the least recently heard of is forgotten first."""
        self._encoded: tuple[Message | None, list[Any]] = (None, [])
        self._lines: dict[int, Line] = {}
        self._closers: list[Callable[[], object]] = []
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._zap = self._socket(zmq.REP)
        self._zap.bind(ZAP_ADDRESS)
        self._router = self._socket(zmq.ROUTER)
        set_options(self._router, keys, None, codec.frame_limit)
        self._router.curve_server = True
        self._router.router_mandatory = True
        self._bell = self._socket(zmq.PULL)
        self._bell.bind("inproc://bell")
        self._bind(entry.address)
        for number, peer in enumerate(cluster.devices):
            if number != device:
                line = Line(self._context, peer.address, keys, peer.public_key, codec.frame_limit)
                self._lines[number] = line
                self._closers.append(line.close)
                self._poller.register(line.monitor, zmq.POLLIN)

    def send(self, to: int | str, message: Message) -> bool:
        """Never blocks; False when the message was dropped."""
        if message is not self._encoded[0]:  # one message often goes to all peers
            self._encoded = message, self._codec.encode(message)
        parts = self._encoded[1]
        if isinstance(to, int):
            return self._lines[to].send(parts)
        route = self._clients.get(to)
        if route is None:
            return False
        try:
            self._router.send_multipart([route, *parts], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in {zmq.EAGAIN, zmq.EHOSTUNREACH}:
                return False
            raise
        return True

    def poll(self, timeout_seconds: float) -> list[Received | PeerUp | PeerDown]:
        """Everything that can be read now, after waiting for something up to ``timeout_seconds``."""
        ready = dict(self._poller.poll(math.ceil(max(0.0, timeout_seconds) * 1000)))
        events: list[Received | PeerUp | PeerDown] = []
        if self._bell in ready:
            self._drain_bell()
        if self._zap in ready:
            self._authenticate()
        for device, line in self._lines.items():
            if line.monitor in ready:
                events.extend(PeerUp(device) if up else PeerDown(device) for up in line.changes())
        if self._router in ready:
            for _ in range(DRAINED_AT_ONCE):
                try:
                    frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                if (received := self._receive(frames)) is not None:
                    events.append(received)
        return events

    def waker(self) -> Callable[[], None]:
        """A function for one other thread that ends a poll."""
        bell = self._context.socket(zmq.PUSH)
        bell.linger = 0
        bell.connect("inproc://bell")
        self._closers.append(lambda: bell.close(0))

        def ring() -> None:
            bell.send(b"")

        return ring

    def close(self) -> None:
        """Close all sockets; the thread that uses a waker must have ended."""
        while self._closers:
            self._closers.pop()()
        self._context.term()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        self._closers.append(lambda: socket.close(0))
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _bind(self, address: str) -> None:
        try:
            self._router.bind(address)
        except zmq.ZMQError as error:
            self.close()
            reason = "it is in use" if error.errno == zmq.EADDRINUSE else str(error)
            raise ClusterError(
                f"cannot listen on {address}: {reason}; stop the other program, or give the device another address "
                "in cluster.toml"
            ) from None

    def _drain_bell(self) -> None:
        try:
            while True:
                self._bell.recv(zmq.NOBLOCK)
        except zmq.Again:
            pass

    def _authenticate(self) -> None:
        """Answer one request of the ZeroMQ authentication protocol (RFC 27): is this key listed, and whose is it?"""
        version, request, _, address, _, mechanism, *credentials = self._zap.recv_multipart()
        user = None
        if mechanism == b"CURVE" and len(credentials) == 1:
            user = self._allowed.get(z85.encode(credentials[0]))
        if user is None:
            text = f"refused a connection from {address.decode('ascii', 'replace')}: its key is not listed"
            say(log, text, event="refused", device=self._device, reason="key not listed", level=logging.WARNING)
            self._zap.send_multipart([version, request, b"400", b"key not listed", b"", b""])
        else:
            self._zap.send_multipart([version, request, b"200", b"OK", user.encode(), b""])

    def _receive(self, frames: list[zmq.Frame]) -> Received | None:
        try:
            user = str(frames[-1].get("User-Id"))
            source = None if user == "client" else int(user)
            message: Any = self._codec.decode([frame.buffer for frame in frames[1:]], source)
        except MessageError as error:
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8, ...
                text = f"dropped a message ({self.dropped} in all): {error}"
                say(log, text, event="dropped", device=self._device, reason=str(error), level=logging.WARNING)
            return None
        if isinstance(message, Frame | StatusRequest):
            name = message.frame.client if isinstance(message, Frame) else message.client
            self._clients[name] = bytes(frames[0].buffer)
            self._clients.move_to_end(name)
            while len(self._clients) > REMEMBERED_CLIENTS:
                self._clients.popitem(last=False)
        return Received(message)
