"""Who is in a cluster: ``cluster.toml`` (docs/formats.md)."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from robustdice.errors import ClusterError
from robustdice.files import write_atomically
from robustdice.plan import MAX_DEVICES
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.keys import is_key
from robustdice.runtime.wire.security import TRANSPORTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT_VERSION = 1
CLUSTER_NAME = "cluster.toml"


@dataclass(frozen=True)
class DeviceEntry:
    """A device: its name for people, where others reach it (``tcp://HOST:PORT``), its public key (Z85), and where it
    listens when that is another address, behind NAT or in a container."""

    name: str
    address: str
    public_key: str
    listen: str | None = None

    @property
    def listens_on(self) -> str:
        """The address that the device itself binds."""
        return self.address if self.listen is None else self.listen


@dataclass(frozen=True)
class ClientEntry:
    """A client that may send frames."""

    name: str
    public_key: str


@dataclass(frozen=True)
class Cluster:
    """The devices of one plan, in order of their numbers, and the clients that they answer. ``transport`` is ``curve``,
    or ``plain`` where connections are not encrypted."""

    plan_digest: str
    devices: tuple[DeviceEntry, ...]
    clients: tuple[ClientEntry, ...]
    transport: str = "curve"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Cluster:
        """Read ``cluster.toml``; ClusterError with the reason when it is missing or not valid."""
        remedy = "correct it, or remove it and write a new one with 'robustdice build'"
        try:
            document = tomllib.loads(Path(path).read_bytes().decode())
        except OSError as error:
            raise ClusterError(f"cannot read {path}: {error.strerror}; 'robustdice build' writes it") from None
        except ValueError as error:
            raise ClusterError(f"{path} is not TOML ({error}); {remedy}") from None
        if document.get("format") != "robustdice-cluster" or document.get("version") != FORMAT_VERSION:
            raise ClusterError(f"{path} is not a cluster file of version {FORMAT_VERSION}; {remedy}")
        try:
            cluster = cls(
                plan_digest=str(document["plan_digest"]),
                devices=tuple(DeviceEntry(**entry) for entry in document["devices"]),
                clients=tuple(ClientEntry(**entry) for entry in document["clients"]),
                transport=document.get("transport", "curve"),
            )
        except (KeyError, TypeError) as error:
            raise ClusterError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy}") from None
        try:
            return cluster.checked()
        except ClusterError as error:
            raise ClusterError(f"{path} cannot be used: {error}; {remedy}") from None

    def write(self, path: Path) -> None:
        """Write ``cluster.toml``."""
        document: dict[str, Any] = {
            "format": "robustdice-cluster",
            "version": FORMAT_VERSION,
            "plan_digest": self.plan_digest,
            "transport": self.transport,
            "devices": [_without_none(vars(device)) for device in self.devices],
            "clients": [vars(client) for client in self.clients],
        }
        write_atomically(path, tomli_w.dumps(document).encode())

    @property
    def one_machine(self) -> bool:
        """Do all devices have the same host, or hosts that only their own machine can reach?"""
        addresses = [Address.parse(device.address) for device in self.devices]
        return len({address.host for address in addresses}) == 1 or all(address.loopback for address in addresses)

    @property
    def here(self) -> bool:
        """Do all devices run on the machine that reads this, whichever it is?"""
        return all(Address.parse(device.address).loopback for device in self.devices)

    def checked(self) -> Cluster:
        """This cluster; ClusterError with what is wrong when no device could run with it."""
        if self.transport not in TRANSPORTS:
            raise ClusterError(f"the transport {self.transport!r}, expected {' or '.join(TRANSPORTS)}")
        names = [device.name for device in self.devices] + [client.name for client in self.clients]
        if bad := [name for name in names if not _is_name(name)]:
            raise ClusterError(f"the name {bad[0]!r}, expected a text in one line")
        if not 1 <= len(self.devices) <= MAX_DEVICES:
            raise ClusterError(f"{len(self.devices)} devices, expected 1 to {MAX_DEVICES}")
        addresses = [Address.parse(device.address) for device in self.devices]
        for device, address in zip(self.devices, addresses, strict=True):
            if not address.reachable:
                raise ClusterError(
                    f"nobody can connect to {device.address!r}, the address of {device.name!r}: an address names one "
                    f'machine; to listen on all of its addresses, add listen = "{address}"'
                )
            Address.parse(device.listens_on)
        if twice := _repeated(map(str, addresses)):
            raise ClusterError(f"two devices have the same address, {twice}")
        if twice := _repeated(device.name for device in self.devices):
            raise ClusterError(f"two devices have the same name, {twice!r}")
        keys = [device.public_key for device in self.devices] + [client.public_key for client in self.clients]
        if wrong := [key for key in keys if not is_key(key)]:
            raise ClusterError(f"the public key {wrong[0]!r}, expected 40 characters of Z85")
        if twice := _repeated(keys):
            raise ClusterError(f"two entries have the same public key, {twice}")
        return self


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.strip() == value and value.isprintable() and value != ""


def _repeated(values: Iterable[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
