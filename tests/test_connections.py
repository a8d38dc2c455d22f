"""Descriptors that libzmq has told of may be anybody's by the time that they are looked at."""

from __future__ import annotations

import socket as sockets
from collections.abc import Iterator

import pytest

from robustdice.runtime.wire.connections import MOST_OF_A_KEY, MOST_SILENT, QUIET_SECONDS, Connections

Pair = tuple[sockets.socket, sockets.socket]


@pytest.fixture
def listener() -> Iterator[sockets.socket]:
    with sockets.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5.0)
        yield server


@pytest.fixture
def pairs(listener: sockets.socket) -> Iterator[list[Pair]]:
    """Connections as they come: the accepted end, and the other one."""
    found = []
    for _ in range(MOST_SILENT + 2):
        other = sockets.create_connection(listener.getsockname())
        other.settimeout(5.0)
        found.append((listener.accept()[0], other))
    yield found
    for pair in found:
        for end in pair:
            end.close()


def test_what_is_gone_and_what_is_another_connection_by_now_is_left_alone(
    listener: sockets.socket, pairs: list[Pair]
) -> None:
    port, connections = listener.getsockname()[1], Connections(0)
    accepted, other = pairs[0]
    for local in sockets.socketpair():
        with local:
            assert connections.opened(local.fileno(), port, 0.0) is None
    for descriptor in (other.fileno(), listener.fileno(), 10**6, 0):
        assert connections.opened(descriptor, port, 0.0) is None
    assert not connections.any, "an outgoing connection, and none at all, are not those of clients"
    assert connections.opened(accepted.fileno(), port, 0.0) is None
    number = accepted.fileno()
    accepted.close()
    taken = sockets.create_connection(listener.getsockname())  # which gets the number
    assert taken.fileno() == number
    other.sendall(bytes(10))
    assert connections.look(1.0) == []
    taken.close()


def test_the_oldest_of_too_many_silent_connections_is_ended(listener: sockets.socket, pairs: list[Pair]) -> None:
    port, connections = listener.getsockname()[1], Connections(0)
    accepted = [each.fileno() for each, _ in pairs]
    found = [connections.opened(each, port, 0.0) for each in accepted[: MOST_SILENT + 1]]
    assert found[:-1] == [None] * MOST_SILENT
    assert found[-1] is not None
    assert "nothing was said" in found[-1].reason
    assert pairs[0][1].recv(1) == b""
    assert connections.heard(accepted[1], "key", 2, 10, 0.0) is None
    assert connections.opened(accepted[-1], port, 0.0) is None, "one of them has spoken: there is room"


def test_what_waits_of_a_key_on_all_its_connections_ends_the_one_with_most(
    listener: sockets.socket, pairs: list[Pair]
) -> None:
    port, connections = listener.getsockname()[1], Connections(0)
    for each, _ in pairs[:2]:
        connections.opened(each.fileno(), port, 0.0)
        assert connections.heard(each.fileno(), "key", 2, 0, 0.0) is None
    for (accepted, other), megabytes in zip(pairs[:2], (1, 2), strict=True):
        for _ in range(16 * megabytes):
            other.sendall(bytes(2**16))
            accepted.recv(2**16, sockets.MSG_WAITALL)  # as libzmq does, which gathers it
    (misuse,) = connections.look(QUIET_SECONDS / 2)
    assert (misuse.address, misuse.key) == ("127.0.0.1", "key")
    assert not connections.knows(pairs[1][0].fileno())
    assert connections.knows(pairs[0][0].fileno())
    assert connections.look(QUIET_SECONDS) == []


def test_a_key_is_full_with_so_many_connections(listener: sockets.socket, pairs: list[Pair]) -> None:
    port, connections = listener.getsockname()[1], Connections(0)
    accepted = [each.fileno() for each, _ in pairs[: MOST_OF_A_KEY + 1]]
    for each in accepted:
        connections.opened(each, port, 0.0)
    assert [connections.heard(each, "key", 2, 0, 0.0) for each in accepted[:-1]] == [None] * MOST_OF_A_KEY
    assert connections.full("key")
    assert not connections.full("another")
    assert connections.heard(accepted[-1], "key", 2, 0, 0.0) is not None
