"""Image sources: a folder or zip file in ImageFolder form, or ``digits``."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import DataError
from robustdice.images import class_of, normalise_pixels, read_image
from robustdice.model.digits import Split, digits

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Dataset:
    """Labelled images in a fixed order. ``read(index)`` gives one as a model's input: float32 [channels, height,
    width]. ``digest`` is another one when the images are: of files by their names, sizes, and checksums or times of
    change; empty where nothing but labels and name tell data apart. ``seed`` is what a sample was drawn with."""

    name: str
    labels: NDArray[np.int64]
    read: Callable[[int], NDArray[np.float32]]
    digest: str = ""
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Images ``start`` to ``stop``: float32 [n, channels, height, width]."""
        return np.stack([self.read(index) for index in range(start, len(self) if stop is None else stop)])

    def sample(self, count: int | None, seed: int = 0) -> Dataset:
        """A class-balanced subset: from every class as many, as far as it has them, in the original order."""
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise DataError(f"--samples must be at least 1, not {count}")
        generator = np.random.default_rng(seed)
        shuffled = generator.permutation(len(self))
        position = np.empty(len(self), dtype=np.int64)  # how many of its class come before it in the shuffled order
        seen: dict[int, int] = {}
        for index in shuffled:
            label = int(self.labels[index])
            position[index] = seen.get(label, 0)
            seen[label] = position[index] + 1
        order = shuffled[np.argsort(position[shuffled], kind="stable")]
        chosen = np.sort(order[:count])
        read = self.read
        digest = _digest([self.digest, *map(str, chosen)])
        return Dataset(self.name, self.labels[chosen], lambda index: read(int(chosen[index])), digest, seed)


def load_data(source: str, preprocessing: Mapping[str, Any], outputs: int, *, split: Split = "test") -> Dataset:
    """The images of ``source``, prepared as a model with this preprocessing and number of ``outputs`` needs them.

    The parent folder's name is an image's class. DataError when there is nothing, or a folder is no class.
    ``split`` is for ``digits``: ``train`` or ``test``.
    """
    if "input_size" not in preprocessing:
        raise DataError("how images become inputs is not known for this model; say it with --size, --mean and --std")
    if source == "digits":
        return _digits(preprocessing, split)
    path = Path(source)
    if path.is_dir():
        names = sorted(name for p in path.rglob("*") if _is_image(name := str(p.relative_to(path))))
        contents: Callable[[str], Path | bytes] = lambda name: path / name  # noqa: E731
        marks = [f"{name} {status.st_size} {status.st_mtime_ns}" for name in names for status in [(path / name).stat()]]
    elif path.is_file():
        names, marks, contents = _open_zip(path)
    else:
        raise DataError(f"there is no image folder or zip file {path}; DATA is such a path, or 'digits'")
    if not names:
        raise DataError(f"{path} holds no images ({', '.join(sorted(_SUFFIXES))}) in class folders")
    folders = [PurePosixPath(name).parent.name for name in names]
    if not all(folders):
        raise DataError(
            f"{path}: the image {names[folders.index('')]} is in no class folder; "
            "put each image into a folder that is named after its class (for ImageNet: its WNID)"
        )
    classes = _classes(preprocessing, sorted(set(folders)), outputs, path)
    indices = {folder: class_of(folder, classes, str(path)) for folder in sorted(set(folders))}
    labels = np.array([indices[folder] for folder in folders])
    digest = _digest([*marks, json.dumps(preprocessing, sort_keys=True)])
    return Dataset(
        path.name, labels, lambda i: read_image(contents(names[i]), preprocessing, f"{path}/{names[i]}"), digest
    )


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _open_zip(path: Path) -> tuple[list[str], list[str], Callable[[str], bytes]]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"cannot read {path} as a zip file: {error}") from None

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:  # the last: encrypted
            raise DataError(f"cannot read {name} in {path}: {error}") from None

    names = sorted(filter(_is_image, archive.namelist()))
    return names, [f"{name} {archive.getinfo(name).CRC}" for name in names], read


def _is_image(name: str) -> bool:
    """By its suffix; not what archivers leave behind (hidden files, __MACOSX)."""
    path = PurePosixPath(name)
    return path.suffix.lower() in _SUFFIXES and not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _classes(preprocessing: Mapping[str, Any], folders: list[str], outputs: int, path: Path) -> list[str]:
    if named := preprocessing.get("classes"):
        return list(named)
    if len(folders) == outputs:
        return folders
    raise DataError(
        f"{path} has {len(folders)} class folders, the model {outputs} outputs, and nothing says which is which; "
        "name the classes in the order of the outputs with --classes FILE (a class a line)"
    )


def _digits(preprocessing: Mapping[str, Any], split: Split) -> Dataset:
    pixels, labels = digits(split)
    if list(preprocessing["input_size"]) != list(pixels.shape[1:]):
        raise DataError(f"digits are {list(pixels.shape[1:])}, the model takes {preprocessing['input_size']}")
    images = normalise_pixels(pixels.astype(np.float32) / np.float32(255), preprocessing)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return Dataset(f"digits ({split})", labels, lambda index: images[index], digest)
