"""Founding a cluster: the addresses and key pairs of a build, those of an earlier build kept where they can be."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from robustdice.errors import ClusterError
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.config import CLUSTER_NAME, ClientEntry, Cluster, DeviceEntry
from robustdice.runtime.wire.keys import CLIENT_KEY_NAME, SECRET_NAME, new_pair, read_secret, write_secret
from robustdice.runtime.wire.security import TRANSPORTS

LOOPBACK = "127.0.0.1"
BASE_PORT = 27200
"""Of devices on other machines; below the ports that Linux hands out to outgoing connections."""
LOCAL_PORTS = range(20_000, 2**16)
"""Of devices on this machine, but for those ports."""
HANDED_OUT_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
HANDED_OUT = (2**15, 2**16 - 1)
"""Where a system does not say it."""
CLIENT = "client"
"""The name of the client whose key a build comes with."""


@dataclass(frozen=True)
class Founding:
    """A cluster that is complete but not written yet: the secret keys of its devices, in order, and of its client."""

    cluster: Cluster
    secrets: tuple[bytes, ...]
    client_secret: bytes

    def write_secrets(self, directory: Path) -> None:
        """Write ``device-K/secret.key``; OutputError when that fails."""
        for number, secret in enumerate(self.secrets):
            write_secret(directory / f"device-{number}" / SECRET_NAME, secret)

    def write(self, directory: Path) -> None:
        """Write ``cluster.toml``, ``client.key`` and ``device-K/secret.key``; OutputError when that fails."""
        self.write_secrets(directory)
        write_secret(directory / CLIENT_KEY_NAME, self.client_secret)
        self.cluster.write(directory / CLUSTER_NAME)


def found_cluster(
    directory: Path,
    devices: int,
    plan_digest: str,
    host: str | Sequence[str] | None = None,
    base_port: int | None = None,
    new_keys: bool = False,
    transport: str | None = None,
) -> Founding:
    """The cluster of a build in ``directory``; writes nothing.

    ``host`` is where all devices run, or one host for each of them; device K listens on ``base_port`` + K (without:
    ports that are free now where every host is this machine, 27200 + K elsewhere). Where neither is given, the devices
    keep the addresses that a cluster in ``directory`` has for them. Key pairs and listed clients are kept too, unless
    ``new_keys``; a device whose secret key is not there any more gets a new pair. ``transport`` is that of the cluster
    that is there unless it is said, else encrypted; with another one than before nobody keeps a key. ClusterError when
    the addresses cannot be used, or the cluster that is there cannot be read.
    """
    before = _read_before(directory)
    used = before.transport if before else TRANSPORTS[0]
    new_keys = new_keys or transport not in {None, used}
    if before is None or host is not None or base_port is not None:
        hosts = _hosts(before, host, devices)
        entries = [DeviceEntry(f"device-{k}", str(a), "") for k, a in enumerate(_addresses(hosts, base_port))]
        for number, old in enumerate(before.devices[:devices] if before else ()):
            entries[number] = replace(entries[number], name=old.name)
    else:
        entries = [*before.devices[:devices], *_further(before, devices)]
    pairs = []
    for number in range(devices):
        known = before.devices[number] if before and number < len(before.devices) else None
        pair = None if known is None or new_keys else _pair_of(known, directory / f"device-{number}" / SECRET_NAME)
        pairs.append(pair or new_pair())
    entries = [replace(entry, public_key=pair[0].decode()) for entry, pair in zip(entries, pairs, strict=True)]
    clients, client_pair = _clients(None if new_keys else before, directory / CLIENT_KEY_NAME)
    cluster = Cluster(plan_digest, tuple(entries), clients, transport or used).checked()
    return Founding(cluster, tuple(secret for _, secret in pairs), client_pair[1])


def write_cluster(
    directory: str | os.PathLike[str], devices: int, plan_digest: str, transport: str | None = None
) -> Cluster:
    """Found a cluster on this machine and write it into ``directory``; see :func:`found_cluster`."""
    founding = found_cluster(Path(directory), devices, plan_digest, transport=transport)
    founding.write(Path(directory))
    return founding.cluster


def free_ports(hosts: Sequence[str], besides: Collection[int] = ()) -> list[int]:
    """For each of these hosts, which are this machine, a TCP port that nobody uses now; all different, and none of
    ``besides``. If there are others, none of those that the system hands out to connections and to whoever takes any
    port: while a device is down, nobody gets its."""
    first, last = _handed_out()
    every = [port for port in LOCAL_PORTS if port not in besides]
    lasting = [port for port in every if not first <= port <= last]
    chances, found = random.SystemRandom().sample(lasting or every, len(lasting or every)), list[int]()
    error = ""
    for port in chances:
        if len(found) == len(hosts):
            break
        host = hosts[len(found)]
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError as refused:
                error = refused.strerror or str(refused)
                if refused.errno != errno.EADDRINUSE:
                    break
            else:
                found.append(port)
    if len(found) < len(hosts):
        raise ClusterError(f"no port of {', '.join(dict.fromkeys(hosts))} can be had: {error}; give one with --port")
    return found


def _handed_out() -> tuple[int, int]:
    """The first and the last port that this system hands out."""
    try:
        first, last = map(int, HANDED_OUT_FILE.read_text("ascii").split())
    except (OSError, ValueError):
        return HANDED_OUT
    return first, last


def _read_before(directory: Path) -> Cluster | None:
    path = directory / CLUSTER_NAME
    return Cluster.read(path) if path.exists() else None


def _hosts(before: Cluster | None, host: str | Sequence[str] | None, devices: int) -> list[str]:
    if isinstance(host, str):
        return [host] * devices
    if host is None:
        hosts = [Address.parse(entry.address).host for entry in before.devices] if before else [LOOPBACK]
        if len(set(hosts)) == 1:
            return hosts[:1] * devices
        host = hosts[:devices]
    if len(host) != devices:
        raise ClusterError(f"{len(host)} hosts for {devices} devices; --hosts takes one for each of them")
    return list(host)


def _addresses(hosts: Sequence[str], base_port: int | None) -> list[Address]:
    first = BASE_PORT if base_port is None else base_port
    if not 0 < first <= 2**16 - len(hosts):
        raise ClusterError(
            f"port {first} and the {len(hosts) - 1} after it are not all among 1 to {2**16 - 1}; --port takes "
            f"1 to {2**16 - len(hosts)} for {len(hosts)} devices"
        )
    addresses = [Address.of(host, first + number) for number, host in enumerate(hosts)]
    if base_port is None and all(address.loopback for address in addresses):
        ports = free_ports([LOOPBACK if address.ip is None else address.host for address in addresses])
        return [replace(address, port=port) for address, port in zip(addresses, ports, strict=True)]
    return addresses


def _further(before: Cluster, devices: int) -> list[DeviceEntry]:
    """Entries, without keys, for the devices that an earlier build did not have: on its host, when that is one."""
    numbers = range(len(before.devices), devices)
    if not numbers:
        return []
    addresses = [Address.parse(entry.address) for entry in before.devices]
    if len({address.host for address in addresses}) > 1:
        raise ClusterError(
            f"the cluster here has {len(addresses)} devices on several hosts, the plan has {devices}: name the hosts "
            "of all devices with --hosts"
        )
    host = addresses[0].host
    if addresses[0].loopback:
        here = [LOOPBACK if addresses[0].ip is None else host] * len(numbers)
        ports: Sequence[int] = free_ports(here, {address.port for address in addresses})
    else:
        ports = [max(address.port for address in addresses) + 1 + k for k in range(len(numbers))]
    return [
        DeviceEntry(f"device-{number}", str(Address.of(host, port)), "")
        for number, port in zip(numbers, ports, strict=True)
    ]


def _pair_of(entry: DeviceEntry | ClientEntry, path: Path) -> tuple[bytes, bytes] | None:
    """The key pair of an entry, when the secret half is here."""
    try:
        pair = read_secret(path)
    except ClusterError:
        return None
    return pair if pair[0].decode() == entry.public_key else None


def _clients(before: Cluster | None, path: Path) -> tuple[tuple[ClientEntry, ...], tuple[bytes, bytes]]:
    """The clients listed so far and the key pair that belongs to one of them; a new pair where there is none."""
    listed = before.clients if before else ()
    for entry in listed:
        if pair := _pair_of(entry, path):
            return listed, pair
    pair = new_pair()
    others = tuple(entry for entry in listed if entry.name != CLIENT)
    return (*others, ClientEntry(CLIENT, pair[0].decode())), pair
