"""Image sources: a folder, a zip file or a single image, or ``digits``; with labels for what measures accuracy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import DataError
from robustdice.images import check_image, normalise_pixels, read_image
from robustdice.model.classes import label_folders
from robustdice.model.digits import Split, digits
from robustdice.model.folders import Found, LeftOut, find_images
from robustdice.progress import Progress, silent

LISTED = 10
"""So many bad images are listed; the others are counted."""
UNKNOWN = -1
"""The label of an image whose class nobody asked for."""

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


@dataclass(frozen=True)
class Notes:
    """What is to be known about a dataset beside its images: how labels were ``inferred``, what in its folder was
    ``left_out``, and which bad images were ``skipped`` (a sentence each)."""

    inferred: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    skipped: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """All of it, for people."""
        left_out = [f"not read: {', '.join(map(str, self.left_out))}"] if self.left_out else []
        skipped = [f"went on without {len(self.skipped)} bad images:\n{_listed(self.skipped)}"] if self.skipped else []
        return [*self.inferred, *left_out, *skipped]

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON data."""
        return asdict(self)


def _nothing(_index: int) -> None:
    """There is nothing to check."""


@dataclass(frozen=True)
class Dataset:
    """Images in a fixed order. ``read(index)`` gives one as a model's input: float32 [channels, height, width].

    ``labels`` are their classes, ``UNKNOWN`` (-1) in data that was loaded without. ``marks`` has for each image a text
    that is another one when the image is: by its name, size, and checksum or time of change, and how it is prepared;
    empty where nothing but labels and name tell data apart. ``check(index)`` finds most of the images that
    cannot be read, with a DataError and before long work. ``groups`` are what samples are balanced over (``labels``);
    ``seed`` is what a sample was drawn with.
    """

    name: str
    labels: NDArray[np.int64]
    read: Callable[[int], NDArray[np.float32]]
    marks: Sequence[str] = ()
    check: Callable[[int], None] = _nothing
    groups: NDArray[np.int64] | None = None
    notes: Notes = field(default_factory=Notes)
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """Another one when the images or their order are; empty where there are no marks."""
        return _digest(self.marks) if self.marks else ""

    def digest_of(self, start: int, stop: int) -> str:
        """As ``digest``, of the images ``start`` to ``stop`` and their labels."""
        labels = map(str, self.labels[start:stop])
        return _digest([self.name, *labels, *(self.marks[start:stop] or [str(start)])])

    def images(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Images ``start`` to ``stop``: float32 [n, channels, height, width]."""
        return np.stack([self.read(index) for index in range(start, len(self) if stop is None else stop)])

    def sample(self, count: int | None, seed: int = 0) -> Dataset:
        """A class-balanced subset: from every class as many, as far as it has them, in the original order."""
        return self.divide(count, seed)[0]

    def divide(self, count: int | None, seed: int = 0) -> tuple[Dataset, Dataset]:
        """A :meth:`sample`, and the images that are not in it."""
        if count is None or count >= len(self):
            return self, self._subset(np.array([], dtype=np.int64))
        if count < 1:
            raise DataError(f"--samples must be at least 1, not {count}")
        groups = self.labels if self.groups is None else self.groups
        generator = np.random.default_rng(seed)
        shuffled = generator.permutation(len(self))
        position = np.empty(len(self), dtype=np.int64)  # how many of its class come before it in the shuffled order
        seen: dict[int, int] = {}
        for index in shuffled:
            group = int(groups[index])
            position[index] = seen.get(group, 0)
            seen[group] = position[index] + 1
        order = shuffled[np.argsort(position[shuffled], kind="stable")]
        taken, left = (self._subset(np.sort(of)) for of in (order[:count], order[count:]))
        return replace(taken, seed=seed), left

    def checked(self, skip_bad: bool = False, on_progress: Progress = silent) -> Dataset:
        """The same images, none of which is known to be bad: DataError with a list of those that are.

        ``skip_bad`` reads every image to find out, and gives the others.
        """
        bad: dict[int, str] = {}
        for index in range(len(self)):
            try:
                self.read(index) if skip_bad else self.check(index)
            except DataError as error:
                bad[index] = str(error)
            on_progress(index + 1, len(self))
        if bad and (not skip_bad or len(bad) == len(self)):
            raise DataError(
                f"{len(bad)} of {len(self)} images cannot be used; repair or remove them, or go on without them with "
                f"--skip-bad:\n{_listed(list(bad.values()))}"
            )
        good = self if not bad else self._subset(np.array([i for i in range(len(self)) if i not in bad]))
        return replace(good, check=_nothing, notes=replace(self.notes, skipped=(*self.notes.skipped, *bad.values())))

    def _subset(self, chosen: NDArray[np.int64]) -> Dataset:
        read, check = self.read, self.check
        return replace(
            self,
            labels=self.labels[chosen],
            read=lambda index: read(int(chosen[index])),
            marks=tuple(self.marks[index] for index in chosen) if self.marks else (),
            check=lambda index: check(int(chosen[index])),
            groups=None if self.groups is None else self.groups[chosen],
        )


def random_images(shape: Sequence[int], seed: int = 0, count: int = 8) -> Dataset:
    """So many inputs [channels, height, width] of standard normal values, for what is the same whatever is seen."""
    images = np.random.default_rng(seed).standard_normal((count, *shape), np.float32)
    return Dataset(f"{count} random images", np.full(count, UNKNOWN), lambda index: images[index], seed=seed)


def load_data(
    source: str, preprocessing: Mapping[str, Any], outputs: int, *, split: Split = "test", labelled: bool = True
) -> Dataset:
    """The images of ``source``, prepared as a model with this preprocessing and number of ``outputs`` needs them.

    The parent folder's name is an image's class; without ``labelled`` nobody asks for it, and any folder of images or a
    single one will do. DataError when there is nothing, a folder is no class, or what there is has been split into
    training and validation data. ``split`` is for ``digits``: ``train`` or ``test``.
    """
    if "input_size" not in preprocessing:
        raise DataError("how images become inputs is not known for this model; say it with --size, --mean and --std")
    if source == "digits":
        return _digits(preprocessing, split)
    path = Path(source)
    found = find_images(path)
    files = found.files
    sides = _sides(found)
    groups: NDArray[np.int64] | None = None
    if labelled:
        try:
            labels, inferred = _labels(found, path, sides, preprocessing, outputs)
        except DataError as error:
            raise DataError("; ".join([str(error), *Notes(left_out=found.left_out).sentences()])) from None
    else:
        labels = np.full(len(files), UNKNOWN, dtype=np.int64)
        numbers = {folders: number for number, folders in enumerate(dict.fromkeys(file.folders for file in files))}
        groups = np.array([numbers[file.folders] for file in files])
        inferred = (f"the images of {' and '.join(map(repr, sides))} are used alike",) if sides else ()
    prepared = _digest([json.dumps(preprocessing, sort_keys=True)])[:16]
    names = [str(path) if path.is_file() and path.name == file.name else f"{path}/{file.name}" for file in files]
    return Dataset(
        found.name,
        labels,
        lambda i: read_image(files[i].content(), preprocessing, names[i]),
        tuple(f"{prepared} {file.mark}" for file in files),
        lambda i: check_image(files[i].content(), preprocessing, names[i]),
        groups,
        Notes(inferred, found.left_out),
    )


def _labels(
    found: Found, path: Path, sides: Sequence[str], preprocessing: Mapping[str, Any], outputs: int
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The class of every image, and what was inferred to say so."""
    if loose := next((file.name for file in found.files if not file.folders), None):
        raise DataError(
            f"{path}: the image {loose} is in no class folder; "
            "put each image into a folder that is named after its class (for ImageNet: its WNID)"
        )
    classes = sorted({file.folders[-1] for file in found.files})
    if (
        not sides
        and len(classes) > 1
        and not preprocessing.get("classes")
        and _SPLITS.issuperset(map(str.lower, classes))
    ):
        sides = classes
    if sides:
        best = min(sides, key=lambda side: (side == ".", not _has_folders(found, side), _is_training(side)))
        raise DataError(
            f"{path} has images of the same classes, or of several splits, in {' and '.join(map(repr, sides))}, which "
            "are not to be measured together; an image's class is the folder right above it. "
            f"Give one of them, as in {path / best}"
        )
    labels = label_folders(preprocessing, classes, outputs, str(path))
    return np.array([labels.indices[file.folders[-1]] for file in found.files], dtype=np.int64), labels.inferred


def _sides(found: Found) -> list[str]:
    """Folders, from the data's root on, whose images belong to different splits of the same data: by their names, or
    as they have folders of the same name. Empty when there are no such."""
    above: dict[str, set[str]] = {}
    siblings: dict[tuple[str, ...], dict[str, bool]] = {}  # and whether they hold folders
    for folders in dict.fromkeys(file.folders for file in found.files):
        for depth, folder in enumerate(folders):
            known = siblings.setdefault(folders[:depth], {})
            known[folder] = known.get(folder, False) or depth < len(folders) - 1
        if folders:
            above.setdefault(folders[-1], set()).add("/".join(folders[:-1]) or ".")
    for parent, known in siblings.items():
        splits = sorted(name for name in known if name.lower() in _SPLITS)
        if len(splits) > 1 and any(known[name] for name in splits):
            return ["/".join((*parent, name)) for name in splits]
    return next((sorted(places) for places in above.values() if len(places) > 1), [])


def _has_folders(found: Found, side: str) -> bool:
    depth = side.count("/") + 1
    return any(len(file.folders) > depth and "/".join(file.folders[:depth]) == side for file in found.files)


def _is_training(side: str) -> bool:
    return "train" in side.rpartition("/")[2].lower()


def _listed(sentences: Sequence[str]) -> str:
    more = [f"  and {len(sentences) - LISTED} more"] if len(sentences) > LISTED else []
    return "\n".join([*(f"  {sentence}" for sentence in sentences[:LISTED]), *more])


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digits(preprocessing: Mapping[str, Any], split: Split) -> Dataset:
    pixels, labels = digits(split)
    if list(preprocessing["input_size"]) != list(pixels.shape[1:]):
        raise DataError(f"digits are {list(pixels.shape[1:])}, the model takes {preprocessing['input_size']}")
    images = normalise_pixels(pixels.astype(np.float32) / np.float32(255), preprocessing)
    digest = hashlib.sha256(images.tobytes()).hexdigest()[:16]
    marks = tuple(f"{digest} {index}" for index in range(len(images)))
    return Dataset(f"digits ({split})", labels, lambda index: images[index], marks)
