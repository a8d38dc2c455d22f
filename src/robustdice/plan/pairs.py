"""A layer and the one layer that reads it, dealt out as a pair: what is exchanged are sums.

A device that holds a neuron of the first layer holds the second layer's weights for it, too, and computes what it adds
to the second layer's neurons. Devices hand each other these partial sums, before the second layer's bias and tail,
which all compute.

Where any copy is coarse, sums are what stands behind the second layer's affine chain, but for its shift: copies have
the chain in their scales then, and float32 copies in their weights. A device has one scale for each neuron of the
second layer and representation, whichever neurons of the first it holds in it; the shift, with the tail, is that of the
copy which everybody is said to hold of the second layer, and is added once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robustdice.plan.shards import Holder, Layer, Shard
from robustdice.representation import SHIFT_BYTES, filter_bytes, neuron_bytes


def column_weights(first: Layer, second: Layer) -> int:
    """The second layer's weights that read one neuron of the first, all features of it included."""
    return second.neurons * (second.filter_weights // first.neurons)


def folded(first: Layer, second: Layer, coarse: bool = False) -> Layer:
    """The pair as one layer to be dealt out: the first one's neurons with the weights that read them. Where copies may
    be ``coarse``, these are counted as a multiple of eight, which fill their bytes in any representation."""
    columns = column_weights(first, second)
    columns += -columns % 8 if coarse else 0
    return replace(first, neuron_weights=first.neuron_weights + columns, filter_weights=first.filter_weights + columns)


def kept_by_all(second: Layer, representation: str, coarse_pair: bool) -> int:
    """Bytes that every device has of one neuron of a pair's second layer: its tail, and what its sum is shifted by."""
    if not coarse_pair:
        return 4 * (second.neuron_weights - second.filter_weights)
    if representation == "float32":
        chain = 4 * (second.filter_weights + second.affine_weights) - (SHIFT_BYTES if second.affine_weights else 0)
        return 4 * second.neuron_weights - chain
    return neuron_bytes(second, representation) - filter_bytes(second.filter_weights, representation)


def added_up(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """A pair's shards as they are handed over: each the sum of what one device publishes from copies of one
    representation in the same circumstances, namely while the same devices (``after``) are down.

    Those that need nobody to be down come first. In any state of the devices, the ones that are published are of
    different neurons.
    """
    neurons: dict[tuple[int, tuple[int, ...], int, str], list[int]] = {}
    for shard in shards:
        for position, holder in enumerate(shard.holders):
            after = tuple(sorted(shard.devices[:position]))
            neurons.setdefault((position, after, holder.device, holder.representation), []).extend(shard.neurons)
    return tuple(Shard(tuple(sorted(neurons[key])), (Holder(*key[2:]),), after=key[1]) for key in sorted(neurons))


def pair_problem(devices: int, layers: Sequence[Layer], of_first: Sequence[Shard], of_second: Sequence[Shard]) -> str:
    """What is wrong with two layers as a pair, empty if nothing is: ``of_first`` and ``of_second`` are their shards."""
    first, second = layers
    everywhere = len(of_second) == 1 and sorted(of_second[0].devices) == list(range(devices))
    if second.group > 1 or second.reads_group or not second.filter_weights or second.filter_weights % first.neurons:
        return f"{second.name} does not read all of {first.name}'s {first.neurons} neurons alike"
    if any(shard.parity_of for shard in of_first):
        return f"{first.name} has a sum of shards already"
    return "" if everywhere else f"{second.name} is not one shard of all devices"
