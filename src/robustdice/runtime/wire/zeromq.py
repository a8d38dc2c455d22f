"""The transport between real devices: ZeroMQ over TCP, encrypted or at least authenticated (security.py).

A device binds one ROUTER for what comes in, from peers and clients; what goes out to a peer has a DEALER of its own, so
that a slow or frozen receiver delays nobody else. Words of a few bytes go to a peer against the stream, from the ROUTER
to the peer's DEALER, so that they need not queue behind shards: whether a peer is well is known while megabytes are on
their way. Only listed keys are let in, and the key says who is speaking.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from robustdice.errors import ClusterError, MessageError, OtherBuildError
from robustdice.runtime.journal import say
from robustdice.runtime.protocol.events import PeerDown, PeerUp, Received
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.clients import ClientNames
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.config import Cluster
from robustdice.runtime.wire.connections import MOST_OF_A_KEY, Connections, Misuse
from robustdice.runtime.wire.line import NO_MORE, send_parts, set_options
from robustdice.runtime.wire.lines import Lines
from robustdice.runtime.wire.listen import bind_in_time
from robustdice.runtime.wire.messages import Frame, Hello, Message, Pass, Pulse, Want
from robustdice.runtime.wire.refusals import Refusals, Reminders
from robustdice.runtime.wire.security import ANOTHER_MECHANISM, proven_key
from robustdice.runtime.wire.watch import NOW, Watch, received

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
NOT_LISTED = "its key is not listed"
TOO_MANY = f"its key has {MOST_OF_A_KEY} connections already"
EXPECTS_ANOTHER = "it expects this device to have another key: it has the cluster.toml of another build"
OTHER_TRANSPORT = "it is encrypted where this device's cluster.toml says plain, or the reverse"
COMINGS_AND_GOINGS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
ENCRYPTED_FOR_ANOTHER_KEY = zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
AGAINST_THE_STREAM = (Pulse, Want, Pass)


class ZeroMQTransport:
    """See :class:`robustdice.runtime.wire.transport.Transport`.

    ClusterError when ``keys`` are not those of the device.
    """

    def __init__(self, device: int, cluster: Cluster, keys: tuple[bytes, bytes], codec: Codec) -> None:
        """Nothing happens before :meth:`listen`."""
        entry = cluster.devices[device]
        if keys[0] != entry.public_key.encode():
            raise ClusterError(
                f"the secret key of device {device} does not belong to its public key in the cluster file: "
                "copy both from one 'robustdice build'"
            )
        self.dropped = 0
        self._entry = entry
        self._device = device
        self._codec = codec
        self._sources: dict[str, int | None] = {each.public_key: None for each in cluster.clients}
        peers = {number: peer for number, peer in enumerate(cluster.devices) if number != device}
        self._sources |= {peer.public_key: number for number, peer in peers.items()}
        """Who speaks, by the key that libzmq says a message is of: a peer, or a client (None)."""
        self._clients = ClientNames()
        self._connections = Connections(codec.input_bytes)
        self._routes: dict[int, bytes] = {}
        """Where the ROUTER finds a peer: its last connection that something came from."""
        self._refusals = Refusals()
        self._reminders = Reminders()
        self._encoded: tuple[Message | None, list[Any]] = (None, [])
        self._closers: list[Callable[[], object]] = []
        self._context: zmq.Context[Any] = zmq.Context()
        self._watch = Watch()
        self._closers.append(self._watch.close)
        self._zap = self._socket(zmq.REP)
        self._zap.bind(ZAP_ADDRESS)
        self._router = self._socket(zmq.ROUTER)
        set_options(self._router, cluster.transport, keys, None, codec.frame_limit)
        self._router.router_mandatory = True
        self._bell = self._socket(zmq.PULL)
        self._bell.bind("inproc://bell")
        self._comings = self._router.get_monitor_socket(COMINGS_AND_GOINGS)
        self._closers += [lambda: self._comings.close(0), self._router.disable_monitor]
        self._watch.register(self._comings)
        self._lines = Lines(self._context, self._watch, peers, cluster.transport, keys, codec.frame_limit, device)
        self._closers.append(self._lines.close)

    def listen(self, stop: threading.Event) -> Address | None:
        """Bind the device's address, once this machine has it; the numeric address, or None when ``stop`` came first.

        ClusterError when it cannot be bound, now or later.
        """
        return bind_in_time(self._router, Address.parse(self._entry.listens_on), self._device, stop)

    def send(self, to: int | str, message: Message) -> bool:
        """Never blocks; False when the message was dropped."""
        if message is not self._encoded[0]:  # one message often goes to all peers
            self._encoded = message, self._codec.encode(message)
        parts = self._encoded[1]
        if isinstance(to, int):
            against_the_stream = isinstance(message, AGAINST_THE_STREAM) and to in self._routes
            return (against_the_stream and self._reply(self._routes[to], parts)) or self._lines[to].send(parts)
        route = self._clients.route(to)
        return route is not None and self._reply(route, parts)

    def _reply(self, route: bytes, parts: list[Any]) -> bool:
        try:
            send_parts(self._router, [route, *parts])
        except zmq.ZMQError as error:
            if error.errno in {zmq.EAGAIN, zmq.EHOSTUNREACH}:
                return False
            raise
        finally:
            self._watch.used(self._router)
        return True

    def poll(self, timeout_seconds: float) -> list[Received | PeerUp | PeerDown]:
        """Everything that can be read now, after waiting for something up to ``timeout_seconds``."""
        if self._lines.restless:
            self._lines.tend(time.monotonic())
        if self._connections.any:
            timeout_seconds = min(timeout_seconds, self._look_after_clients())
        ready = self._watch.wait(timeout_seconds)
        if ready == [self._router]:
            return self._read()
        events: list[Received | PeerUp | PeerDown] = []
        if self._bell in ready:
            self._bell.recv(NOW)
        if self._comings in ready:
            self._note_comings()
        if self._zap in ready:
            self._authenticate()
        for device, up in self._lines.changes(ready):
            events.append(PeerUp(device) if up else PeerDown(device))
        for device, line in self._lines.items():
            if line.socket is not None and line.socket in ready:
                for frames in received(line.socket):
                    events += self._hear(frames, device)
        if self._router in ready:
            events += self._read()
        return events

    def _read(self) -> list[Received | PeerUp | PeerDown]:
        """What others have sent to the ROUTER."""
        found = [self._receive(frames) for frames in received(self._router)]
        return [each for each in found if each is not None]

    def waker(self) -> Callable[[], None]:
        """A function for one other thread that ends a poll."""
        bell = self._context.socket(zmq.PUSH)
        bell.linger = 0
        bell.connect("inproc://bell")
        self._closers.append(lambda: bell.close(0))

        def ring() -> None:
            bell.send(b"")

        return ring

    def status(self, now: float) -> dict[str, Any]:
        """For ``robustdice status``: how every peer can be reached, and who was refused."""
        connections = {str(device): state for device, state in self._lines.states().items()}
        return {"connections": connections, "refused": self._refusals.status(now)}

    def close(self) -> None:
        """Close all sockets; the thread that uses a waker must have ended."""
        while self._closers:
            self._closers.pop()()
        self._context.term()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        self._closers.append(lambda: socket.close(0))
        self._watch.register(socket)
        return socket

    def _authenticate(self) -> None:
        """Answer requests of the ZeroMQ authentication protocol (RFC 27): is this key listed, and may it connect?"""
        for frames in received(self._zap):
            version, request, _, address, _, mechanism, *credentials = (frame.bytes for frame in frames)
            proven = proven_key(mechanism, credentials)
            key = None if proven is None else proven.decode()
            listed = key in self._sources
            if key is not None and listed and (self._sources[key] is not None or not self._connections.full(key)):
                self._zap.send_multipart([version, request, b"200", b"OK", key.encode(), b""])
                continue
            self._refuse(address.decode("ascii", "replace"), key, TOO_MANY if listed else NOT_LISTED)
            code = NO_MORE if listed else 400  # all that the other side is told
            self._zap.send_multipart([version, request, str(code).encode(), b"refused", b"", b""])

    def _note_comings(self) -> None:
        """Somebody has come or gone. If his handshake was not readable: was it encrypted for another device's key?"""
        while self._comings.poll(0):
            told, endpoint = self._comings.recv_multipart()
            event, value = struct.unpack_from("=HI", told)
            if event == zmq.EVENT_ACCEPTED:
                port = int(endpoint.rpartition(b":")[2])
                self._note_cut(self._connections.opened(value, port, time.monotonic()))
            elif event == zmq.EVENT_DISCONNECTED:
                self._connections.closed(value)
            elif value == ENCRYPTED_FOR_ANOTHER_KEY:
                self._refuse(None, None, EXPECTS_ANOTHER)
            elif value == ANOTHER_MECHANISM:
                self._refuse(None, None, OTHER_TRANSPORT)
        self._watch.used(self._comings)

    def _look_after_clients(self) -> float:
        """From time to time: does anybody take more than he may? Seconds until it is to be looked again."""
        now = time.monotonic()
        if now >= self._connections.due:
            for misuse in self._connections.look(now):
                self._note_cut(misuse)
        return self._connections.due - now

    def _note_cut(self, misuse: Misuse | None) -> bool:
        """Whether a connection was cut off."""
        if misuse is not None:
            self._refuse(*misuse)
        return misuse is not None

    def _refuse(self, address: str | None, public_key: str | None, reason: str) -> None:
        now = time.monotonic()
        self._refusals.add(address, public_key, reason, now)
        if self._reminders.due((address, public_key), reason, now):
            key = f", key {public_key}" if public_key else ""
            text = f"refused {address or 'somebody'}{key}: {reason}"
            say(log, text, event="refused", device=self._device, reason=reason, level=logging.WARNING)

    def _meet_other_build(self, frames: list[zmq.Frame], difference: str) -> None:
        """A message of another plan, from a key that is listed. A client is told which plan runs here."""
        self.dropped += 1
        source = self._sources[str(frames[-1].get("User-Id"))]
        if source is not None:
            self._lines.meet_other_build(source, difference, time.monotonic())
            return
        self._refuse(str(frames[-1].get("Peer-Address")), None, f"a client of another build: {difference}")
        hello = self._codec.encode(Hello(self._device, "", reply=False))
        with contextlib.suppress(zmq.ZMQError):  # it has gone, or does not read
            self._router.send_multipart([frames[0].bytes, *hello], zmq.NOBLOCK)

    def _receive(self, frames: list[zmq.Frame]) -> Received | None:
        """What has come in to the ROUTER, if it is a message."""
        key = str(frames[-1].get("User-Id"))
        source = self._sources[key]
        if source is None and not self._may_say(frames, key):
            return None
        try:
            message: Any = self._codec.decode(frames[1:], source)
        except OtherBuildError as error:
            self._meet_other_build(frames, str(error))
            return None
        except MessageError as error:
            self._drop(error)
            return None
        self._lines.meet_same_build(source)
        if source is None:
            return self._of_client(message, key, frames[0].bytes)
        route = frames[0].bytes
        if self._routes.get(source) != route:
            self._routes[source] = route
            self._note_comings()
            self._connections.closed(frames[-1].get(zmq.SRCFD))  # a device's: not looked after
        return Received(message)

    def _may_say(self, frames: list[zmq.Frame], key: str) -> bool:
        """Whether a client with this key may say this, here; else his connection is cut off."""
        descriptor = frames[-1].get(zmq.SRCFD)
        if not self._connections.knows(descriptor):
            self._note_comings()
        if not self._connections.knows(descriptor):
            return False  # it has gone, or was cut off before
        parts, size = len(frames) - 1, sum(map(len, frames))
        return not self._note_cut(self._connections.heard(descriptor, key, parts, size, time.monotonic()))

    def _of_client(self, message: Any, key: str, route: bytes) -> Received | None:
        """A client's message, unless it is in another client's name."""
        name = message.frame.client if isinstance(message, Frame) else message.client
        if self._clients.heard(name, key, route):
            return Received(message, key)
        self._drop(MessageError(f"a client spoke by the name {name}, which is another's"))
        return None

    def _hear(self, frames: list[zmq.Frame], device: int) -> list[Received]:
        """What a peer says against the stream, if it is a message."""
        try:
            message: Any = self._codec.decode(frames, device)
        except OtherBuildError:  # it says so on its own connection too
            return []
        except MessageError as error:
            self._drop(error)
            return []
        self._lines.meet_same_build(device)
        return [Received(message)]

    def _drop(self, error: MessageError) -> None:
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8, ...
            text = f"dropped a message ({self.dropped} in all): {error}"
            say(log, text, event="dropped", device=self._device, reason=str(error), level=logging.WARNING)
