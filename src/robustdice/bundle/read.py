"""Reading a bundle: a directory is either exactly what its manifest says, or refused with the reason."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from robustdice.bundle.manifest import APART_PATTERN, MANIFEST_NAME, WEIGHTS_NAME, Manifest
from robustdice.errors import BundleError

MANIFEST_LIMIT = 64 * 2**20
"""Bytes; a manifest lists neurons, so even a large model's stays far below."""

CHUNK = 2**20
"""Bytes read at a time: a file may be larger than the memory that a device can spare."""

REMEDY = "copy the device's directory again, or build it again with 'robustdice build'"


@dataclass(frozen=True)
class Bundle:
    """A device's verified bundle: its manifest, and the directory that the files are in."""

    manifest: Manifest
    directory: Path

    def path(self, file: str) -> Path:
        """Where one of the manifest's files is; BundleError when it is no longer what was verified."""
        _verify(self.directory, file, self.manifest)
        return self.directory / file

    def content(self, file: str) -> bytes:
        """What is in one of the manifest's files; BundleError when it is no longer what was verified."""
        path, entry = self.directory / file, self.manifest.files[file]
        content = _content(path, entry.size)
        if len(content) < entry.size or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise BundleError(f"{path} changed while it was read; {REMEDY}")
        return content


def load_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Read and verify the bundle in ``directory`` (``DIR/device-K``).

    BundleError, naming the file and the way out, when a file is missing, truncated, changed or unknown, or
    when the directory's name says another device than its manifest.
    """
    path = Path(directory)
    if not path.is_dir():
        raise BundleError(f"{path} is not a directory: no bundle there; make one with 'robustdice build PLAN -o DIR'")
    if (path / "device-0").is_dir():
        raise BundleError(f"{path} has the bundles of all devices; name one of them, such as {path / 'device-0'}")
    manifest = Manifest.from_json(_content(path / MANIFEST_NAME, MANIFEST_LIMIT))
    named = re.fullmatch(r"device-(\d+)", path.resolve().name)
    if named and int(named[1]) != manifest.device:
        raise BundleError(f"{path} holds the bundle of device {manifest.device}, not {named[1]}; {REMEDY}")
    unknown = sorted(
        file.name
        for kind in ("*.onnx", WEIGHTS_NAME, APART_PATTERN)
        for file in path.glob(kind)
        if file.name not in manifest.files
    )
    if unknown:
        raise BundleError(f"{path / unknown[0]} is not part of the bundle ({MANIFEST_NAME} does not list it); {REMEDY}")
    for file in manifest.files:
        _verify(path, file, manifest)
    return Bundle(manifest, path)


def _verify(directory: Path, file: str, manifest: Manifest) -> None:
    path, entry = directory / file, manifest.files[file]
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as opened:
            while size <= entry.size and (chunk := opened.read(CHUNK)):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; {REMEDY}") from None
    if size > entry.size:
        raise BundleError(f"{path} has more than the expected {entry.size} bytes; {REMEDY}")
    if size < entry.size:
        raise BundleError(f"{path} has {size} bytes, expected {entry.size}: it is truncated; {REMEDY}")
    found = digest.hexdigest()
    if found != entry.sha256:
        raise BundleError(f"{path} has SHA-256 {found[:16]}..., expected {entry.sha256[:16]}...: it changed; {REMEDY}")


def _content(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; {REMEDY}") from None
    if len(content) > limit:
        raise BundleError(f"{path} has more than the expected {limit} bytes; {REMEDY}")
    return content
