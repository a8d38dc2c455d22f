"""Partial sums: which of those that are there can be added up.

What a device publishes of a pair is one sum of many neurons, and after a failure others publish sums of the same
neurons in other groups (:func:`robustdice.plan.added_up`). In a settled view those that are due are of different
neurons, and all are added up. In between there may be some that overlap.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from robustdice.bundle.manifest import Exchange, Manifest


class Sums:
    """The sums of one plan. Sets of neurons are bit masks."""

    def __init__(self, manifest: Manifest) -> None:
        """For all frames of a device."""
        self._neurons = {e: _masks(exchange) for e, exchange in enumerate(manifest.exchanges) if exchange.sums}

    def __contains__(self, exchange: int) -> bool:
        """Whether what is handed over in an exchange are sums."""
        return exchange in self._neurons

    def neurons(self, exchange: int, shards: Iterable[int]) -> int:
        """All neurons that are in any of these."""
        found = 0
        for shard in shards:
            found |= self._neurons[exchange][shard]
        return found

    def apart(self, exchange: int, shards: Iterable[int]) -> list[int]:
        """One after the other, those that have no neuron in common with one before."""
        found: list[int] = []
        for shard in shards:
            if not self.neurons(exchange, found) & self._neurons[exchange][shard]:
                found.append(shard)
        return found


def _masks(exchange: Exchange) -> list[int]:
    masks = []
    for shard in exchange.shards:
        there = np.zeros(exchange.neurons, np.bool_)
        there[list(shard.neurons)] = True
        masks.append(int.from_bytes(np.packbits(there, bitorder="little").tobytes(), "little"))
    return masks
