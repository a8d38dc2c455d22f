"""Putting an exchange's value together from the parcels that have come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.manifest import Exchange
from robustdice.runtime.parcels import Block, Layouts, Packed
from robustdice.runtime.wire.messages import Parcel

Array = NDArray[Any]
Floats = NDArray[np.float32]


class Assembly:
    """One exchange (its ``position`` in the manifest) of a plan."""

    def __init__(self, position: int, exchange: Exchange, layouts: Layouts) -> None:
        """What single shards look like is worked out at once: a frame that a device has left waits for it."""
        self._position, self._exchange = position, exchange
        self._shards = sum(bool(shard.neurons) for shard in exchange.shards)
        self._single = [layouts.fresh(((position, number),)).blocks[0] for number in range(len(exchange.shards))]
        for block, shard in zip(self._single, exchange.shards, strict=True):
            if shard.neurons and not exchange.sums:
                _ = block.index
        self._singly_only = bool(exchange.shards[-1].parity_of)

    def value(self, parcels: Sequence[Parcel], batch: int = 1) -> dict[str, Array]:
        """The exchange's value, float32 [batch, *shape], and its mask if it has one, from what ``parcels`` have of it.

        A single missing shard follows from the parity shard; ``fill`` stands for what is missing otherwise. Sums are
        added up in the order of the shards, so that all devices have the same.
        """
        exchange, missing = self._exchange, self._shards
        if exchange.sums:
            return {exchange.value: self._sum(parcels, batch)}
        parts: list[tuple[Block, Array]] = []
        for parcel in parcels:
            arrays = parcel.arrays
            if self._singly_only or not isinstance(arrays, Packed):
                parts = self._singly(parcels)
                missing = self._shards - len(parts)
                break
            plain = arrays.layout.plain
            for block, sent in zip(arrays.layout.blocks, arrays.blocks, strict=True):
                if block.exchange == self._position:
                    parts.append((block, sent if plain else block.form.widen(sent)))
                    missing -= len(block.numbers)
        if self._shards == 1 and not missing:
            value = parts[0][1]
        else:
            value = np.empty((batch, *exchange.shape), np.float32)
            if missing:
                value.fill(exchange.fill)
            for block, array in parts:
                value[block.index] = array
        if exchange.mask is None:
            return {exchange.value: value}
        mask = np.zeros(exchange.shape[exchange.axis - 1] // exchange.features, np.bool_)
        for block, _ in parts:
            for number in block.numbers:
                mask[list(exchange.shards[number].neurons)] = True
        return {exchange.value: value, exchange.mask: mask}

    def _sum(self, parcels: Sequence[Parcel], batch: int) -> Array:
        total = np.zeros((batch, *self._exchange.shape), np.float32)
        for block, array in sorted(self._singly(parcels), key=lambda part: part[0].numbers):
            total[block.index if self._exchange.slices else ...] += array
        return total

    def _singly(self, parcels: Sequence[Parcel]) -> list[tuple[Block, Array]]:
        """Every shard by itself; those with neurons, whether they have come or follow from what has."""
        there = {
            number: self._single[number].form.widen(array)
            for shards, arrays in parcels
            for (position, number), array in zip(shards, arrays, strict=True)
            if position == self._position
        }
        found = _repair(self._exchange, there)
        return [(self._single[number], array) for number, array in found.items()]


def _repair(exchange: Exchange, shards: Mapping[int, Floats]) -> dict[int, Floats]:
    """The shards with neurons: those that are there, and the one missing if the parity shard gives it."""
    last = len(exchange.shards) - 1
    members = exchange.shards[last].parity_of
    there = {number: array for number, array in shards.items() if not exchange.shards[number].parity_of}
    missing = [number for number in members if number not in there]
    if last not in shards or len(missing) != 1:
        return there
    rest = shards[last].copy()
    for array in there.values():
        rest[(slice(None),) * exchange.axis + (slice(array.shape[exchange.axis]),)] -= array
    there[missing[0]] = rest[(slice(None),) * exchange.axis + (slice(exchange.entries(missing[0])),)]
    return there
