"""Who is in a cluster: ``cluster.toml`` and the CURVE key pairs (docs/formats.md)."""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import zmq

from robustdice.errors import ClusterError, OutputError
from robustdice.files import write_atomically
from robustdice.plan import MAX_DEVICES
from robustdice.runtime.journal import say

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
CLUSTER_NAME = "cluster.toml"
SECRET_NAME = "secret.key"  # noqa: S105
CLIENT_KEY_NAME = "client.key"
ADDRESS = re.compile(r"tcp://[^\s/:]+:(\d{1,5})|tcp://\[[0-9a-fA-F:]+\]:(\d{1,5})")
KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class DeviceEntry:
    """A device: its name for people, where it listens (``tcp://HOST:PORT``), and its public key (Z85)."""

    name: str
    address: str
    public_key: str


@dataclass(frozen=True)
class ClientEntry:
    """A client that may send frames."""

    name: str
    public_key: str


@dataclass(frozen=True)
class Cluster:
    """The devices of one plan, in order of their numbers, and the clients that they answer."""

    plan_digest: str
    devices: tuple[DeviceEntry, ...]
    clients: tuple[ClientEntry, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Cluster:
        """Read ``cluster.toml``; ClusterError with the reason when it is missing or not valid."""
        remedy = "write a new one with 'robustdice build'"
        try:
            document = tomllib.loads(Path(path).read_bytes().decode())
        except OSError as error:
            raise ClusterError(f"cannot read {path}: {error.strerror}; {remedy}") from None
        except ValueError as error:
            raise ClusterError(f"{path} is not TOML ({error}); {remedy}") from None
        if document.get("format") != "robustdice-cluster" or document.get("version") != FORMAT_VERSION:
            raise ClusterError(f"{path} is not a cluster file of version {FORMAT_VERSION}; {remedy}")
        try:
            cluster = cls(
                plan_digest=str(document["plan_digest"]),
                devices=tuple(DeviceEntry(**entry) for entry in document["devices"]),
                clients=tuple(ClientEntry(**entry) for entry in document["clients"]),
            )
            _check(cluster)
        except (KeyError, TypeError, ValueError) as error:
            raise ClusterError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy}") from None
        return cluster

    def write(self, path: Path) -> None:
        """Write ``cluster.toml``."""
        document: dict[str, Any] = {
            "format": "robustdice-cluster",
            "version": FORMAT_VERSION,
            "plan_digest": self.plan_digest,
            "devices": [vars(device) for device in self.devices],
            "clients": [vars(client) for client in self.clients],
        }
        write_atomically(path, tomli_w.dumps(document).encode())


def write_cluster(
    directory: str | os.PathLike[str],
    devices: int,
    plan_digest: str,
    host: str = "127.0.0.1",
    base_port: int | None = None,
) -> Cluster:
    """Write a cluster on one host: ``cluster.toml``, ``client.key`` and ``device-K/secret.key`` in ``directory``.

    Device K listens on port ``base_port + K``; without a ``base_port``, on ports that are free now. New key
    pairs each time. OutputError when something cannot be written.
    """
    root = Path(directory)
    ports = free_ports(devices) if base_port is None else range(base_port, base_port + devices)
    entries = []
    for number, port in enumerate(ports):
        public, secret = (key.decode() for key in zmq.curve_keypair())
        _write_secret(root / f"device-{number}" / SECRET_NAME, secret)
        entries.append(DeviceEntry(f"device-{number}", f"tcp://{host}:{port}", public))
    public, secret = (key.decode() for key in zmq.curve_keypair())
    _write_secret(root / CLIENT_KEY_NAME, secret)
    cluster = Cluster(plan_digest, tuple(entries), (ClientEntry("client", public),))
    cluster.write(root / CLUSTER_NAME)
    return cluster


def read_secret(path: Path) -> tuple[bytes, bytes]:
    """The key pair (public, secret; Z85) of a secret key file; ClusterError when it is none.

    A file that others than its owner may read or change is warned about in the log.
    """
    try:
        secret = path.read_text("ascii").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ClusterError(
            f"cannot read the secret key {path}: {error.strerror}; 'robustdice build' writes it"
        ) from None
    except ValueError:
        secret = ""
    if not KEY.fullmatch(secret):
        raise ClusterError(f"{path} is not a secret key (40 characters, Z85); 'robustdice build' writes a new one")
    if mode & 0o077:
        text = f"the secret key {path} is open to other users (mode {mode:o}): chmod 600 {path}"
        say(log, text, event="exposed-key", reason=f"mode {mode:o}", level=logging.WARNING)
    return zmq.curve_public(secret.encode()), secret.encode()


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _write_secret(path: Path, secret: str) -> None:
    """Write a file that only its owner can read, from the moment that it exists."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret + "\n")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another place with -o") from None


def _check(cluster: Cluster) -> None:
    if not 1 <= len(cluster.devices) <= MAX_DEVICES:
        raise ValueError(f"{len(cluster.devices)} devices, expected 1 to {MAX_DEVICES}")
    for device in cluster.devices:
        match = ADDRESS.fullmatch(device.address)
        if not match or not 0 < int(match[1] or match[2]) < 65536:
            raise ValueError(f"the address {device.address!r}, expected tcp://HOST:PORT")
    keys = [device.public_key for device in cluster.devices] + [client.public_key for client in cluster.clients]
    if bad := [key for key in keys if not KEY.fullmatch(key)]:
        raise ValueError(f"the public key {bad[0]!r}, expected 40 characters of Z85")
    if len(set(keys)) != len(keys):
        raise ValueError("two entries have the same public key")
    if len({device.address for device in cluster.devices}) != len(cluster.devices):
        raise ValueError("two devices have the same address")
