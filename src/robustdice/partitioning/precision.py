"""In which representation each layer's primaries and spares are kept (NumPy only)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from robustdice.errors import PlanError
from robustdice.plan import Holder, Layer, Shard
from robustdice.representation import BITS, REPRESENTATIONS, neuron_bytes

DELICATE = "int8"
"""What the first layer, the last one and those with very small filters are kept in, where the others are coarser: few
bytes on which much depends."""
NARROW = 25
"""Weights of a filter up to which it is very small: such as a depthwise one."""


@dataclass(frozen=True)
class Kinds:
    """The representations of one layer's primaries and of its spares."""

    primary: str = "float32"
    spare: str = "float32"


def kinds_of(layers: Sequence[Layer], primary: str, spare: str) -> list[Kinds]:
    """For every layer the representations that ``primary`` and ``spare`` ask for; PlanError when there is no such."""
    for kind in (primary, spare):
        if kind not in REPRESENTATIONS:
            raise PlanError(f"unknown representation {kind!r}; known: {', '.join(REPRESENTATIONS)}")
    found = []
    for index, layer in enumerate(layers):
        delicate = index in (0, len(layers) - 1) or layer.filter_weights <= NARROW
        found.append(
            Kinds(*(DELICATE if delicate and BITS[kind] < BITS[DELICATE] else kind for kind in (primary, spare)))
        )
    return found


def bytes_of(layer: Layer, kinds: Kinds) -> tuple[int, int]:
    """Bytes of one neuron as a primary and as a spare."""
    return neuron_bytes(layer, kinds.primary), neuron_bytes(layer, kinds.spare)


def represented(shards: Sequence[Shard], kinds: Kinds, devices: int) -> tuple[Shard, ...]:
    """A layer's shards with each holder's representation; what is the sum of others stays as it is.

    A layer that all of the ``devices`` hold whole is not exchanged, so that all copies have to be the same: spares.
    """
    primary = kinds.spare if all(len(shard.holders) == devices for shard in shards) else kinds.primary
    return tuple(
        shard
        if shard.parity_of
        else replace(
            shard,
            holders=tuple(
                Holder(device, kinds.spare if number else primary) for number, device in enumerate(shard.devices)
            ),
        )
        for shard in shards
    )
