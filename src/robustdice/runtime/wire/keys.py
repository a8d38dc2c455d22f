"""CURVE key pairs and the files that hold their secret halves (Z85, docs/formats.md)."""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path

import zmq

from robustdice.errors import ClusterError, OutputError
from robustdice.runtime.journal import say

log = logging.getLogger(__name__)

SECRET_NAME = "secret.key"  # noqa: S105
CLIENT_KEY_NAME = "client.key"
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


def new_pair() -> tuple[bytes, bytes]:
    """A new key pair (public, secret)."""
    public, secret = zmq.curve_keypair()
    return public, secret


def public_of(secret: bytes) -> bytes | None:
    """The public key of a secret one (Z85 both), or None when it is none."""
    try:
        return zmq.curve_public(secret) if _KEY.fullmatch(secret.decode("ascii")) else None
    except (ValueError, zmq.ZMQError):  # not all of 40 such characters are 32 bytes
        return None


def is_key(text: object) -> bool:
    """Whether it is a key, as Z85."""
    return isinstance(text, str) and public_of(text.encode()) is not None


def read_secret(path: Path) -> tuple[bytes, bytes]:
    """The key pair (public, secret) of a secret key file; ClusterError when it is none.

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
    if (public := public_of(secret.encode())) is None:
        raise ClusterError(f"{path} is not a secret key (40 characters, Z85); 'robustdice build' writes a new one")
    if mode & 0o077:
        text = f"the secret key {path} is open to other users (mode {mode:o}): chmod 600 {path}"
        say(log, text, event="exposed-key", reason=f"mode {mode:o}", level=logging.WARNING)
    return public, secret.encode()


def write_secret(path: Path, secret: bytes) -> None:
    """Write a file that only its owner can read, from the moment that it exists; OutputError when that fails."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another place with -o") from None
