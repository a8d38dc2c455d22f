"""What devices hand each other, as it travels: float32 arrays <-> what is sent (NumPy only).

A device computes with what its own neurons are worth on the wire, as everybody else does. So all devices have the same
numbers, and the evaluator rounds with these very functions. They are plain arithmetic, element by element, and give the
same bits on every processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIRES = ("float32", "float16", "uint8")
"""What values can travel as, the finest first. ``uint8``: a code for each value, and for each neuron a scale and an
offset, worked out on the sender from the neuron's values in this very frame."""

STEPS_BYTES = 8
"""Of a neuron's offset and scale, float32 each."""
LARGEST_HALF = 65504.0
SMALLEST_SPREAD = np.float32(2.0**-100)
"""Of a neuron's values; if they lie closer together than this, down to not at all, few codes or one are used."""
_CODES = np.float32(255)

Array = NDArray[Any]
Floats = NDArray[np.float32]


def suited(wire: str, neurons: int, values: int) -> str:
    """What so many neurons with ``values`` values in all travel as where ``wire`` was asked for: ``float16`` for
    ``uint8`` where the scales would take more than the codes save."""
    halves = sent_bytes("float16", neurons, values)
    return "float16" if wire == "uint8" and sent_bytes(wire, neurons, values) >= halves else wire


def sent_bytes(wire: str, neurons: int, values: int) -> int:
    """Bytes on the wire of so many neurons with ``values`` values in all."""
    return STEPS_BYTES * neurons + values if wire == "uint8" else np.dtype(wire).itemsize * values


@dataclass(frozen=True)
class WireForm:
    """How some neurons travel: as ``wire`` says.

    Their values are float32 [batch, *shape]; neurons lie along ``axis`` (counted with the batch axis, which is 0),
    ``features`` entries each. What is sent is float32 or float16 of the same shape, or uint8 [batch, bytes]: all
    neurons' offsets, then their scales, little-endian float32, then a code for every value, in the values' order. A
    value is ``code * scale + offset``.
    """

    wire: str
    shape: tuple[int, ...]
    axis: int
    features: int = 1

    @cached_property
    def dtype(self) -> str:
        """Of what is sent."""
        return {"float32": "<f4", "float16": "<f2", "uint8": "u1"}[self.wire]

    @cached_property
    def sent_shape(self) -> tuple[int, ...]:
        """Of what is sent, without the batch axis."""
        return (STEPS_BYTES * self._grid[1] + math.prod(self.shape),) if self.wire == "uint8" else self.shape

    @cached_property
    def nbytes(self) -> int:
        """Of what is sent for one image."""
        return np.dtype(self.dtype).itemsize * math.prod(self.sent_shape)

    @cached_property
    def _grid(self) -> tuple[int, int, int]:
        """What lies before the neurons, how many they are, and how many values each has in a row."""
        before, behind = self.shape[: self.axis - 1], self.shape[self.axis :]
        return math.prod(before), self.shape[self.axis - 1] // self.features, self.features * math.prod(behind)

    def narrow(self, values: Floats) -> Array:
        """What is sent for ``values``.

        As float16, what is too large is the largest that there is; what is no finite number remains such. As uint8, a
        neuron is NaN throughout where one of its values is no finite number, or its range none in float32.
        """
        if self.wire == "float16":
            return _halves(values)
        return _coded(values.reshape(len(values), *self._grid)) if self.wire == "uint8" else values

    def widen(self, sent: Array) -> Floats:
        """What ``sent`` is worth, float32 [batch, *shape]: the same for whoever has it."""
        if self.wire == "float16":
            return widened(sent)
        if self.wire == "uint8":
            return _decoded(sent, self._grid).reshape(len(sent), *self.shape)
        return sent

    def split(self, sent: Array, neurons: Sequence[int]) -> list[Array]:
        """What is ``sent`` for so many of the ``neurons`` each, one behind the other."""
        if self.wire != "uint8":  # np.split takes ten times as long
            bounds, every = accumulate((self.features * count for count in neurons), initial=0), slice(None)
            return [sent[(*(every,) * self.axis, slice(*each))] for each in pairwise(bounds)]
        ends = np.cumsum(neurons)[:-1]
        before, all_neurons, behind = self._grid
        steps = sent[:, : STEPS_BYTES * all_neurons].reshape(-1, 2, all_neurons, STEPS_BYTES // 2)
        codes = sent[:, STEPS_BYTES * all_neurons :].reshape(-1, before, all_neurons, behind)
        some = zip(np.split(steps, ends, 2), np.split(codes, ends, 2), strict=True)
        return [np.concatenate([each.reshape(len(sent), -1) for each in both], 1) for both in some]

    def join(self, parts: Sequence[Array], neurons: Sequence[int]) -> Array:
        """What is sent for all, of what is sent for so many of the ``neurons`` each; the inverse of :meth:`split`."""
        if self.wire != "uint8":
            return np.concatenate(parts, self.axis)
        before, _, _ = self._grid
        batch = len(parts[0])
        steps, codes = [], []
        for part, count in zip(parts, neurons, strict=True):
            steps.append(part[:, : STEPS_BYTES * count].reshape(batch, 2, -1))
            codes.append(part[:, STEPS_BYTES * count :].reshape(batch, before, -1))
        return np.concatenate([np.concatenate(each, 2).reshape(batch, -1) for each in (steps, codes)], 1)


def _halves(values: Floats) -> NDArray[np.float16]:
    if not (values.max() <= LARGEST_HALF and values.min() >= -LARGEST_HALF):  # or NaN
        values = np.where(np.isfinite(values), np.clip(values, -LARGEST_HALF, LARGEST_HALF), values)
    return values.astype("<f2")


def _coded(values: Floats) -> NDArray[np.uint8]:
    """[batch, bytes] of values [batch, before, neurons, behind]."""
    batch, before, neurons, behind = values.shape
    sent = np.empty((batch, STEPS_BYTES * neurons + before * neurons * behind), np.uint8)
    steps = sent[:, : STEPS_BYTES * neurons].view("<f4")
    with np.errstate(over="ignore", invalid="ignore"):
        least = np.minimum.reduce(values, (1, 3))
        spread = np.maximum(np.maximum.reduce(values, (1, 3)) - least, SMALLEST_SPREAD)
        steps[:, :neurons] = least + 0 * spread  # NaN where the spread is infinite
        steps[:, neurons:] = spread / _CODES
        codes = values - least[:, None, :, None]
        codes *= (_CODES / spread)[:, None, :, None]
        codes += np.float32(0.5)
        np.copyto(sent[:, STEPS_BYTES * neurons :], codes.reshape(batch, -1), casting="unsafe")
    return sent


def _decoded(sent: NDArray[np.uint8], grid: tuple[int, int, int]) -> Floats:
    """Values [batch, before, neurons, behind] of [batch, bytes]."""
    _, neurons, _ = grid
    steps = sent[:, : STEPS_BYTES * neurons].view("<f4").astype(np.float32)
    values = sent[:, STEPS_BYTES * neurons :].astype(np.float32).reshape(-1, *grid)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= steps[:, None, neurons:, None]
        values += steps[:, None, :neurons, None]
    return values


def widened(halves: NDArray[np.float16]) -> Floats:
    """float16 numbers as float32."""
    values = np.empty(halves.shape, np.float32)
    if np.bitwise_and(halves.view(np.uint16), 0x7FFF).max(initial=0) >= 0x7C00:  # infinite, or no number
        np.copyto(values, halves)
        return values
    return widen_finite(halves, values)


def widen_finite(halves: NDArray[np.float16], result: Floats) -> Floats:
    """Finite float16 numbers in ``result``. By moving their bits to where float32 has them and making up for the
    exponents' offsets, in a quarter of the time that NumPy's own conversion takes on x86."""
    bits = result.view(np.int32)
    np.copyto(bits, halves.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_NUMBER, out=bits)
    return np.multiply(result, np.float32(2.0**112), out=result)


_SIGN_AND_NUMBER = np.array(0x8FFFE000, np.uint32).view(np.int32)
