"""Shards that travel together, kept as they lie in memory: one array for each exchange.

A device computes its shards of an exchange as one array, sends that, and its peers place it as one. What each number of
shards looks like is the same for every frame, so it is worked out once (:class:`Layout`). Single shards are cut out of
a parcel only where somebody asks for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.manifest import Exchange, Manifest
from robustdice.runtime.wire.messages import Parcel, ShardId
from robustdice.wire_format import WireForm

Array = NDArray[Any]
REMEMBERED_LAYOUTS = 512
"""Of those that were asked for last: what comes with every frame is among them."""


@dataclass(frozen=True, eq=False)
class Block:
    """How those of some shards that are of one exchange lie in one array, one behind the other, with so many
    ``neurons`` each; ``form`` says how that array travels."""

    exchange: int
    numbers: tuple[int, ...]
    neurons: tuple[int, ...]
    form: WireForm
    of: Exchange = field(repr=False)

    @cached_property
    def index(self) -> tuple[slice | NDArray[np.intp], ...]:
        """Where the array lies in the exchange's value [batch, ...], unless it is a sum. As large as the array, so that
        it is not worked out for whatever shards a peer chooses to list."""
        of, slices = self.of, self.of.slices
        parts = (slices[number % len(slices)] if slices else of.shards[number].neurons for number in self.numbers)
        held = [neuron for neurons in parts for neuron in neurons]
        return (*(slice(None),) * self.of.axis, _place(held, self.of.features))


@dataclass(frozen=True, eq=False)
class Layout:
    """How some shards, of one or several exchanges, lie in one array for each exchange: ``blocks``, in the shards'
    order, which has those of one exchange together."""

    shards: tuple[ShardId, ...]
    blocks: tuple[Block, ...]

    @cached_property
    def plain(self) -> bool:
        """Whether everything travels as it is computed."""
        return all(block.form.wire == "float32" for block in self.blocks)

    def packed(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """The blocks' arrays, from a single array for each shard."""
        if isinstance(arrays, Packed):
            return arrays.blocks
        found, start = [], 0
        for block in self.blocks:
            some = arrays[start : start + len(block.numbers)]
            found.append(some[0] if len(some) == 1 else block.form.join(some, block.neurons))
            start += len(some)
        return tuple(found)


class Packed(Sequence[Array]):
    """The shards of a layout, in its blocks' arrays: cut out when they are asked for."""

    def __init__(self, layout: Layout, blocks: tuple[Array, ...]) -> None:
        """``blocks`` are the arrays, each [batch, *shape]; nothing is copied."""
        self.layout, self.blocks = layout, blocks

    def __len__(self) -> int:
        return len(self.layout.shards)

    def __iter__(self) -> Iterator[Array]:
        for block, array in zip(self.layout.blocks, self.blocks, strict=True):
            yield from [array] if len(block.numbers) == 1 else block.form.split(array, block.neurons)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | Sequence[Array]:
        return list(self)[index]


class Layouts:
    """The layouts of one plan's shards."""

    def __init__(self, manifest: Manifest) -> None:
        """None is known yet."""
        self._exchanges = manifest.exchanges
        self.of = lru_cache(REMEMBERED_LAYOUTS)(self.fresh)
        """The layout of some shards, those of one exchange together; worked out once."""

    def fresh(self, shards: tuple[ShardId, ...]) -> Layout:
        """The same, worked out for this once: while devices fail, there is no end of what shards some message is of."""
        blocks = [
            _block(self._exchanges[exchange], exchange, tuple(number for _, number in some))
            for exchange, some in groupby(shards, key=lambda shard: shard[0])
        ]
        return Layout(shards, tuple(blocks))

    def select(self, wanted: Sequence[tuple[ShardId, ...]], parcels: Sequence[Parcel]) -> tuple[Parcel, ...]:
        """A parcel of each of the ``wanted`` shards, out of what several hold, and what these hold beside them."""
        if len(wanted) == 1 and parcels[0].shards == wanted[0]:
            return tuple(parcels)
        found = {shard: array for parcel in parcels for shard, array in zip(parcel.shards, parcel.arrays, strict=True)}
        chosen = [self.packed(shards, [found.pop(shard) for shard in shards]) for shards in wanted]
        return (*chosen, Parcel(tuple(found), list(found.values()))) if found else tuple(chosen)

    def packed(self, shards: tuple[ShardId, ...], arrays: Sequence[Array]) -> Parcel:
        """A parcel of single arrays, with those of one exchange in one."""
        layout = self.of(shards)
        return Parcel(shards, Packed(layout, layout.packed(arrays)))


def _block(exchange: Exchange, position: int, numbers: tuple[int, ...]) -> Block:
    widths = [exchange.entries(number) for number in numbers]
    shape = (*exchange.shape[: exchange.axis - 1], sum(widths), *exchange.shape[exchange.axis :])
    form = WireForm(exchange.wire, shape, exchange.axis, exchange.features)
    return Block(position, numbers, tuple(width // exchange.features for width in widths), form, exchange)


def _place(neurons: Sequence[int], features: int) -> slice | NDArray[np.intp]:
    """Where neurons' entries lie along the axis: a slice when they are neighbours."""
    if list(neurons) == list(range(neurons[0], neurons[0] + len(neurons))):
        return slice(neurons[0] * features, (neurons[0] + len(neurons)) * features)
    entries: NDArray[np.intp] = (np.array(neurons)[:, None] * features + np.arange(features)).ravel()
    return entries
