"""Time that passes only from one event to the next."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class VirtualTime:
    """``run(until)`` moves it; ``at`` says what is to happen when. Equal moments come in the order they were named."""

    def __init__(self) -> None:
        self.now = 0.0
        """In seconds."""
        self.moving = 0
        """What is being computed, is on its way, or will be noticed without a timer of a device."""
        self.standstill = 0.0
        """For how long nothing has moved while somebody waited for something."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    @property
    def awaited(self) -> bool:
        """Whether anybody waits for anything."""
        return False

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call it then, or now if that has passed."""
        heapq.heappush(self._heap, (max(time, self.now), next(self._order), call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call it so much later."""
        self.at(self.now + seconds, call, *arguments)

    def soon(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """As ``at``, of something that moves."""
        self.moving += 1
        self.at(time, self._moved, call, *arguments)

    def _moved(self, call: Callable[..., None], *arguments: Any) -> None:
        self.moving -= 1
        call(*arguments)

    def run(self, until: float) -> None:
        """Let everything happen that is to happen until then."""
        while self._heap and self._heap[0][0] <= until:
            before = self.now
            self.now, _, call, arguments = heapq.heappop(self._heap)
            if not self.moving and self.awaited:
                self.standstill += self.now - before
            call(*arguments)
        self.now = until
