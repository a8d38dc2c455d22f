"""Which output of a model a folder's name stands for: names given in files, and what can be told without."""

from __future__ import annotations

import codecs
import importlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robustdice.errors import DataError, ModelError

_WNID = re.compile(r"(n[0-9]{8})(?:[\s,:;]+(.*))?")
_NUMBERED = re.compile(r"([0-9]{1,9})[\s:.,;)-]+(\S.*)")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_DIGITS = re.compile(r"([0-9]{1,18})")
_IMAGENET_CLASSES = 1000
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins as the next one
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF32_BE: "utf-32",
}
"""Encodings by the byte-order marks that tell them apart."""


def read_classes(path: Path) -> list[str]:
    """The classes that a text file names, one a line, in the order of the model's outputs.

    A line is a name, which may start with ImageNet's number of it (a WNID). Numbers before all names, from 0 or 1
    on, are places: ``0 cat``, ``1: dog``. DataError when the file cannot be read or has no line.
    """
    try:
        content = path.read_bytes()
        text = content.decode(next((name for mark, name in _WIDE.items() if content.startswith(mark)), "utf-8-sig"))
        if "\0" in text:
            raise DataError(f"{path} is not UTF-8 text (it has zero bytes); --classes takes a class a line")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; --classes takes a class a line") from None
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if not lines:
        raise DataError(f"{path} names no classes; --classes takes a class a line")
    return [unicodedata.normalize("NFC", name) for name in _in_place(lines)]


def _in_place(lines: Sequence[str]) -> list[str]:
    """The names behind numbers, in the order of these, when every line has one and together they count."""
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    places = {int(match[1]): match[2] for match in numbered if match}
    first = min(places, default=0)
    if first > 1 or sorted(places) != list(range(first, first + len(lines))):
        return list(lines)
    return [places[place] for place in sorted(places)]


@dataclass(frozen=True)
class Labels:
    """The output that each folder's name stands for, and what had to be ``inferred`` to say so (a sentence each)."""

    indices: Mapping[str, int]
    inferred: tuple[str, ...] = ()


def label_folders(preprocessing: Mapping[str, Any], folders: Sequence[str], outputs: int, source: str) -> Labels:
    """The outputs that the names of ``folders`` stand for. DataError when that is not known.

    Names in ``preprocessing["classes"]`` decide. Without any, WNIDs are ImageNet's; numbers are outputs, or are in
    their order; and as many folders as outputs are in alphabetical order.
    """
    classes = preprocessing.get("classes", ())
    known = _indices(classes)
    wnids = all(_WNID.fullmatch(folder) and folder not in known for folder in folders)
    if wnids and outputs == _IMAGENET_CLASSES:
        classes = imagenet_classes()
        known = _indices(classes)
        found = {folder: _index(folder, known, classes, source) for folder in folders}
        return Labels(found, ("the folders are WNIDs: the outputs are taken for ImageNet's 1,000 classes",))
    if classes and len(classes) != outputs:
        raise DataError(
            f"the model has {outputs} outputs, but {len(classes)} classes are named ({some(classes)}); "
            "correct --classes"
        )
    if classes:
        return Labels({folder: _index(folder, known, classes, source) for folder in folders})
    if all(map(_NUMBER.fullmatch, folders)):
        return _by_number(folders, outputs, source)
    if len(folders) != outputs:
        raise DataError(
            f"{source} has {len(folders)} class folders, the model {outputs} outputs, and nothing says which is which; "
            "name the classes in the order of the outputs with --classes FILE (a class a line)"
        )
    ordered = sorted(folders)
    said = f"the outputs are taken for the folders in alphabetical order ({some(ordered)})"
    by_number = sorted(folders, key=_by_numbers_inside)
    if by_number != ordered:
        said += f"; a model trained on them in the order of their numbers ({some(by_number)}) needs --classes FILE"
    return Labels({folder: index for index, folder in enumerate(ordered)}, (said,))


def _by_number(folders: Sequence[str], outputs: int, source: str) -> Labels:
    ordered = sorted(folders, key=lambda folder: (int(folder), folder))
    numbers = [int(folder) for folder in ordered]
    way_out = "name the classes in the order of the outputs with --classes FILE (a class a line)"
    if len(set(numbers)) < len(numbers):
        twice = [folder for folder in ordered if numbers.count(int(folder)) > 1]
        raise DataError(f"{source} has two folders for one number ({some(twice)}); rename one, or {way_out}")
    by_text = sorted(folders)
    if numbers[0] == 0 and numbers[-1] < outputs:
        said = f"the folders' numbers are taken for the numbers of the outputs ({some(ordered)})"
        indices = dict(zip(ordered, numbers, strict=True))
    elif len(folders) == outputs:
        said = f"the outputs are taken for the folders in the order of their numbers ({some(ordered)})"
        indices = {folder: index for index, folder in enumerate(ordered)}
    else:
        raise DataError(
            f"{source} has {len(folders)} folders with numbers from {numbers[0]} to {numbers[-1]}, the model {outputs} "
            f"outputs, and nothing says whether these count from 0 or 1; {way_out}"
        )
    if by_text != ordered:
        said += f"; a model trained on them in alphabetical order ({some(by_text)}) needs --classes FILE"
    return Labels(indices, (said,))


def _by_numbers_inside(folder: str) -> tuple[str | int, ...]:
    """What brings class2 before class10."""
    parts = _DIGITS.split(folder)
    return tuple(int(part) if odd else part for part, odd in zip(parts, [False, True] * len(parts), strict=False))


def _indices(classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The outputs that a folder's name can mean: a class in full, its WNID, or what follows that up to a comma."""
    known: dict[str, tuple[int, ...]] = {}
    for index, name in enumerate(classes):
        whole = unicodedata.normalize("NFC", name)
        aliases = {whole}
        if match := _WNID.fullmatch(whole):
            aliases |= {match[1], match[2] or whole, (match[2] or whole).split(",")[0]}
        for alias in aliases:
            known[alias] = (*known.get(alias, ()), index)
    return known


def _index(folder: str, known: Mapping[str, tuple[int, ...]], classes: Sequence[str], source: str) -> int:
    found = known.get(unicodedata.normalize("NFC", folder), ())
    if len(found) > 1:
        several = " or ".join(f"output {index} ({classes[index]})" for index in found)
        raise DataError(f"the folder {folder!r} of {source} can be {several}; use names or WNIDs that tell them apart")
    if not found:
        raise DataError(
            f"the folder {folder!r} of {source} is no class of the model ({len(classes)} classes, "
            f"such as {', '.join(map(repr, classes[:3]))}); rename it, or name the classes with --classes FILE"
        )
    return found[0]


def some(names: Sequence[str]) -> str:
    """Names, as many as make an order plain, with commas between them."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:4])}, ..., {names[-1]}"


@cache
def imagenet_classes() -> tuple[str, ...]:
    """ImageNet's 1,000 classes in the order of networks trained on them, as ``WNID name``, from timm."""
    from robustdice.model.builders import import_torchvision  # noqa: PLC0415 -- seconds, with timm, and seldom needed

    try:
        import_torchvision()  # which timm imports
        timm_data: Any = importlib.import_module("timm.data")
    except (ImportError, ModelError):
        raise DataError(
            "the folders are WNIDs, and ImageNet's order of them comes with timm: pip install 'robustdice[workshop]', "
            "or name the classes with --classes FILE"
        ) from None
    info = timm_data.ImageNetInfo()
    names = [info.index_to_description(index).split(",")[0] for index in range(info.num_classes())]
    return tuple(f"{wnid} {name}" for wnid, name in zip(info.label_names(), names, strict=True))
