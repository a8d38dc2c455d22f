"""A model that is to be written into bundles, and what it takes from a device's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.parts import Work
from robustdice.plan import Shard

Neurons = NDArray[np.int64]


@dataclass(frozen=True)
class Taken:
    """What a model takes for some neurons of one layer (its position): scales and shifts, and unless their ``kind`` is
    float32 filters, unpacked for ``at_once`` neurons at a time; ``inside``: it has the codes of the layer's own ones
    itself. ``factor`` is a :class:`Coarse`'s.

    Of a pair, the ``first`` layer comes with the second one's filters for its neurons; the ``second`` has shifts and
    the tail's filters alone, and the ``scales`` of its sums are by themselves."""

    layer: int
    neurons: Neurons
    kind: str = "float32"
    at_once: int = 0
    inside: bool = False
    factor: float = 1.0
    pair: str = ""


@dataclass(frozen=True)
class Model:
    """An ONNX file to be written, the bytes of the network's parameters in it, and the ``layers`` for which it takes
    more than that. ``trial`` and ``work`` are a :class:`Part`'s. ``apart`` has its weights, where they are not in it:
    the name of their file, and its content. ``signed`` is the file with signed codes of inputs, if it rounds any; else
    empty."""

    content: bytes
    weight_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[Taken, ...] = ()
    trial: tuple[tuple[float, ...], ...] = ()
    apart: tuple[str, bytes] | None = None
    work: tuple[Work, ...] = ()
    signed: bytes = b""


def neurons_of(shards: Sequence[Shard]) -> Neurons:
    """The shards' neurons, one shard after the other."""
    return np.array([neuron for shard in shards for neuron in shard.neurons])
