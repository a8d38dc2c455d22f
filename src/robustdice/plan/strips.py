"""A run of layers that every device holds, of which each computes a strip of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.plan.shards import Holder, Shard


@dataclass(frozen=True)
class Strips:
    """Layers that follow each other (``layers``, their positions), each read by the next alone, and how they are shared
    out: device d computes the rows ``bounds[d]`` to ``bounds[d + 1]`` of what the last one hands over.

    Neighbours' strips need some of the same rows before: ``heights`` are the layers' rows (before their tails), and
    ``computed`` how many of them each device computes, [layers, devices]. The last one hands over ``activations``.
    """

    layers: tuple[int, ...]
    bounds: tuple[int, ...]
    heights: tuple[int, ...]
    computed: tuple[tuple[int, ...], ...]
    activations: int

    def shards(self) -> tuple[Shard, ...]:
        """The strips as shards whose neurons are rows: every device can compute each of them, its own one first."""
        devices = len(self.bounds) - 1
        return tuple(
            Shard(tuple(range(start, end)), tuple(Holder((first + k) % devices) for k in range(devices)))
            for first, (start, end) in enumerate(pairwise(self.bounds))
        )

    def shares(self, layer: int) -> NDArray[np.float64]:
        """The share of a layer's rows that each device computes, [devices]."""
        at = self.layers.index(layer)
        return np.array(self.computed[at]) / self.heights[at]

    def problem(self, devices: int) -> str | None:
        """What is wrong with the numbers for so many devices, if anything is."""
        if not self.layers or any(b <= a for a, b in pairwise(self.layers)):
            return "its layers are not in ascending order"
        if len(self.bounds) != devices + 1 or self.bounds[0] or any(b <= a for a, b in pairwise(self.bounds)):
            return f"its strips are not at least one row for each of {devices} devices"
        if not len(self.layers) == len(self.heights) == len(self.computed):
            return "its rows are not those of its layers"
        for height, computed in zip(self.heights, self.computed, strict=True):
            if len(computed) != devices or not all(0 < rows <= height for rows in computed):
                return f"devices compute {list(computed)} of {height} rows"
        return None if self.activations > 0 else f"{self.activations} activations are handed over"


def strips_from_json(document: Mapping[str, Any]) -> Strips:
    """A run as plans store it; KeyError, TypeError or ValueError when it is none."""
    return Strips(
        layers=tuple(map(int, document["layers"])),
        bounds=tuple(map(int, document["bounds"])),
        heights=tuple(map(int, document["heights"])),
        computed=tuple(tuple(map(int, rows)) for rows in document["computed"]),
        activations=int(document["activations"]),
    )
