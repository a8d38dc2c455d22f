"""What lies between simulated devices, and everything that can happen to it and to them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from robustdice.errors import MessageError
from robustdice.runtime.protocol.events import Event, PeerDown, PeerUp, Received
from robustdice.runtime.wire.messages import Mark, Pulse, Shards
from shared_link import SharedLink, size_of
from simulated_devices import Devices, Node
from wire_check import garbled, travels

GIVEN_UP_SECONDS = 5.0
"""TCP's patience with a peer that is not there any more."""
Way = tuple[Hashable, Hashable]
"""From whom to whom: devices are numbers, clients names."""


@dataclass
class Network:
    """What can happen to a message between devices."""

    delay: float = 0.001
    loss: float = 0.0
    duplication: float = 0.0
    slow: float = 0.0
    """Probability that a message takes up to ``slow_seconds``."""
    slow_seconds: float = 0.05
    corruption: float = 0.0
    """Probability that its bytes are not what was sent: whoever gets it breaks the connection."""
    reordering: bool = True
    """Messages may overtake each other."""
    bytes_per_second: float | None = None
    """Of one link that all share (None: no limit); ``delay`` is that of its loaded queue then."""


class ConnectedDevices(Devices):
    """Devices that reach each other; faults are methods, to be scheduled with ``at(time, ...)``."""

    def __init__(self, nodes: Sequence[Node], seed: int, compute_seconds: float, network: Network) -> None:
        super().__init__(nodes, seed, compute_seconds)
        self.network = network
        self.cut: set[Way] = set()
        """Ways that nothing gets through."""
        self.links: dict[tuple[int, int], int] = {}
        """Connections that stand, from a device to another, and the incarnation of that one they were made to."""
        self.link: SharedLink | None = None
        if network.bytes_per_second is not None:
            self.link = SharedLink(network.bytes_per_second, network.delay, self.after)
        self._last: dict[Hashable, float] = {}
        self._sizes = {
            (e, s): math.prod(exchange.form(s).shape)
            for e, exchange in enumerate(self.nodes[0].manifest.exchanges)
            for s in range(len(exchange.shards))
        }
        self._carried = 0
        for node in self.nodes:
            self.at(0.0, self.restart, node.device)

    # -- messages

    def _delay(self) -> float:
        slow = self.network.slow_seconds if self.random.random() < self.network.slow else 0.0
        return self.network.delay * (0.2 + self.random.random()) + slow * self.random.random()

    def carry(self, queue: Hashable, message: object, arrive: Callable[[], None]) -> None:
        """Something is under way, behind what is in the same queue unless it may be overtaken."""
        if self.link is not None:
            self.link.send(queue, size_of(message, self._sizes), arrive)
            return
        at = self.now + self._delay()
        if not self.network.reordering:
            at = self._last[queue] = max(at, self._last.get(queue, 0.0))
        if isinstance(message, Pulse):
            self.at(at, arrive)
        else:
            self.soon(at, arrive)

    def transmit(self, source: int, target: int, event: Received) -> None:
        network, incarnation = self.network, self.links.get((source, target))
        if incarnation is None:
            return
        self._carried += 1
        if self._carried % 32 == 0:
            travels(event.message, self.nodes[source].codec, self.nodes[target].codec)
        for _ in range(1 + (self.random.random() < network.duplication)):
            if self.random.random() >= network.loss:
                queue = ("shards" if isinstance(event.message, Shards | Mark) else "words", source, target)
                broken = self.random.random() < network.corruption
                arrive = self._break if broken else self._arrive
                self.carry(queue, event.message, partial(arrive, source, target, incarnation, event))

    def _arrive(self, source: int, target: int, incarnation: int, event: Event) -> None:
        if (source, target) not in self.cut:
            self.deliver(target, incarnation, event)

    def _break(self, source: int, target: int, incarnation: int, event: Received) -> None:
        """Bytes that nobody has sent arrive: what is encrypted is not even looked at, what is not must do no harm."""
        for parts in garbled(event.message, self.nodes[source].codec, self.random):
            with contextlib.suppress(MessageError):
                self.nodes[target].codec.decode(parts, source)
        if self.links.get((source, target)) == incarnation:
            self._disconnect(source, target)

    # -- connections

    def _connect(self, source: int, target: int) -> None:
        """The reconnect loop of one outgoing connection."""
        a, b = self.nodes[source], self.nodes[target]
        able = a.engine and b.engine and not a.still and not b.still
        if (source, target) in self.links or a.engine is None:
            return
        if able and (source, target) not in self.cut:
            self.links[source, target] = b.incarnation
            self.deliver(source, a.incarnation, PeerUp(target))
        else:
            self.after(0.05, self._connect, source, target)

    def _disconnect(self, source: int, target: int) -> None:
        if (source, target) in self.links:
            del self.links[source, target]
            node = self.nodes[source]
            self.deliver(source, node.incarnation, PeerDown(target))
            self.soon(self.now + 0.01 + 0.04 * self.random.random(), self._connect, source, target)

    def _drop(self, source: int, target: int, made_to: int) -> None:
        """One particular connection breaks, if it still stands."""
        if self.links.get((source, target)) == made_to:
            self._disconnect(source, target)

    # -- devices come and go

    def crash(self, device: int, silent: bool = False) -> None:
        """The process is gone; ``silent`` (power loss): peers learn it from its silence."""
        node = self.nodes[device]
        if node.engine is None:
            return
        node.end()
        for peer in range(len(self.nodes)):
            self.links.pop((device, peer), None)
            if (made_to := self.links.get((peer, device))) is not None:
                later = self.at if silent else self.soon
                seconds = GIVEN_UP_SECONDS if silent else self._delay()
                later(self.now + seconds, self._drop, peer, device, made_to)

    def restart(self, device: int, unnoticed: bool = False) -> None:
        """The process starts again, with nothing in its memory. What was connected to the last one breaks; where it is
        ``unnoticed``, whatever lies in between goes on with the new one without a word."""
        node = self.nodes[device]
        if node.engine is not None:
            return
        node.start(self.settings, self.now)
        for peer in range(len(self.nodes)):
            if peer == device:
                continue
            if (made_to := self.links.get((peer, device))) is not None:
                if unnoticed:
                    self.links[peer, device] = node.incarnation
                else:
                    self.soon(self.now + 0.02 * self.random.random(), self._drop, peer, device, made_to)
            for pair in ((peer, device), (device, peer)):
                self.soon(self.now + 0.01 + 0.04 * self.random.random(), self._connect, *pair)

    def replace(self, device: int) -> None:
        """Another process takes a device's place, and nothing but its first word tells."""
        if self.nodes[device].engine is not None:
            self.nodes[device].end()
            for peer in range(len(self.nodes)):
                self.links.pop((device, peer), None)
            self.restart(device, unnoticed=True)

    def freeze(self, device: int) -> None:
        node = self.nodes[device]
        if node.engine is None or node.frozen_since is not None:
            return
        node.frozen_since = self.now
        self.after(GIVEN_UP_SECONDS, self._notice_freeze, device, self.now)

    def _notice_freeze(self, device: int, since: float) -> None:
        if self.nodes[device].frozen_since == since:
            for peer in range(len(self.nodes)):
                self._disconnect(peer, device)
                self._disconnect(device, peer)

    def thaw(self, device: int) -> None:
        node = self.nodes[device]
        if node.engine is None or node.frozen_since is None:
            return
        node.disturbed.append((node.frozen_since, self.now))
        node.frozen_since = None
        self.wake(node)

    def pause(self, device: int, seconds: float) -> None:
        """It stands still for a moment, as any process does when others run: that is no fault."""
        node = self.nodes[device]
        if node.engine is not None and not node.paused:
            node.paused = True
            self.after(seconds, self._go_on, device, node.incarnation)

    def _go_on(self, device: int, incarnation: int) -> None:
        node = self.nodes[device]
        if node.incarnation == incarnation:
            node.paused = False
            self.wake(node)

    def jump(self, device: int, seconds: float) -> None:
        """A device's clock is so much further all of a sudden. It never goes back: it is monotonic."""
        self.nodes[device].offset += seconds
        self.nodes[device].disturbed.append((self.now, self.now))

    def slow_down(self, device: int, factor: float) -> None:
        self.nodes[device].speed = factor

    # -- ways are cut

    def partition(self, a: int, b: int) -> None:
        self.cut_one_way(a, b)
        self.cut_one_way(b, a)

    def cut_one_way(self, source: int, target: int) -> None:
        """What ``source`` sends does not reach ``target`` any more; its connection there breaks in the end."""
        self.cut.add((source, target))

        def notice() -> None:
            if (source, target) in self.cut:
                self._disconnect(source, target)

        self.after(GIVEN_UP_SECONDS, notice)

    def deafen(self, device: int) -> None:
        """Nothing reaches a device any more; everything that it sends does."""
        for peer in range(len(self.nodes)):
            if peer != device:
                self.cut_one_way(peer, device)

    def mute(self, device: int) -> None:
        """Everything reaches a device; nothing that it sends reaches a peer."""
        for peer in range(len(self.nodes)):
            if peer != device:
                self.cut_one_way(device, peer)

    def cut_client(self, client: str, device: int) -> None:
        """A client and a device do not hear each other."""
        self.cut |= {(client, device), (device, client)}

    def heal(self, *devices: Hashable) -> None:
        """Everything between a device and its peers, or between some of those named, gets through again."""
        self.cut = {
            way for way in self.cut if not (set(way) <= set(devices) or (len(devices) == 1 and devices[0] in way))
        }

    def end_faults(self) -> None:
        """Whatever was still broken is whole again."""
        self.cut.clear()
        for node in self.nodes:
            node.speed = 1.0
            self.thaw(node.device)
            self.restart(node.device)
