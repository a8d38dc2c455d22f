"""Finding the images in a folder, in a zip file, or in a single file; and saying what else lies there."""

from __future__ import annotations

import os
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from robustdice.errors import DataError
from robustdice.images import SUFFIXES

NAMED = 3
"""So many of the things that were left out are named; the others are counted."""

_OF_ARCHIVERS = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class ImageFile:
    """An image that was found: its name below the data (with ``/``, in NFC), a ``mark`` that is another one when its
    content is (size and time of change, or the checksum that a zip file has), and where Pillow finds the content."""

    name: str
    mark: str
    content: Callable[[], Path | bytes]

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that it lies in, from the data's root on."""
        return PurePosixPath(self.name).parts[:-1]


@dataclass(frozen=True)
class LeftOut:
    """Things of one ``kind`` that lie among the images and are not read: how many, and the ``first`` few names."""

    kind: str
    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count} {self.kind} ({', '.join(self.first)}{more})"


@dataclass(frozen=True)
class Found:
    """The images of a data source, sorted by name, and what was left out."""

    name: str
    files: tuple[ImageFile, ...]
    left_out: tuple[LeftOut, ...]


def find_images(path: Path) -> Found:
    """The images below a folder, in a zip file or in a folder of one (``images.zip/val``), or a single image.

    Regular files with an image's suffix; links are followed, each folder is read once. DataError when there is nothing
    of this kind, or no image in it.
    """
    if path.is_dir():
        found = _sort(path, _in_folder(path))
    elif path.is_file():
        single = path.suffix.lower() in SUFFIXES and not zipfile.is_zipfile(path)
        found = _sort(path, [_image_file(path, path.name, path.stat())] if single else _in_zip(path, ()))
    elif inside := archive_above(path):
        found = _sort(path, _in_zip(*inside))
    else:
        raise DataError(f"there is no image folder or zip file {path}; DATA is such a path, or 'digits'")
    if not found.files:
        besides = f"; it has {', '.join(map(str, found.left_out))}" if found.left_out else ""
        raise DataError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}){besides}")
    return found


Entry = ImageFile | tuple[str, str]
"""An image, or the name of something else and its kind."""


def _sort(path: Path, entries: Sequence[Entry] | Iterator[Entry]) -> Found:
    files: list[ImageFile] = []
    others: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry, ImageFile):
            files.append(entry)
        else:
            others.setdefault(entry[1], []).append(entry[0])
    left_out = [LeftOut(kind, len(names), tuple(sorted(names)[:NAMED])) for kind, names in sorted(others.items())]
    return Found(path.name or path.resolve().name, tuple(sorted(files, key=lambda file: file.name)), tuple(left_out))


def _kind_left_out(name: str) -> str | None:
    """Why a regular file of this name is not read; None when it is an image."""
    path = PurePosixPath(name)
    if any(part.startswith(".") or part in _OF_ARCHIVERS for part in path.parts):
        return "hidden or left behind by archivers"
    if path.suffix.lower() in SUFFIXES:
        return None
    return f"of the kind {path.suffix.lower()}" if path.suffix else "without a suffix"


def _readable(name: str) -> str:
    """A name as it can be compared and printed: in NFC, and without what is no text."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return unicodedata.normalize("NFC", text)


def _in_folder(root: Path) -> Iterator[Entry]:
    """Everything below a folder. Links to folders come last, so that a folder is found under its own name first."""
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}
    folders, links = [(root, "")], list[tuple[Path, str]]()
    while folders or links:
        folder, prefix = (folders or links).pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                yield prefix.rstrip("/"), "linked to a folder that is read already"
                continue
            seen.add((status.st_dev, status.st_ino))
            children = sorted(os.scandir(folder), key=lambda child: child.name)
            if not children and folder != root:
                yield prefix.rstrip("/"), "empty"
        except OSError as error:
            if folder == root:
                raise DataError(f"cannot read {root}: {error.strerror}") from None
            yield prefix.rstrip("/"), f"unreadable ({error.strerror})"
            continue
        for child in children:
            name = prefix + _readable(child.name)
            if (kind := _kind_left_out(name)) and kind.startswith("hidden"):
                yield name, kind
                continue
            try:
                status = child.stat()
            except OSError as error:
                yield name, "linked to nowhere" if child.is_symlink() else f"unreadable ({error.strerror})"
                continue
            if stat.S_ISDIR(status.st_mode):
                (links if child.is_symlink() else folders).append((Path(child.path), f"{name}/"))
            elif stat.S_ISREG(status.st_mode):
                yield (name, kind) if kind else _image_file(Path(child.path), name, status)
            else:
                yield name, "of a special kind (device, pipe, socket)"


def _image_file(path: Path, name: str, status: os.stat_result) -> ImageFile:
    return ImageFile(name, f"{name} {status.st_size} {status.st_mtime_ns}", lambda: path)


def archive_above(path: Path) -> tuple[Path, tuple[str, ...]] | None:
    """The zip file that a path leads into, and the folders inside."""
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).parts
    return None


def _in_zip(path: Path, inside: tuple[str, ...]) -> Iterator[Entry]:
    """Everything in a zip file, below the folders ``inside``. An entry that is there twice counts as it is last."""
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is no zip file, or a damaged one, and no image by its name; DATA is a folder, a zip file or an "
            "image: unpack archives of other kinds"
        )
    try:
        archive = zipfile.ZipFile(path)
        entries = {_name_of(entry): entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"cannot read {path} as a zip file: {error}") from None
    prefix = "".join(f"{_readable(part)}/" for part in inside)
    if not any(whole.startswith(prefix) for whole in entries):
        raise DataError(f"{path} has no folder {prefix.rstrip('/')}")
    filled = {whole.rstrip("/").rpartition("/")[0] for whole in entries}
    for whole, entry in entries.items():
        if not whole.startswith(prefix) or whole == prefix:
            continue
        if whole.endswith("/") or entry.external_attr & 0x10:  # MS-DOS: a directory
            if whole.rstrip("/") not in filled:
                yield whole[len(prefix) :].rstrip("/"), "empty"
            continue
        name, kind = whole[len(prefix) :], stat.S_IFMT(entry.external_attr >> 16)
        if kind == stat.S_IFLNK:
            yield name, "linked in a zip file"
        elif kind not in (0, stat.S_IFREG):
            yield name, "of a special kind (device, pipe, socket)"
        elif left_out := _kind_left_out(name):
            yield name, left_out
        else:
            yield ImageFile(name, f"{name} {entry.file_size} {entry.CRC}", _reader(archive, entry, f"{path}/{name}"))


def _name_of(entry: zipfile.ZipInfo) -> str:
    """An entry's name, whoever wrote it: Windows' own tools have put backslashes, a Mac's UTF-8 without saying so."""
    name = entry.filename
    if not entry.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            name = entry.filename
    name = _readable(name.replace("\\", "/"))
    return "/".join(part for part in name.split("/") if part != ".").lstrip("/")


def _reader(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> Callable[[], bytes]:
    def read() -> bytes:
        if entry.flag_bits & 0x1:
            raise DataError(f"cannot read {name}: it is encrypted; unpack the zip file with its password")
        try:
            return archive.read(entry)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"cannot read {name}: {error}") from None

    return read
