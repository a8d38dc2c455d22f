"""How a device tries its bundle before it uses it: made-up inputs, and what the results must amount to.

A kernel that computes something else than the workshop did, on this processor or in this version of ONNX Runtime, shows
before any frame is answered. Inputs are numbers that everyone can make; results are kept as four numbers each.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.manifest import Exchange

TOLERANCE = 1e-3
"""Largest difference between two summaries of the same result, as a share of its norm. Rounding stays below 1e-5; one
wrong neuron of a thousand shows."""

ROUNDED_TOLERANCE = 2e-2
"""Likewise for each layer in a row that reads inputs rounded to 8 bits. What lies between two steps may go to the other
one where numbers before it were added up in another order, and the next layers make more of that."""

Array = NDArray[Any]


def stand_in(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What stands for the value ``name`` in a trial: float32 [1, *shape], evenly spread between -1 and 1."""
    count = int(np.prod(shape, dtype=np.int64))
    return _spread(_scrambled(count, zlib.crc32(name.encode())), 0).astype(np.float32).reshape(1, *shape)


def stand_ins(exchanges: Iterable[Exchange]) -> dict[str, Array]:
    """What stands for assembled exchanges, with their masks: nothing is lost."""
    found: dict[str, Array] = {}
    for exchange in exchanges:
        found[exchange.value] = stand_in(exchange.value, exchange.shape)
        if exchange.mask is not None:
            found[exchange.mask] = np.ones(sum(len(shard.neurons) for shard in exchange.shards), np.bool_)
    return found


def summary(array: Array) -> tuple[float, ...]:
    """A result as its norm and three sums of its entries with made-up factors."""
    flat = np.asarray(array, np.float64).ravel()
    scrambled = _scrambled(flat.size, 0)
    sums = [float(flat @ _spread(scrambled, number)) for number in range(3)]
    return (float(np.linalg.norm(flat)), *sums)


def deviation(found: tuple[float, ...], expected: tuple[float, ...]) -> float:
    """Largest difference as a share of the expected norm; infinite for what is no number."""
    largest = max(abs(a - b) for a, b in zip(found, expected, strict=True)) / max(expected[0], 1e-6)
    return largest if np.isfinite(largest) else float("inf")


def _scrambled(count: int, seed: int) -> NDArray[np.uint64]:
    """64 bits for each number from 0 on: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    bits = np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)), np.uint64)


def _spread(scrambled: NDArray[np.uint64], number: int) -> NDArray[np.float64]:
    """The 21 bits of that number as a number from -1 to 1."""
    part = (scrambled >> np.uint64(21 * number)) & np.uint64(2**21 - 1)
    return np.asarray(part.astype(np.float64) / 2**20 - 1)
