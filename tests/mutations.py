"""What makes real inputs hostile: bytes, documents, archives and messages that are changed, as dice fall."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tomli_w

NUMBERS = (0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308)
ODD = (float("nan"), float("inf"), float("-inf"), 10**400)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "0",
    "x" * 300,
    "../x",
    "\x00",
    "\ud800",
    "\u202e",
    [],
    {},
    [[]],
    {"": None},
    [0] * 300,
)


def change_bytes(dice: random.Random, content: bytes) -> bytes:
    """A few bytes changed, removed, doubled, inserted or exchanged."""
    found = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at, length = dice.randrange(len(found) + 1), dice.choice((1, 1, 2, 4, 8, 64))
        match dice.randrange(7):
            case 0 if at < len(found):
                found[at] ^= 1 << dice.randrange(8)
            case 1:
                found[at : at + length] = dice.randbytes(length)
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + length]
            case 4:
                found[at:at] = dice.randbytes(length)
            case 5:
                value = dice.choice((0, 1, 0x7F, 0x80, 0xFF, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
                size = dice.choice((1, 2, 4, 8))
                found[at : at + size] = (value % 256**size).to_bytes(size, "little")
            case 6 if dice.random() < 0.3:
                del found[at:]
    return bytes(found)


def change_document(dice: random.Random, document: Any, odd: bool = True) -> Any:
    """A few values of nested lists and dictionaries changed, removed, doubled or put elsewhere, in place."""
    places = list(_places(document))
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        holder, key = dice.choice(places)
        values = holder if isinstance(holder, list) else list(holder)
        if (isinstance(holder, dict) and key not in holder) or (isinstance(holder, list) and key >= len(holder)):
            continue
        match dice.randrange(8):
            case 0:
                del holder[key]
            case 1:
                other, name = dice.choice(places)
                with contextlib.suppress(KeyError, IndexError):
                    holder[key] = json.loads(json.dumps(other[name]))
            case 2:
                holder[key] = [holder[key]] * dice.choice((0, 1, 2, 50))
            case 3 if isinstance(holder, dict):
                holder[dice.choice(("", "x", *map(str, values)))] = dice.choice(OTHERS)
            case 4 if isinstance(holder[key], int | float) and abs(holder[key]) < 1e300:
                holder[key] += dice.choice((1, -1, 0.5, 1000))
            case 5 if odd:
                deep: Any = 0
                for _ in range(dice.choice((3, 90))):
                    deep = [deep]
                holder[key] = dice.choice((deep, *ODD))
            case 6:
                holder[key] = dice.choice(OTHERS)
            case _:
                holder[key] = dice.choice(NUMBERS)
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(entries):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def change_json(dice: random.Random, content: bytes) -> bytes:
    """By structure, or byte by byte; sometimes so deep that a parser that calls itself ends."""
    kind = dice.random()
    if kind < 0.6:
        with contextlib.suppress(ValueError, RecursionError):  # it was changed before, and is no JSON any more
            return json.dumps(change_document(dice, json.loads(content))).encode(errors="surrogatepass")
    if kind < 0.61:
        return dice.choice((b"[", b'{"a":')) * 30_000
    return change_bytes(dice, content)


def change_toml(dice: random.Random, content: tuple[bytes, dict[str, Any]]) -> bytes:
    """By structure, or byte by byte."""
    if dice.random() < 0.6:
        with contextlib.suppress(TypeError, ValueError):  # what TOML cannot say
            return tomli_w.dumps(change_document(dice, copy.deepcopy(content[1]), odd=False)).encode(
                errors="surrogatepass"
            )
    return change_bytes(dice, content[0])


def change_zip(dice: random.Random, content: bytes) -> bytes:
    """Byte by byte, or its members: one of them changed, left out or there twice."""
    if dice.random() < 0.4:
        return change_bytes(dice, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        kind = archive.infolist()[0].compress_type
        members = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice(sorted(members))
    if dice.random() < 0.15:
        del members[name]
    elif name == "header.npy" and dice.random() < 0.8:
        header = bytes(np.load(io.BytesIO(members[name])))
        members[name] = _npy(np.frombuffer(change_json(dice, header), np.uint8))
    elif name.endswith(".json"):
        members[name] = change_json(dice, members[name])
    elif dice.random() < 0.3:
        members[name] = _npy(np.asarray(dice.choice(([], [[]], [[1.0]], [[np.nan]] * 3, "x", [None], 1 + 2j))))
    else:
        members[name] = change_bytes(dice, members[name])
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w", dice.choice((kind, kind, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for each, data in members.items():
            archive.writestr(each, data)
    return found.getvalue()


def _npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=True)
    return content.getvalue()


def change_message(dice: random.Random, message: tuple[list[bytes], int | None]) -> tuple[list[bytes], int | None]:
    """The header by structure, any frame byte by byte, frames left out, doubled or exchanged, another sender."""
    parts, source = list(message[0]), message[1]
    for _ in range(dice.choice((1, 1, 2))):
        at = dice.randrange(len(parts)) if parts else 0
        match dice.randrange(8):
            case 0 if parts:
                del parts[at]
            case 1 if parts:
                parts.insert(at, parts[dice.randrange(len(parts))])
            case 2:
                parts.insert(at, dice.randbytes(dice.choice((0, 1, 4, 64, 1000))))
            case 3:
                source = dice.choice((None, 0, 1, 2))
            case 4 | 5 if parts and parts[0][:1] == b"{":
                parts[0] = change_json(dice, parts[0])
            case _ if parts:
                parts[at] = change_bytes(dice, parts[at])
    return parts, source


def change_plan(dice: random.Random, content: bytes) -> bytes:
    """A zip file, or JSON alone."""
    return change_zip(dice, content) if content[:2] == b"PK" else change_json(dice, content)
