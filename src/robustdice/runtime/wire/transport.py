"""What a device needs of a network. :mod:`robustdice.runtime.wire.zeromq` is the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from robustdice.runtime.protocol.events import PeerDown, PeerUp, Received
from robustdice.runtime.wire.messages import Message


class Transport(Protocol):
    """Messages between one device, its peers and its clients. Used from one thread, but for :meth:`waker`.

    Messages arrive whole, once, and with an authenticated sender, or not at all; those from one peer in order.
    """

    dropped: int
    """Messages that were refused: malformed, too large, of another plan, or in another's name."""

    def send(self, to: int | str, message: Message) -> bool:
        """Hand over a message without ever blocking; False when it had to be dropped."""

    def poll(self, timeout_seconds: float) -> list[Received | PeerUp | PeerDown]:
        """What has happened; waits up to ``timeout_seconds`` (0: not at all) for something to happen."""

    def waker(self) -> Callable[[], None]:
        """A function that ends a :meth:`poll` early, to be called from one other thread."""

    def status(self, now: float) -> dict[str, Any]:
        """For ``robustdice status``: how every peer can be reached, and who was refused."""

    def close(self) -> None:
        """Let go of everything."""
