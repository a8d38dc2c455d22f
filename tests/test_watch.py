"""Which sockets have something to be read, asked in few calls: nobody is forgotten for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import zmq

from robustdice.runtime.wire.watch import RECEIVED_AT_ONCE, Socket, Watch, received


@pytest.fixture
def pairs() -> Iterator[list[tuple[Socket, Socket]]]:
    """Sockets to receive from, and those to send to them with."""
    with contextlib.ExitStack() as made:
        context = made.enter_context(zmq.Context[Socket]())
        found = []
        for name in ("busy", "quiet"):
            inner, outer = (made.enter_context(context.socket(kind)) for kind in (zmq.PULL, zmq.PUSH))
            inner.setsockopt(zmq.RCVHWM, 0)
            outer.setsockopt(zmq.SNDHWM, 0)
            inner.bind(f"inproc://{name}")
            outer.connect(f"inproc://{name}")
            found.append((inner, outer))
        yield found


def test_a_socket_that_never_runs_dry_keeps_no_other_waiting(pairs: list[tuple[Socket, Socket]]) -> None:
    (busy, to_busy), (quiet, to_quiet) = pairs
    watch = Watch()
    watch.register(busy)
    watch.register(quiet)
    assert watch.wait(0.0) == []
    for _ in range(20 * RECEIVED_AT_ONCE):
        to_busy.send(b"more")
    assert watch.wait(1.0) == [busy]
    to_quiet.send(b"once")
    seen = []
    for _ in range(3):
        ready = watch.wait(0.0)
        assert busy in ready
        assert len(list(received(busy))) == RECEIVED_AT_ONCE
        seen.append(quiet in ready)
    assert any(seen)
    watch.close()
