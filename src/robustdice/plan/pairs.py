"""A layer and the one layer that reads it, dealt out as a pair: what is exchanged are sums.

A device that holds a neuron of the first layer holds the second layer's weights for it, too, and computes what it adds
to the second layer's neurons. Devices hand each other these partial sums, before the second layer's bias and tail,
which all compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robustdice.plan.shards import Holder, Layer, Shard


def column_weights(first: Layer, second: Layer) -> int:
    """The second layer's weights that read one neuron of the first, all features of it included."""
    return second.neurons * (second.filter_weights // first.neurons)


def folded(first: Layer, second: Layer) -> Layer:
    """The pair as one layer to be dealt out: the first one's neurons with the weights that read them."""
    return replace(first, neuron_weights=first.neuron_weights + column_weights(first, second))


def added_up(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """A pair's shards as they are handed over: each the sum of what one device publishes in the same circumstances,
    namely while the same devices (``after``) are down.

    Those that need nobody to be down come first. In any state of the devices, the ones that are published are of
    different neurons.
    """
    neurons: dict[tuple[int, tuple[int, ...], int], list[int]] = {}
    for shard in shards:
        for position, device in enumerate(shard.devices):
            after = tuple(sorted(shard.devices[:position]))
            neurons.setdefault((position, after, device), []).extend(shard.neurons)
    return tuple(
        Shard(tuple(sorted(neurons[position, after, device])), (Holder(device),), after=after)
        for position, after, device in sorted(neurons)
    )


def pair_problem(devices: int, layers: Sequence[Layer], of_first: Sequence[Shard], of_second: Sequence[Shard]) -> str:
    """What is wrong with two layers as a pair, empty if nothing is: ``of_first`` and ``of_second`` are their shards."""
    first, second = layers
    kinds = {holder.representation for shard in (*of_first, *of_second) for holder in shard.holders}
    everywhere = len(of_second) == 1 and sorted(of_second[0].devices) == list(range(devices))
    if second.group > 1 or second.reads_group or not second.filter_weights or second.filter_weights % first.neurons:
        return f"{second.name} does not read all of {first.name}'s {first.neurons} neurons alike"
    if any(shard.parity_of for shard in of_first):
        return f"{first.name} has a sum of shards already"
    if not everywhere:
        return f"{second.name} is not one shard of all devices"
    if kinds != {"float32"}:
        return f"copies of a pair's layers are float32, not {', '.join(sorted(kinds - {'float32'}))}"
    return ""
