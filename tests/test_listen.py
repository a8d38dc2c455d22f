"""The port that a device listens at may be another's for a while, above all when it starts again."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from robustdice.errors import ClusterError
from robustdice.runtime.wire import founding, listen
from robustdice.runtime.wire.address import ANY, Address
from robustdice.runtime.wire.founding import LOOPBACK, free_ports


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


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")
def test_a_port_that_another_has_at_one_address_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listen, "IN_USE_SECONDS", 0.05)
    monkeypatch.setattr(listen, "LONGEST_IN_USE_SECONDS", 0.3)
    (port,) = free_ports(["127.0.0.2"])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        with socket.create_server(("127.0.0.2", port)), pytest.raises(ClusterError, match="stop the other program"):
            listen.bind_in_time(router, Address(ANY, port), 0, threading.Event())
    finally:
        router.close(0)
        context.term()


@pytest.mark.parametrize("handed_out", ["32768\t60999\n", "1024\t30000\n", "nothing that is known"])
def test_devices_here_listen_at_ports_that_nobody_is_handed_out(
    handed_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text(handed_out)
    monkeypatch.setattr(founding, "HANDED_OUT_FILE", tmp_path / "range")
    ports = free_ports([LOOPBACK] * 16)
    assert len(set(ports)) == 16
    first, last = map(int, handed_out.split()) if handed_out[0].isdigit() else founding.HANDED_OUT
    assert not [port for port in ports if first <= port <= last]


def test_where_every_port_is_handed_out_one_of_them_is_taken_and_none_that_a_listed_device_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text("1024 65535")
    monkeypatch.setattr(founding, "HANDED_OUT_FILE", tmp_path / "range")
    (port,) = free_ports([LOOPBACK])
    monkeypatch.setattr(founding, "LOCAL_PORTS", range(port, port + 2))
    assert free_ports([LOOPBACK], {port + 1}) == [port]


def test_a_port_that_is_in_use_is_not_taken_and_where_all_are_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, free_ports([LOOPBACK])[0])) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(founding, "LOCAL_PORTS", range(port, port + 2))
        with pytest.raises(ClusterError, match=r"no port of 127\.0\.0\.1 can be had: .*in use; give one with --port"):
            free_ports([LOOPBACK] * 2)
