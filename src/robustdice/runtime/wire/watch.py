"""Which ZeroMQ sockets have something to be read, asked in few calls of the operating system."""

from __future__ import annotations

import selectors
from collections.abc import Iterator
from typing import Any

import zmq

Socket = zmq.Socket[Any]
READ, NOW, NOW_AND_MORE = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""Plain numbers: to combine the flags of an enumeration takes as long as to send a small message."""
RECEIVED_AT_ONCE = 64
KEPT_PARTS = 2**10
"""Of a message: nothing has so many. What comes behind them must be read, and is not kept."""


class Watch:
    """Sockets of one thread, with what may be read from them.

    libzmq's own poll asks the system about every socket, and twice if it waits. Here the system is asked once, by the
    sockets' descriptors, and libzmq only about those that something has happened to. A descriptor says so only until
    libzmq has taken notice, which it also does while a socket is used otherwise: so whatever was used, or had something
    to be read when it was asked last, is asked again before anything is waited for. A socket that always has more to be
    read keeps nobody waiting: at every second wait the system is asked about all.
    """

    def __init__(self) -> None:
        """Nothing is watched yet."""
        self._selector = selectors.DefaultSelector()
        self._used: dict[Socket, int] = {}
        """Those that may have something to be read without their descriptors saying so, and what to ask about them."""
        self._only_used = False
        """At the last wait nobody else was asked about."""

    def register(self, socket: Socket) -> None:
        """Watch a socket, until it is unregistered; before it is closed."""
        self._selector.register(socket.fileno(), selectors.EVENT_READ, socket)
        self.used(socket)

    def unregister(self, socket: Socket) -> None:
        """Watch it no longer."""
        self._selector.unregister(socket.fileno())
        self._used.pop(socket, None)

    def used(self, socket: Socket) -> None:
        """Anything was done to it but receiving what it was ready for."""
        self._used[socket] = READ

    def wait(self, seconds: float) -> list[Socket]:
        """Those that something can be received from, after waiting up to so long for one."""
        found = self._asked() if self._used else []
        self._only_used = bool(found) and not self._only_used
        if self._only_used:
            return found
        woken = self._selector.select(0.0 if found else max(seconds, 0.0))
        if not woken:
            return found
        for key, _ in woken:
            self._used[key.data] = READ
        return self._asked()

    def close(self) -> None:
        """Wait no more; the sockets are their owners'."""
        self._selector.close()

    def _asked(self) -> list[Socket]:
        found: list[Any] = zmq.zmq_poll(list(self._used.items()), 0)
        self._used = dict(found)
        return list(self._used)


def received(socket: Socket) -> Iterator[list[zmq.Frame]]:
    """The messages that can be received now from a socket that is ready, but not without end."""
    try:
        for _ in range(RECEIVED_AT_ONCE):
            frames = [socket.recv(NOW, copy=False)]
            while frames[-1].more:
                frame = socket.recv(NOW, copy=False)
                if len(frames) > KEPT_PARTS:
                    frames.pop()
                frames.append(frame)
            yield frames
            if not zmq.zmq_poll([(socket, READ)], 0):  # faster than to try
                return
    except zmq.Again:
        return
