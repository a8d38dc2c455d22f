"""The port that a device listens at may be another's for a while, above all when it starts again."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from robustdice.errors import ClusterError
from robustdice.runtime.wire import founding, listen
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.founding import LOOPBACK, free_ports

HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextlib.contextmanager
def bound_while(taken: socket.socket, seconds: float) -> Iterator[Address | None]:
    """What comes of a device that wants the port of a socket which is closed after so long."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    timer = threading.Timer(seconds, taken.close)
    timer.start()
    try:
        yield listen.bind_in_time(router, Address(LOOPBACK, taken.getsockname()[1]), 0, threading.Event())
    finally:
        timer.join()
        router.close(0)
        context.term()


def test_a_device_that_starts_again_has_its_port_as_soon_as_the_process_before_lets_go_of_it() -> None:
    taken = socket.create_server((LOOPBACK, 0))
    with bound_while(taken, 0.15) as address:
        assert address is not None


def test_a_port_that_a_connection_to_elsewhere_happens_to_have_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listen, "IN_USE_SECONDS", 0.05)
    caplog.set_level(logging.WARNING)
    with socket.create_server((LOOPBACK, 0)) as server:
        taken = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # nothing is left of the connection
        timer = threading.Timer(0.4, other.close)
        timer.start()
        with bound_while(taken, 0.5) as address:
            assert address is not None
        timer.join()
    assert f"port {address.port} is in use; it is tried again" in caplog.text


def test_devices_here_listen_at_ports_that_nobody_is_handed_out() -> None:
    ports = free_ports([LOOPBACK] * 16)
    assert len(set(ports)) == 16
    if not HANDED_OUT.exists():
        pytest.skip("this system does not say which ports it hands out")
    assert max(ports) < int(HANDED_OUT.read_text().split()[0])


def test_a_port_that_is_in_use_is_not_taken_and_where_all_are_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, free_ports([LOOPBACK])[0])) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(founding, "LOCAL_PORTS", range(port, port + 2))
        with pytest.raises(ClusterError, match=r"no port of 127\.0\.0\.1 can be had: .*in use; give one with --port"):
            free_ports([LOOPBACK] * 2)
