"""Addresses, keys and builds as people have them: real devices, each in a thread, and real sockets."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from robustdice.errors import ClusterError
from robustdice.report.cluster_tables import status_table
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.device import run_device
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.config import ClientEntry, Cluster
from robustdice.runtime.wire.founding import found_cluster
from robustdice.runtime.wire.keys import new_pair, write_secret

FRAME = np.random.default_rng(7).standard_normal(INPUT_SHAPE).astype(np.float32)
ELSEWHERE = "203.0.113.77"
"""An address that no machine has (RFC 5737)."""
EVERY_ADDRESS = ("*", "0.0.0.0", "[::]")  # noqa: S104
"""Hosts to listen on only."""


def build(directory: Path, devices: int = 2, holders: int = 2, host: Any = None, plan_of: int = 0) -> Cluster:
    """A build of a tiny network; builds of different ``plan_of`` are of different plans."""
    plan = replace(make_plan(devices, holders), method=f"test {plan_of}")
    write_bundles(directory, plan, Network())
    founding = found_cluster(directory, devices, plan.digest, host)
    founding.write(directory)
    return founding.cluster


@contextlib.contextmanager
def running(*bundles: Path, cluster: Path | None = None) -> Iterator[None]:
    """Devices, each in a thread of its own; what one of them raises is raised here."""
    stop, errors = threading.Event(), []

    def serve(bundle: Path) -> None:
        try:
            run_device(bundle, cluster, stop=stop)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(bundle,)) for bundle in bundles]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def until(true: Callable[[], Any], seconds: float = 15.0) -> float:
    """Seconds until something is true."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() < start + seconds, "it did not become true"
        time.sleep(0.02)
    return time.monotonic() - start


def whole(client: Client) -> bool:
    """Do all devices see each other?"""
    everyone = list(range(len(client.cluster.devices)))
    found = client.status(0.3)
    return list(found) == everyone and all(said["up"] == everyone for said in found.values())


def until_said(client: Client, device: int, text: str) -> None:
    """Wait for what a device of two says about its connection to the other one."""
    peer = str(1 - device)
    until(lambda: client.status(0.3).get(device, {"connections": {peer: ""}})["connections"][peer].startswith(text))


# -- addresses


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("tcp://10.0.0.3:5", "tcp://10.0.0.3:5"),
        ("tcp://[::1]:5", "tcp://[::1]:5"),
        ("tcp://[0:0:0:0:0:0:0:1]:0005", "tcp://[::1]:5"),
        ("tcp://[fe80::1%eth0]:65535", "tcp://[fe80::1%eth0]:65535"),
        ("tcp://Jetson_3.local:5", "tcp://jetson_3.local:5"),
    ],
)
def test_an_address_has_one_spelling(text: str, spelled: str) -> None:
    assert str(Address.parse(text)) == spelled
    assert Address.parse(spelled).reachable


@pytest.mark.parametrize(
    "text",
    [
        *(
            "10.0.0.3:5",
            "udp://a:5",
            "tcp://a",
            "tcp://a:0",
            "tcp://a:65536",
            "tcp://:5",
            "tcp://a b:5",
            "tcp://a..b:5",
        ),
        *("tcp://-a:5", "tcp://256.1.1.1:5", "tcp://1.2.3:5", "tcp://0x7f000001:5", "tcp://::1:5", "tcp://[a]:5", ""),
        *("tcp://[10.0.0.3]:5", "tcp://a:b:5", "tcp://a:5/x", "tcp://a:5\n", "tcp://*:*", "tcp://mühle:5", "tcp://a:"),
    ],
)
def test_what_is_no_address_is_refused_as_such(text: str) -> None:
    with pytest.raises(ClusterError, match=r"^the (address|host|port) "):
        Address.parse(text)


@pytest.mark.parametrize("host", [*EVERY_ADDRESS, "[::ffff:0.0.0.0]", "224.0.0.1", "[ff02::1]"])
def test_an_address_that_nobody_can_connect_to_is_an_error_and_names_listen(tmp_path: Path, host: str) -> None:
    cluster = build(tmp_path)
    replace(cluster, devices=(replace(cluster.devices[0], address=f"tcp://{host}:5"), cluster.devices[1])).write(
        tmp_path / "cluster.toml"
    )
    with pytest.raises(ClusterError, match=r"cluster.toml cannot be used: nobody can connect to .* listen = "):
        Cluster.read(tmp_path / "cluster.toml")
    with pytest.raises(ClusterError, match="nobody can connect to"):
        found_cluster(tmp_path / "new", 2, "0" * 64, host.strip("[]"))


@pytest.mark.parametrize("host", [*EVERY_ADDRESS, "127.0.0.1"])
def test_a_device_listens_elsewhere_than_others_reach_it(tmp_path: Path, host: str) -> None:
    cluster = build(tmp_path, host="localhost")
    devices = [replace(device, listen=f"tcp://{host}:{device.address.rsplit(':', 1)[1]}") for device in cluster.devices]
    replace(cluster, devices=tuple(devices)).write(tmp_path / "cluster.toml")
    with running(tmp_path / "device-0", tmp_path / "device-1"), Client(tmp_path / "cluster.toml") as client:
        until(lambda: whole(client))
        assert client.infer(FRAME).coverage == 1.0


def test_ipv6_works_from_the_build_to_the_answer(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    cluster = build(tmp_path, host="::1")
    assert all(device.address.startswith("tcp://[::1]:") for device in cluster.devices)
    with running(tmp_path / "device-0", tmp_path / "device-1"), Client(tmp_path / "cluster.toml") as client:
        until(lambda: whole(client))
        assert client.infer(FRAME).coverage == 1.0


def test_a_build_checks_its_addresses_before_it_writes_anything(tmp_path: Path) -> None:
    for host, port in [
        ("a:5", None),
        ("a b", 5),
        ("10.0.0.1,10.0.0.2", None),
        (["10.0.0.1"], None),
        (["10.0.0.1", "10.0.0.2", "10.0.0.3"], None),
        (["10.0.0.1", ""], 5),
        ("10.0.0.1", 0),
        ("10.0.0.1", -1),
        ("10.0.0.1", 65535),
        (None, 99999),
        ("*", 5),
    ]:
        with pytest.raises(ClusterError):
            found_cluster(tmp_path / "build", 2, "0" * 64, host, port)
    assert not (tmp_path / "build").exists()
    assert [d.address for d in found_cluster(tmp_path, 2, "0" * 64, "fd00::1", 65534).cluster.devices] == [
        "tcp://[fd00::1]:65534",
        "tcp://[fd00::1]:65535",
    ]
    assert [d.address for d in found_cluster(tmp_path, 2, "0" * 64, ["pi-a", "10.0.0.2"]).cluster.devices] == [
        "tcp://pi-a:27200",
        "tcp://10.0.0.2:27201",
    ]


@pytest.mark.parametrize("name", [5, "", " a", "a\nb", "\x1b[31m"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: Any) -> None:
    cluster = found_cluster(tmp_path, 2, "0" * 64).cluster
    with pytest.raises(ClusterError, match="the name "):
        replace(cluster, devices=(replace(cluster.devices[0], name=name), cluster.devices[1])).checked()


def test_two_devices_with_one_name_or_one_address_spelled_twice_are_refused(tmp_path: Path) -> None:
    cluster = build(tmp_path, host="::1")
    first, second = cluster.devices
    for twin in (
        replace(second, name=first.name),
        replace(second, address=first.address.replace("[::1]", "[0::0001]")),
    ):
        with pytest.raises(ClusterError, match="two devices have the same"):
            replace(cluster, devices=(first, twin)).checked()


def test_a_name_that_means_loopback_is_warned_about_when_the_cluster_has_several_hosts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = build(tmp_path, host=["localhost", ELSEWHERE])
    port = cluster.devices[0].address.rsplit(":", 1)[1]
    with caplog.at_level(logging.INFO), running(tmp_path / "device-0"), Client(tmp_path / "cluster.toml") as client:
        until(lambda: 0 in client.status(0.3))
    assert f"listens on tcp://127.0.0.1:{port} (its address is tcp://localhost:{port})" in caplog.text
    assert "no other machine can reach it" in caplog.text


# -- boot order


IN_A_NETWORK_OF_ITS_OWN = """
import logging, subprocess, sys, threading, time
from pathlib import Path
from robustdice.runtime.client import Client
from robustdice.runtime.device import run_device

root, frame = Path(sys.argv[1]), __import__("numpy").zeros({shape}, "float32")
sh = lambda command: subprocess.run(command, shell=True, check=True)
sh("ip link set lo up")
hosts = root / "hosts"
hosts.write_text("127.0.0.1 localhost\\n")
sh(f"mount --bind {{hosts}} /etc/hosts")
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
stop = threading.Event()
devices = [threading.Thread(target=run_device, args=(root / f"device-{{k}}",), kwargs=dict(stop=stop)) for k in (0, 1)]
for device in devices:
    device.start()
time.sleep(0.3)
sh("ip addr add {address}/32 dev lo")
hosts.write_text("127.0.0.1 localhost\\n{address} late.example\\n")
with Client(root / "cluster.toml", timeout_seconds=20.0) as client:
    while [said["up"] for said in client.status(0.3).values()] != [[0, 1], [0, 1]]:
        pass
    print("coverage", client.infer(frame).coverage)
stop.set()
for device in devices:
    device.join()
"""


def test_a_device_waits_for_its_address_and_for_its_name(tmp_path: Path) -> None:
    unshare = ["unshare", "--map-root-user", "--net", "--mount"]
    try:
        subprocess.run([*unshare, "ip", "link", "set", "lo", "up"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {error}")
    build(tmp_path, host=[ELSEWHERE, "late.example"])
    script = IN_A_NETWORK_OF_ITS_OWN.format(shape=INPUT_SHAPE, address=ELSEWHERE)
    found = subprocess.run(
        [*unshare, sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "coverage 1.0" in found.stdout
    said = found.stdout.splitlines()
    assert len([line for line in said if f"this machine has no address {ELSEWHERE}" in line]) == 1
    assert len([line for line in said if "cannot listen on tcp://late.example:27201 yet: its name has no" in line]) == 1
    assert f"listens on tcp://{ELSEWHERE}:27201 (its address is tcp://late.example:27201)" in found.stdout
    assert "stop the other program" not in found.stdout


def test_a_device_that_waits_for_its_address_stops_at_once(tmp_path: Path) -> None:
    build(tmp_path, host=[ELSEWHERE, "127.0.0.1"])
    command = [sys.executable, "-m", "robustdice.runtime.device", str(tmp_path / "device-0")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while "cannot listen on" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(1.0) == 0
    finally:
        process.kill()
        process.communicate()


def test_all_devices_here_are_only_started_where_all_their_addresses_are(tmp_path: Path) -> None:
    build(tmp_path, host=["127.0.0.1", ELSEWHERE])
    with pytest.raises(ClusterError, match=rf"this machine has no address tcp://{ELSEWHERE}:"), LocalCluster(tmp_path):
        pass


# -- refused


def test_a_device_that_was_refused_is_let_in_when_its_key_is_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = build(tmp_path)
    stranger = replace(cluster.devices[0], public_key=new_pair()[0].decode())
    stale = tmp_path / "stale.toml"
    replace(cluster, devices=(stranger, cluster.devices[1])).write(stale)
    with Client(tmp_path / "cluster.toml") as client, running(tmp_path / "device-0"):
        with caplog.at_level(logging.INFO), running(tmp_path / "device-1", cluster=stale):
            until_said(client, 0, "refuses our key")
            until(lambda: client.status(0.3)[1]["refused"])
            time.sleep(1.2)  # it is tried again, and not said again
            found = client.status(0.5)
            assert found[1]["refused"][0]["public_key"] == cluster.devices[0].public_key
            assert found[1]["refused"][0]["count"] > 1
            assert found[1]["connections"]["0"].startswith("has another key")
            shown = status_table(["a", "b"], found, client.troubles()).caption or ""
            assert "a says: b refuses our key" in shown
            assert f"b has refused 127.0.0.1, key {cluster.devices[0].public_key}: its key is not listed (" in shown
        said = [record.getMessage() for record in caplog.records]
        assert len([text for text in said if text.startswith("device 1 ") and "refuses our key" in text]) == 1
        assert len([text for text in said if text.startswith("refused 127.0.0.1, key ")]) == 1
        with running(tmp_path / "device-1"):
            assert until(lambda: whole(client)) < 5
            assert client.infer(FRAME).coverage == 1.0
            assert client.status()[0]["connections"] == {"1": "connected"}


def test_a_client_that_was_refused_is_let_in_when_its_key_is_listed(tmp_path: Path) -> None:
    cluster = build(tmp_path)
    public, secret = new_pair()
    write_secret(tmp_path / "guest.key", secret)
    with Client(tmp_path / "cluster.toml", tmp_path / "guest.key", timeout_seconds=0.5) as guest:
        with running(tmp_path / "device-0"):
            until(lambda: not guest.status(0.2) and "refuses our key" in guest.troubles().get(0, ""))
            with pytest.raises(ClusterError, match=r"device 0 at tcp://127.* refuses our key: .*; list this client"):
                guest.infer(FRAME)
        guests = (*cluster.clients, ClientEntry("guest", public.decode()))
        replace(cluster, clients=guests).write(tmp_path / "cluster.toml")
        with running(tmp_path / "device-0"):
            assert until(lambda: guest.status(0.3)) < 5
            assert guest.infer(FRAME).coverage == 1.0


# -- two builds


def two_builds(root: Path, **second: Any) -> tuple[Path, Path]:
    """Two builds for the same addresses."""
    one, other = root / "one", root / "other"
    cluster = build(one)
    for name in ("device-0", "device-1"):
        (other / name).mkdir(parents=True)
    if not second.pop("new_keys", False):
        for name in ("cluster.toml", "client.key", "device-0/secret.key", "device-1/secret.key"):
            (other / name).write_bytes((one / name).read_bytes())
    made = build(other, **second)
    devices = [replace(new, address=old.address) for new, old in zip(made.devices, cluster.devices, strict=True)]
    replace(made, devices=tuple(devices)).write(other / "cluster.toml")
    return one, other


def test_devices_of_builds_with_other_keys_name_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = two_builds(tmp_path, new_keys=True)
    with (
        caplog.at_level(logging.INFO),
        running(one / "device-0"),
        running(other / "device-1"),
        Client(one / "cluster.toml") as mine,
        Client(other / "cluster.toml") as theirs,
    ):
        for client, device in ((mine, 0), (theirs, 1)):
            until_said(client, device, "has another key")
            assert client.troubles()[1 - device].startswith("has another key than in our cluster.toml")
        assert mine.status(0.3)[0]["refused"][0]["reason"].startswith("it expects this device to have another key")
    names = {r.getMessage().split(" ")[1] for r in caplog.records if "has another key" in r.getMessage()}
    assert names >= {"0", "1"}


def test_devices_and_clients_of_another_plan_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = two_builds(tmp_path, plan_of=1)
    with (
        caplog.at_level(logging.INFO),
        running(one / "device-0"),
        running(other / "device-1"),
        Client(one / "cluster.toml") as mine,
        Client(other / "cluster.toml") as theirs,
    ):
        for client, device in ((mine, 0), (theirs, 1)):
            until_said(client, device, "is of another build: plan ")
            assert client.troubles()[1 - device].startswith("is of another build: plan ")
        assert mine.infer(FRAME).down == (1,)
    said = [record.getMessage() for record in caplog.records]
    for start in ("device 0 (tcp://", "device 1 (tcp://", "refused 127.0.0.1: a client of another build"):
        assert [text for text in said if text.startswith(start) and "of another build: plan " in text]


def test_a_client_of_another_plan_is_told_so(tmp_path: Path) -> None:
    one, other = two_builds(tmp_path, plan_of=1)
    expected = r"device 0 at .* is of another build: plan .*; device 1 at .* is down: nobody listens .*; copy all"
    with (
        running(one / "device-0"),
        Client(other / "cluster.toml", timeout_seconds=1.0) as client,
        pytest.raises(ClusterError, match=expected),
    ):
        client.infer(FRAME)


# -- building again


def keys(cluster: Cluster) -> set[str]:
    return {device.public_key for device in cluster.devices} | {client.public_key for client in cluster.clients}


def test_a_build_keeps_addresses_and_keys(tmp_path: Path) -> None:
    cluster = build(tmp_path)
    guest = ClientEntry("guest", new_pair()[0].decode())
    first = replace(cluster.devices[0], name="kitchen", listen="tcp://*:4711")
    replace(cluster, devices=(first, cluster.devices[1]), clients=(*cluster.clients, guest)).write(
        tmp_path / "cluster.toml"
    )
    again = build(tmp_path, plan_of=1)
    assert again.plan_digest != cluster.plan_digest
    assert again.devices == (first, cluster.devices[1])
    assert again.clients == (*cluster.clients, guest)
    for secret in ("device-0/secret.key", "device-1/secret.key", "client.key"):
        assert (tmp_path / secret).stat().st_mode & 0o777 == 0o600

    moved = build(tmp_path, host=["10.0.0.1", "10.0.0.2"])
    assert [device.address for device in moved.devices] == ["tcp://10.0.0.1:27200", "tcp://10.0.0.2:27201"]
    assert [device.public_key for device in moved.devices] == [device.public_key for device in cluster.devices]
    assert (moved.devices[0].name, moved.devices[0].listen) == ("kitchen", None)

    fresh = found_cluster(tmp_path, 2, "0" * 64, new_keys=True)
    assert [device.address for device in fresh.cluster.devices] == [device.address for device in moved.devices]
    assert not keys(moved) & keys(fresh.cluster)


def test_a_build_for_more_or_fewer_devices_keeps_the_first_ones(tmp_path: Path) -> None:
    cluster = build(tmp_path)
    more = build(tmp_path, 4)
    assert more.devices[:2] == cluster.devices
    assert more.devices[2].address.startswith("tcp://127.0.0.1:")
    assert build(tmp_path, 3).devices == more.devices[:3]

    build(tmp_path, host=["10.0.0.1", "10.0.0.2"])
    with pytest.raises(ClusterError, match="2 devices on several hosts, the plan has 3: name the hosts"):
        found_cluster(tmp_path, 3, "0" * 64)


def test_a_key_that_is_gone_is_made_anew_and_a_cluster_file_that_is_broken_is_not_replaced(tmp_path: Path) -> None:
    cluster = build(tmp_path)
    (tmp_path / "device-0" / "secret.key").unlink()
    (tmp_path / "client.key").write_text("no key")
    again = build(tmp_path)
    assert again.devices[0].address == cluster.devices[0].address
    assert again.devices[0].public_key != cluster.devices[0].public_key
    assert again.devices[1] == cluster.devices[1]
    assert len(again.clients) == 1
    assert again.clients != cluster.clients
    (tmp_path / "cluster.toml").write_text("x = ")
    with pytest.raises(ClusterError, match=r"is not TOML .* remove it and write a new one"):
        build(tmp_path)


def test_devices_stay_reachable_when_the_same_plan_is_built_again_under_them(tmp_path: Path) -> None:
    build(tmp_path)
    with running(tmp_path / "device-0", tmp_path / "device-1"):
        with Client(tmp_path / "cluster.toml") as client:
            until(lambda: whole(client))
        build(tmp_path)
        with Client(tmp_path / "cluster.toml") as client:
            assert client.infer(FRAME).coverage == 1.0
