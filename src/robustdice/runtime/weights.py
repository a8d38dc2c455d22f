"""A bundle's weights in memory: packed as in its file, unpacked a few neurons at a time into one buffer.

Codes become float32 by looking up whole bytes (three bits: twelve at a time) in tables of two or four weights: NumPy
then moves 8 or 16 bytes per look-up, which takes a third of the time of shifting and masking. What is entropy-coded
becomes symbols first (:mod:`robustdice.entropy_code`).
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.parts import Filter, Part
from robustdice.entropy_code import CODED, meanings, unpack_symbols
from robustdice.errors import BundleError
from robustdice.representation import (
    BITS,
    SCALE_BYTES,
    code_offset,
    code_range,
    corrections_of,
    packed_bytes,
    unpack,
)
from robustdice.wire_format import widen_finite

Floats = NDArray[np.float32]


class Weights:
    """The content of a bundle's file of weights. Not thread-safe: what is unpacked makes room for what comes next."""

    def __init__(self, content: bytes) -> None:
        """``content`` is kept as it is."""
        self._bytes = np.frombuffer(content, np.uint8)
        self._buffer = np.empty(0, np.float32)

    def affine(self, part: Part, calibrated: int | None) -> dict[str, Floats]:
        """What a part scales and shifts its layers' neurons by, by the names of its inputs, float32 [neurons] each;
        with the corrections for the calibrated failure set of that number, or none."""
        found: dict[str, Floats] = {}
        for affine in part.affine:
            scale, shift = np.ones(affine.neurons, np.float32), np.zeros(affine.neurons, np.float32)
            if (coarse := affine.coarse) is not None:
                if coarse.scales is not None:
                    scale = self._array(coarse.scales, "<f2", affine.neurons).astype(np.float32)
                elif (own := coarse.own) is not None and _scaled_behind(own):
                    scale = self._scales(own, affine.neurons).astype(np.float32)[:, 0]
                scale = scale * np.float32(coarse.factor)
                if coarse.shift is not None:
                    kind = f"<f{coarse.shift_bytes}"
                    shift = self._array(coarse.shift, kind, affine.neurons).astype(np.float32)
            if calibrated is not None and (corrected := affine.corrections[calibrated]) is not None:
                codes = self._array(corrected.offset, "i1", 2 * affine.neurons).reshape(2, -1)
                factor, summand = corrections_of(codes, np.array(corrected.steps))
                scale, shift = scale * factor, shift * factor + summand
            found[affine.scale], found[affine.shift] = scale, shift
        return found

    def filters(self, part: Part, start: int = 0) -> dict[str, Floats]:
        """The filters of a part's layers by the names of the model's inputs, valid until other ones are asked for: of
        all neurons, or where these are computed a few at a time, of those from ``start`` on."""
        wanted = [(each, affine) for affine in part.affine if affine.coarse for each in affine.coarse.filters]
        counts = [min(affine.coarse.at_once, affine.neurons) for _, affine in wanted if affine.coarse]
        ends = np.cumsum([0, *(_room(each, count) for (each, _), count in zip(wanted, counts, strict=True))])
        if self._buffer.size < ends[-1]:
            self._buffer = np.empty(ends[-1], np.float32)
        found = {}
        for (each, affine), count, (a, b) in zip(wanted, counts, pairwise(ends), strict=True):
            rows = slice(start, min(start + count, affine.neurons))
            unpacked = self._unpack(each, affine.neurons, rows, self._buffer[a:b])
            own = affine.coarse is not None and each is affine.coarse.own
            if _groups(each) and not (own and _scaled_behind(each)):
                _multiply(unpacked, self._scales(each, affine.neurons)[rows], each.group)
            found[each.input] = unpacked.reshape(-1, *each.shape)
        return found

    def _unpack(self, kept: Filter, neurons: int, rows: slice, room: Floats) -> Floats:
        """The levels of some neurons' weights, before scaling: float32 [rows, weights] in ``room``."""
        packed = self._codes(kept, neurons)[rows]
        result = room[: len(packed) * kept.weights].reshape(len(packed), -1)
        if kept.representation == "float16":
            return widen_finite(packed, result)
        if kept.representation == "int8":
            np.copyto(result, packed)
            return result
        if kept.representation == "int3" and kept.weights % 8:  # no whole number of twelve bits in a row
            np.add(unpack(packed, "int3", kept.weights), np.float32(code_offset("int3")), out=result)
            return result
        if kept.representation in CODED:
            return _decode(packed, kept, room, result)
        index = _twelve_bits(packed) if kept.representation == "int3" else packed
        table = _levels(kept.representation)
        wide = room[: index.size * table.itemsize // 4].reshape(len(packed), -1)
        np.take(table, index, out=wide.view(table.dtype), mode="clip")
        return _without_rest(wide, result)

    def _codes(self, kept: Filter, neurons: int) -> NDArray[Any]:
        """[neurons, bytes of a row], or numbers where one is a byte or more."""
        kind = {"float16": "<f2", "int8": "i1"}.get(kept.representation, "u1")
        row = kept.weights if kind != "u1" else packed_bytes(kept.weights, kept.representation)
        return self._array(kept.offset, kind, neurons * row).reshape(neurons, row)

    def _scales(self, kept: Filter, neurons: int) -> NDArray[np.float16]:
        """float16 [neurons, groups]."""
        groups = _groups(kept)
        end = kept.offset + neurons * kept.neuron_bytes
        return self._array(end - neurons * groups * SCALE_BYTES, "<f2", neurons * groups).reshape(neurons, groups)

    def _array(self, offset: int, kind: str, count: int) -> NDArray[Any]:
        return np.frombuffer(self._bytes, kind, count, offset)


def _decode(packed: NDArray[np.uint8], kept: Filter, room: Floats, result: Floats) -> Floats:
    """Entropy-coded levels."""
    try:
        found = unpack_symbols(packed, kept.representation, kept.weights)
    except ValueError as error:
        raise BundleError(f"the weights of {kept.input} are damaged: {error}; build the bundle again") from error
    table = _meanings(kept.representation)
    wide = room[: found.size * table.itemsize // 4].reshape(len(packed), -1)
    np.take(table, found, out=wide.view(table.dtype), mode="clip")
    return _without_rest(wide, result)


def _without_rest(wide: Floats, result: Floats) -> Floats:
    """Rows, in ``result``, without what the last byte or symbol of each has beyond them; both are in the same place."""
    if wide.shape[1] > result.shape[1]:
        result[...] = wide[:, : result.shape[1]].copy()
    return result


def _groups(kept: Filter) -> int:
    return 0 if kept.representation == "float16" or not kept.group else -(-kept.weights // kept.group)


def _scaled_behind(own: Filter) -> bool:
    """Whether a layer's neurons can be scaled where they come out, which takes less than scaling all their weights."""
    return _groups(own) == 1


def _room(kept: Filter, neurons: int) -> int:
    """Numbers that unpacking a filter takes: its rows are unpacked to the end of their last byte or symbol."""
    together = {"int4": 2, "int2": 4, **{kind: code.together for kind, code in CODED.items()}}
    size = neurons * (kept.weights + -kept.weights % together.get(kept.representation, 1))
    return size + -size % 4  # what follows it starts where four numbers can be written at once


def _multiply(filters: Floats, scales: NDArray[np.float16], group: int) -> None:
    """Scale [neurons, weights] by [neurons, groups] in place. Without any, nothing is scaled."""
    neurons, weights = filters.shape
    whole = weights // group
    if scales.shape[1] and whole * group == weights:
        filters.reshape(neurons, whole, group)[...] *= scales.astype(np.float32)[:, :, None]
    elif scales.shape[1]:
        for number, scale in enumerate(scales.astype(np.float32).T):
            filters[:, number * group : (number + 1) * group] *= scale[:, None]


def _twelve_bits(packed: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Every three bytes [neurons, bytes] as two numbers of twelve bits [neurons, 2/3 bytes], low bits first."""
    neurons, row = packed.shape
    pairs = np.empty((neurons, row // 3, 2), np.uint16)
    for number in (0, 1):  # the numbers lie in bytes 0 and 1, and in bytes 1 and 2
        two_bytes = np.ndarray((neurons, row // 3), "<u2", packed, number, (row, 3))
        if number:
            np.right_shift(two_bytes, 4, out=pairs[:, :, 1])
        else:
            np.bitwise_and(two_bytes, 0xFFF, out=pairs[:, :, 0])
    return pairs.reshape(neurons, -1)


@cache
def _levels(representation: str) -> NDArray[Any]:
    """The levels of all the codes in a byte (three bits: in twelve), as one number of 8 or 16 bytes."""
    bits = int(BITS[representation])
    codes = 12 // bits if representation == "int3" else 8 // bits
    numbers = np.arange(2 ** (bits * codes))[:, None] >> (bits * np.arange(codes))
    low, _ = code_range(representation)
    levels = (numbers % 2**bits + low + code_offset(representation)).astype(np.float32)
    table: NDArray[Any] = levels.view(np.complex128 if codes == 4 else np.float64)[:, 0]
    table.flags.writeable = False
    return table


@cache
def _meanings(representation: str) -> NDArray[Any]:
    """The levels that each symbol stands for, as one number of 4 or 8 bytes, or as three of 4."""
    levels = meanings(representation).astype(np.float32)
    moved: np.dtype[Any] = np.dtype({1: "f4", 2: "f8", 3: "V12"}[levels.shape[1]])
    table: NDArray[Any] = levels.view(moved)[:, 0]
    table.flags.writeable = False
    return table
