"""Connections without encryption: real device processes, strangers, and whoever expects the other kind."""

from __future__ import annotations

import contextlib
import socket as sockets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from robustdice.errors import ClusterError
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster
from robustdice.runtime.wire.connections import HELD_BYTES
from robustdice.runtime.wire.founding import found_cluster, write_cluster
from robustdice.runtime.wire.keys import CLIENT_KEY_NAME, new_pair, read_secret, write_secret
from robustdice.runtime.wire.line import Reach
from robustdice.runtime.wire.security import UNENCRYPTED, proven_key
from robustdice.runtime.wire.zeromq import OTHER_TRANSPORT
from test_networks import running, until, until_said, whole

FRAMES = np.random.default_rng(7).standard_normal((20, *INPUT_SHAPE)).astype(np.float32)


def build(directory: Path, transport: str) -> Cluster:
    plan = make_plan(2)
    write_bundles(directory, plan, Network())
    return write_cluster(directory, 2, plan.digest, transport)


@pytest.fixture(scope="module", params=["plain", "curve"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two device processes."""
    directory = tmp_path_factory.mktemp(request.param)
    build(directory, request.param)
    with LocalCluster(directory, timeout_seconds=5.0) as running:
        yield running


def test_both_kinds_give_the_same_answers(cluster: LocalCluster) -> None:
    expected = Network().run(FRAMES)
    for answer in cluster.client.stream(FRAMES):
        assert answer.coverage == 1.0
        assert answer.outputs is not None
        np.testing.assert_allclose(answer.outputs, expected[answer.number], rtol=1e-4, atol=1e-5)
    for device in range(2):
        assert (UNENCRYPTED in cluster.log(device)) == (cluster.cluster.transport == "plain")


def said_to(cluster: Cluster, secret: bytes, directory: Path, seconds: float = 1.0) -> str:
    """Why a client with that key and that cluster file gets no answer, in about that time."""
    cluster.write(directory / CLUSTER_NAME)
    write_secret(directory / CLIENT_KEY_NAME, secret)
    start = time.monotonic()
    with Client(directory / CLUSTER_NAME, timeout_seconds=seconds) as client, pytest.raises(ClusterError) as error:
        client.infer(FRAMES[0])
    assert time.monotonic() < start + seconds + 2
    return str(error.value)


def refused_by(cluster: LocalCluster) -> set[str]:
    """Why device 0 has turned somebody away."""
    return {each["reason"] for each in cluster.client.status()[0]["refused"]}


def test_devices_of_different_kinds_name_each_other(tmp_path: Path) -> None:
    cluster = build(tmp_path, "plain")
    encrypted = tmp_path / "encrypted.toml"
    replace(cluster, transport="curve").write(encrypted)
    with Client(tmp_path / CLUSTER_NAME) as client, running(tmp_path / "device-0"):
        with running(tmp_path / "device-1", cluster=encrypted):
            until_said(client, 0, Reach.OTHER_TRANSPORT.value)
            until(lambda: OTHER_TRANSPORT in {each["reason"] for each in client.status()[0]["refused"]})
        with running(tmp_path / "device-1"):
            until(lambda: whole(client))
            assert client.infer(FRAMES[0]).coverage == 1.0


def test_a_stranger_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    public, secret = new_pair()
    assert "each refuses our key" in said_to(cluster.cluster, secret, tmp_path)
    refused = cluster.client.status()[0]["refused"]
    assert (public.decode(), "its key is not listed") in {(each["public_key"], each["reason"]) for each in refused}


def test_whoever_expects_the_other_kind_is_told_so(cluster: LocalCluster, tmp_path: Path) -> None:
    other = "curve" if cluster.cluster.transport == "plain" else "plain"
    _, secret = read_secret(cluster.directory / CLIENT_KEY_NAME)
    error = said_to(replace(cluster.cluster, transport=other), secret, tmp_path, seconds=2.0)
    assert f"each {Reach.OTHER_TRANSPORT.value}" in error
    assert "copy all of one build" in error
    until(lambda: OTHER_TRANSPORT in refused_by(cluster))


@pytest.mark.parametrize("password", [b"x", b"#" * 40, b"\xff" * 40, b"0" * 255])
def test_passwords_that_are_no_keys_are_refused_and_do_no_harm(cluster: LocalCluster, password: bytes) -> None:
    assert proven_key(b"PLAIN", [b"client", password]) is None
    public = cluster.cluster.clients[0].public_key.encode()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.plain_username, socket.plain_password = public, password
        socket.connect(cluster.cluster.devices[0].address)
        socket.send(b"{}")
        assert not socket.poll(100)
    assert cluster.client.infer(FRAMES[0]).coverage == 1.0


def zmtp_client(cluster: Cluster, directory: Path) -> sockets.socket:
    """A connection to device 0 that is let in, by ZeroMQ's protocol over TCP (RFC 23, 24): it can say what no library
    says."""
    address = Address.parse(cluster.devices[0].address)
    connection = sockets.create_connection((address.host, address.port), 20.0)
    public, secret = read_secret(directory / CLIENT_KEY_NAME)
    with connection.makefile("rb") as stream:

        def command(content: bytes) -> None:
            connection.sendall(bytes([4, len(content)]) + content)
            stream.read(stream.read(2)[1])

        connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"PLAIN".ljust(20, b"\0") + bytes(32))
        stream.read(64)
        command(b"\x05HELLO" + bytes([len(public)]) + public + bytes([len(secret)]) + secret)
        command(b"\x08INITIATE\x0bSocket-Type\0\0\0\x06DEALER")
    return connection


@pytest.mark.parametrize("length", [250, 0])
def test_a_message_that_never_ends_takes_a_bounded_part_of_a_device(cluster: LocalCluster, length: int) -> None:
    if cluster.cluster.transport != "plain":
        pytest.skip("encrypted, nothing can be said by hand")
    cluster.infer(FRAMES[0])
    before = int(cluster.client.status(5.0)[0]["rss_bytes"])
    parts = 10_000 * (bytes([1, length]) + bytes(length))  # and more follow
    with zmtp_client(cluster.cluster, cluster.directory) as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(10**9 // len(parts)):
                connection.sendall(parts)
            raise AssertionError("a gigabyte was read")
        assert cluster.infer(FRAMES[0]).coverage == 1.0
    found = cluster.client.status(5.0)[0]
    assert "bytes wait" in found["refused"][0]["reason"]
    most = 32 * HELD_BYTES if length == 0 else HELD_BYTES  # 2 bytes of an empty part take 64
    assert found["peak_rss_bytes"] < before + most + 25e6


def test_a_listed_public_key_is_no_password(cluster: LocalCluster) -> None:
    entries = cluster.cluster
    for key in [*(each.public_key for each in entries.devices), *(each.public_key for each in entries.clients)]:
        assert proven_key(b"PLAIN", [b"", key.encode()]) != key.encode()


def test_a_build_stays_what_it_was_and_with_another_kind_nobody_keeps_a_key(tmp_path: Path) -> None:
    keys = []
    for transport, expected in ((None, "curve"), ("plain", "plain"), (None, "plain"), ("curve", "curve")):
        founding = found_cluster(tmp_path, 2, "0" * 64, transport=transport)
        founding.write(tmp_path)
        assert Cluster.read(tmp_path / CLUSTER_NAME).transport == expected
        keys.append({*founding.secrets, founding.client_secret})
    assert keys[1] == keys[2]
    assert not keys[0] & keys[1]
    assert not keys[1] & keys[3]


@pytest.mark.parametrize("line", ['transport = "tls"', "transport = 7", 'transport = ""'])
def test_a_cluster_file_with_another_transport_is_refused(tmp_path: Path, line: str) -> None:
    write_cluster(tmp_path, 2, "0" * 64)
    path = tmp_path / CLUSTER_NAME
    path.write_text(path.read_text().replace('transport = "curve"', line))
    with pytest.raises(ClusterError, match="expected curve or plain"):
        Cluster.read(path)


def test_a_cluster_file_of_before_is_encrypted(tmp_path: Path) -> None:
    write_cluster(tmp_path, 2, "0" * 64)
    path = tmp_path / CLUSTER_NAME
    path.write_text(path.read_text().replace('transport = "curve"\n', ""))
    assert Cluster.read(path).transport == "curve"


@pytest.mark.parametrize("where", ["cluster", "secret"])
def test_characters_of_keys_that_are_none_are_refused(tmp_path: Path, where: str) -> None:
    cluster = write_cluster(tmp_path, 2, "0" * 64)
    path = tmp_path / (CLUSTER_NAME if where == "cluster" else CLIENT_KEY_NAME)
    key = cluster.devices[0].public_key if where == "cluster" else path.read_text().strip()
    path.write_text(path.read_text().replace(key, "#" * 40))
    with pytest.raises(ClusterError, match="40 characters"):
        Cluster.read(path) if where == "cluster" else read_secret(path)
