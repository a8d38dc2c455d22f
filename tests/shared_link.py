"""A link that everything in a simulated world shares, with a queue for each sender and kind of traffic."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any

from robustdice.runtime.wire.messages import Frame, Shards

QUANTUM_BYTES = 1500
WORD_BYTES = 150
BYTES_PER_VALUE = 400
"""The simulated network is tiny; with this, a frame of four devices moves 0.4 MB of shards."""


INPUT_BYTES = 6000


def size_of(message: object, sizes: dict[tuple[int, int], int]) -> int:
    """Bytes of a message; ``sizes`` are the values of every shard."""
    if isinstance(message, Shards):
        return WORD_BYTES + BYTES_PER_VALUE * sum(sizes[shard] for shard in message.parcel.shards)
    return INPUT_BYTES if isinstance(message, Frame) else WORD_BYTES


class SharedLink:
    """Carries ``bytes_per_second``, a packet of every waiting queue in turn, as TCP connections share a link; what it
    has carried arrives ``delay`` seconds later."""

    def __init__(self, bytes_per_second: float, delay: float, at: Callable[..., None]) -> None:
        """``at(seconds from now, call)`` is the world's clock."""
        self.bytes_per_second, self._delay, self._at = bytes_per_second, delay, at
        self._queues: OrderedDict[Hashable, deque[list[Any]]] = OrderedDict()
        self.carried = 0

    def send(self, queue: Hashable, size: int, arrive: Callable[[], None]) -> None:
        """Carry ``size`` bytes behind what waits in ``queue``, then call ``arrive``."""
        idle = not self._queues
        self._queues.setdefault(queue, deque()).append([size, arrive])
        if idle:
            self._carry()

    def _carry(self) -> None:
        queue, waiting = next(iter(self._queues.items()))
        packet = min(QUANTUM_BYTES, waiting[0][0])
        self._at(packet / self.bytes_per_second, lambda: self._carried(queue, packet))

    def _carried(self, queue: Hashable, packet: int) -> None:
        waiting = self._queues[queue]
        self.carried += packet
        waiting[0][0] -= packet
        if waiting[0][0] == 0:
            self._at(self._delay, waiting.popleft()[1])
        self._queues.move_to_end(queue)
        if not waiting:
            del self._queues[queue]
        if self._queues:
            self._carry()
