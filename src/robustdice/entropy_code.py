"""Entropy coding: levels of weights as Huffman codes, the shorter the more often they come; as many bytes for every
filter (NumPy and zlib only).

The code of a representation is fixed. All filters of a layer, one after the other, are a piece of a DEFLATE stream
(RFC 1951), so that zlib reads them. Every filter ends with a byte, so that each can be had without those before it: a
last symbol fills up what is left, and where that is more, longer symbols stand for some of its zeros.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from zlib import _Decompress

PADS = tuple(range(8, 16))
"""Lengths of the symbols that fill up: up to seven bits that are left, and a byte."""
STEP = len(PADS)
"""So much longer than the symbol for zeros is the first of those that may stand for it; there is one of each length up
to the longest, and of that two."""
END = 15
"""The longest length, and that of the symbol for the end of a block, which DEFLATE wants and which never comes."""
AT_ONCE = 2**22
"""Weights that are worked on together."""


@dataclass(frozen=True)
class Code:
    """A filter takes ``bits`` for each weight, rounded up to whole bytes, and one byte. A symbol stands for so many
    weights ``together`` that follow each other (what the last one has beyond them is zero), each a level between
    ``-largest`` and ``largest``."""

    bits: float
    together: int
    largest: int

    @property
    def symbols(self) -> int:
        """All that there are, those that fill up not counted."""
        return int((2 * self.largest + 1) ** self.together)

    @property
    def zero(self) -> int:
        """The symbol for zeros alone."""
        return self.symbols // 2

    @property
    def places(self) -> NDArray[np.int64]:
        """What one level more of each of its weights adds to a symbol, [together]."""
        return (2 * self.largest + 1) ** np.arange(self.together)

    def symbols_of(self, weights: int) -> int:
        """Of a filter, likewise."""
        return -(-weights // self.together)

    def room(self, weights: int) -> int:
        """The bits that a filter's symbols may take."""
        return 8 * int(-(-weights * self.bits // 8))

    def bytes(self, weights: int) -> int:
        """That a filter takes."""
        return self.room(weights) // 8 + 1


CODED = {
    "ec4": Code(4, 1, 120),
    "ec3": Code(3, 1, 120),
    "ec2": Code(2, 2, 7),
    "ec1.5": Code(1.5, 2, 7),
    "ec1": Code(1, 3, 2),
    "ec0.7": Code(0.7, 3, 2),
}


@cache
def lengths(kind: str) -> NDArray[np.int64]:
    """Of each symbol's code, in bits; those that fill up come after all others. What ``scripts/huffman_codes.py`` made;
    part of the format."""
    content = files("robustdice").joinpath("codes", f"{kind}.bin").read_bytes()
    found = np.frombuffer(content, np.uint8).astype(np.int64)
    found.flags.writeable = False
    return found


def symbols(levels: NDArray[np.integer[Any]], kind: str) -> NDArray[np.uint8]:
    """Levels [neurons, weights] as symbols [neurons, symbols]."""
    code = CODED[kind]
    neurons, weights = levels.shape
    filled = np.full((neurons, code.symbols_of(weights) * code.together), code.largest, np.uint8)
    filled[:, :weights] += levels.astype(np.uint8)  # modulo 256
    found: NDArray[np.uint8] = filled[:, :: code.together].copy()
    for number, place in enumerate(code.places.tolist()[1:], start=1):
        found += filled[:, number :: code.together] * np.uint8(place)
    return found


@cache
def meanings(kind: str) -> NDArray[np.int8]:
    """The levels that each symbol stands for, [256, together]."""
    code = CODED[kind]
    found = np.arange(256)[:, None] // code.places % (2 * code.largest + 1) - code.largest
    found[code.symbols :] = 0  # others that stand for zeros, too
    found = found.astype(np.int8)
    found.flags.writeable = False
    return found


def over(levels: NDArray[np.integer[Any]], kind: str) -> NDArray[np.int64]:
    """How many bits more than there is room for the symbols of filters [neurons, weights] take, [neurons]; negative
    where there is room left."""
    return _by_neuron(levels, kind, lambda found: lengths(kind)[found].sum(1)) - CODED[kind].room(levels.shape[1])


def excess(levels: NDArray[np.integer[Any]], kind: str) -> NDArray[np.int64]:
    """The same where it is too much; where there is room left, only as much as neither the last symbol nor longer ones
    for zeros fill."""
    found, zero = over(levels, kind), CODED[kind].zero
    short = np.flatnonzero(found <= -STEP)
    zeros = _by_neuron(levels[short], kind, lambda symbols: (symbols == zero).sum(1))
    found[short] += zeros * (END - lengths(kind)[zero])
    found[short] = found[short].clip(None, 0)
    return np.where(found <= -STEP, found + STEP - 1, found.clip(0))


def _by_neuron(
    levels: NDArray[np.integer[Any]], kind: str, of_symbols: Callable[[NDArray[np.uint8]], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Some neurons at a time, as symbols take more room than levels."""
    at_once = max(1, AT_ONCE // max(1, levels.shape[1]))
    parts = [of_symbols(symbols(levels[at : at + at_once], kind)) for at in range(0, len(levels), at_once)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def pack(levels: NDArray[np.integer[Any]], kind: str) -> NDArray[np.uint8]:
    """Levels [neurons, weights] as bytes [neurons, bytes]. ValueError where a filter takes too many bits, or too few
    that can be filled up."""
    weights, code = levels.shape[1], CODED[kind]
    if excess(levels, kind).any():
        raise ValueError(f"filters of {weights} weights whose codes in {kind} do not fill {code.room(weights)} bits")
    packed = np.empty((len(levels), code.bytes(weights)), np.uint8)
    for start in range(0, len(levels), step := max(1, AT_ONCE // max(1, weights))):
        packed[start : start + step] = _packed(symbols(levels[start : start + step], kind), kind, code.room(weights))
    return packed


def _packed(of_symbols: NDArray[np.uint8], kind: str, room: int) -> NDArray[np.uint8]:
    """Symbols [neurons, symbols] that fill their room as bytes [neurons, bytes]."""
    code, each = CODED[kind], lengths(kind)
    first = code.symbols + len(PADS)
    more = int(END - each[code.zero])
    longest, rest = np.divmod(room - each[of_symbols].sum(1), more)
    last = rest >= STEP  # one more zero takes STEP bits
    zeros = of_symbols == code.zero
    number = np.cumsum(zeros, 1)
    of_symbols[zeros & (number <= longest[:, None])] = first + more - STEP
    of_symbols[zeros & (number == longest[:, None] + 1) & last[:, None]] = first
    every = np.concatenate([of_symbols, (code.symbols + rest - STEP * last).astype(np.uint8)[:, None]], 1)
    bits, used = _codes(kind)
    return np.packbits(bits[every][used[every]].reshape(len(every), -1), 1, "little")


def unpack_symbols(packed: NDArray[np.uint8], kind: str, weights: int) -> NDArray[np.uint8]:
    """The symbols [neurons, symbols] of packed filters. ValueError where they do not all end where they should."""
    code = CODED[kind]
    count = code.symbols_of(weights) + 1
    if packed.shape[1] != code.bytes(weights):
        raise ValueError(f"filters of {packed.shape[1]} bytes in {kind} where {code.bytes(weights)} belong")
    reader = _reader(kind).copy()
    try:
        found = reader.decompress(packed.tobytes(), len(packed) * count + 1)
    except zlib.error as error:
        raise ValueError(f"these are no filters in {kind}: {error}") from error
    if len(found) != len(packed) * count:
        raise ValueError(f"{len(found)} symbols in {kind} where {len(packed) * count} belong")
    symbols = np.frombuffer(found, np.uint8).reshape(len(packed), count)
    if len(packed) and not code.symbols <= symbols[:, -1].min() <= symbols[:, -1].max() < code.symbols + len(PADS):
        raise ValueError(f"filters in {kind} that do not end where they should")
    return symbols[:, :-1]


def unpack(packed: NDArray[np.uint8], kind: str, weights: int) -> NDArray[np.int8]:
    """The inverse of :func:`pack`, for filters of ``weights`` weights."""
    found = meanings(kind)[unpack_symbols(packed, kind, weights)]
    return found.reshape(len(packed), found.shape[1] * found.shape[2])[:, :weights]


@cache
def _codes(kind: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each symbol the bits of its code, the first one first [256, 15], and how many of these there are (as a
    mask)."""
    of_symbols = [*lengths(kind).tolist(), END]
    found, used = np.zeros((257, END), np.bool_), np.zeros((257, END), np.bool_)
    code = 0
    for length in range(1, END + 1):
        for symbol in (number for number, its in enumerate(of_symbols) if its == length):
            found[symbol, :length] = [code >> (length - 1 - bit) & 1 for bit in range(length)]
            used[symbol, :length] = True
            code += 1
        code <<= 1
    return found[:256], used[:256]


@cache
def _reader(kind: str) -> _Decompress:
    """What has read the head of a DEFLATE block with this code, up to a byte's end: others are copies of it."""
    reader = zlib.decompressobj(-zlib.MAX_WBITS)
    reader.decompress(_head(kind))
    return reader


def _head(kind: str) -> bytes:
    """The head of a DEFLATE block with this code, behind three blocks of nothing: so it ends with a byte."""

    def number(value: int, bits: int) -> list[int]:
        return [value >> bit & 1 for bit in range(bits)]

    nothing = [0, *number(1, 2), *number(0, 7)]
    order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]
    bits = [*nothing * 3, 0, *number(2, 2), *number(0, 5), *number(0, 5), *number(len(order) - 4, 4)]
    for length in order:  # all lengths take four bits, and no run of them is told at once
        bits += number(4 if length < 16 else 0, 3)
    for length in (*lengths(kind).tolist(), END, 0):  # of all symbols, of the end, and of no distance
        bits += number(length, 4)[::-1]
    return np.packbits(bits, bitorder="little").tobytes()
