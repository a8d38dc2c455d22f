"""What a method is asked where layers are dealt out as pairs, or computed in strips, and the plan's shards that follow
(NumPy only)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from robustdice.entropy_code import CODED
from robustdice.errors import PlanError
from robustdice.partitioning.precision import Kinds, kinds_of
from robustdice.partitioning.replicate import whole
from robustdice.partitioning.request import Request
from robustdice.plan import Layer, Shard, folded
from robustdice.representation import SCALE_BYTES, is_scaled


def check_pairs(method: str, pairs: Mapping[int, int], precision: Collection[str]) -> None:
    """PlanError when a method cannot deal out pairs, or copies in this ``precision`` cannot be."""
    if pairs and (coded := CODED.keys() & set(precision)):
        raise PlanError(
            f"filters in {min(coded)} are had whole or not at all, so these copies cannot be split hidden: split "
            "neurons, or take another precision"
        )
    if pairs and method == "cdc":
        raise PlanError(
            "method cdc hands over sums of its own, so it deals out neurons only: split neurons, or take another method"
        )


def kinds_with_pairs(layers: Sequence[Layer], pairs: Mapping[int, int], primary: str, spare: str) -> list[Kinds]:
    """As :func:`kinds_of`: a pair is one layer, of whose second one everybody has what belongs to primaries."""
    found = kinds_of(
        [folded(layer, layers[pairs[i]]) if i in pairs else layer for i, layer in enumerate(layers)], primary, spare
    )
    for first, second in pairs.items():
        if second == len(layers) - 1:
            found[first] = found[second]
        found[second] = Kinds(found[first].primary, found[first].primary)
    return found


def without_some(request: Request, pairs: Mapping[int, int], by_all: frozenset[int]) -> Request:
    """The request with each pair as one layer: the first one's neurons, with the weights that read them; and without
    the layers that are held ``by_all``. What everybody has of these and of second layers counts with what is shared.
    PlanError when nothing is left."""
    dealt = [index for index in range(len(request.layers)) if index not in by_all.union(pairs.values())]
    if len(dealt) == len(request.layers):
        return request
    if not dealt:
        raise PlanError("every device would hold all layers: there is nothing to deal out; split neurons")
    layers, importance, threshold = request.layers, request.importance, request.threshold
    if importance is not None:
        names, scores = importance.names, importance.scores
        kept = (tuple(names[index] for index in dealt), tuple(scores[index] for index in dealt))
        importance = replace(importance, names=kept[0], scores=kept[1])
    if threshold is not None and np.ndim(threshold) and len(threshold) == len(layers):  # type: ignore[arg-type]
        threshold = [threshold[index] for index in dealt]  # type: ignore[index]
    seconds, everywhere = ([layers[index] for index in of] for of in (pairs.values(), by_all))
    weights = sum(second.neurons * (second.neuron_weights - second.filter_weights) for second in seconds)
    weights += sum(layer.neurons * layer.neuron_weights for layer in everywhere)
    scaled = sum(map(is_scaled, set(request.precision)))
    weights += -(-sum(second.neurons for second in seconds) * scaled * SCALE_BYTES // 4)
    coarse = set(request.precision) != {"float32"}
    return replace(
        request,
        layers=[folded(layers[i], layers[pairs[i]], coarse) if i in pairs else layers[i] for i in dealt],
        importance=importance,
        threshold=threshold,
        shared_weights=request.shared_weights + weights,
    )


def with_all(
    shards: Sequence[tuple[Shard, ...]], request: Request, pairs: Mapping[int, int], by_all: frozenset[int]
) -> tuple[tuple[tuple[Shard, ...], ...], dict[int, int]]:
    """The shards of all layers of ``request``, from those of :func:`without_some`, and the pairs that are left:
    where every device holds the first layer, all have the second as well, and nothing is to be added up."""
    given, everywhere = iter(shards), by_all.union(pairs.values())
    found = [
        whole(layer, request.devices) if index in everywhere else next(given)
        for index, layer in enumerate(request.layers)
    ]
    left = {
        first: second
        for first, second in pairs.items()
        if any(len(shard.holders) < request.devices for shard in found[first])
    }
    return tuple(found), left
