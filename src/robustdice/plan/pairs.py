"""A layer and the one layer that reads it, dealt out as a pair: what is exchanged are sums.

A device that holds a neuron of the first layer holds the second layer's weights for it, too, and computes what it adds
to the second layer's neurons. Devices hand each other these partial sums, before the second layer's bias and tail,
which all compute.

Where any copy is coarse, sums are what stands behind the second layer's affine chain, but for its shift: copies have
the chain in their scales then, and float32 copies in their weights. A device has one scale for each neuron of the
second layer and representation, whichever neurons of the first it holds in it; the shift, with the tail, is that of the
copy which everybody is said to hold of the second layer, and is added once.

Sums go to everybody, or, where that would carry too much, to owners: each of these adds up a slice of the second
layer's neurons, computes its tail and hands that to all. Owners need no weights for it, so that every device can be one
of any slice, and who is follows from the devices that are up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations

from robustdice.plan.shards import Holder, Layer, Shard
from robustdice.representation import SHIFT_BYTES, SUM_SHIFT_BYTES, filter_bytes, neuron_bytes


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
    shift = SUM_SHIFT_BYTES if second.affine_weights else 0
    if representation == "float32":
        return 4 * (second.neuron_weights - second.filter_weights - second.affine_weights) + shift
    rest = neuron_bytes(second, representation) - filter_bytes(second.filter_weights, representation)
    return rest + shift - (SHIFT_BYTES if second.affine_weights else 0)


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


def slices(second: Layer, devices: int) -> tuple[Shard, ...]:
    """The second layer's neurons as slices that follow each other, each with the devices in the order in which they own
    it. As even as there are neurons: among up to four devices, whichever are up; among more, while one is down."""
    orders = _orders(devices)
    chosen = sorted(orders[: second.neurons])
    sizes = [(n + 1) * second.neurons // len(chosen) - n * second.neurons // len(chosen) for n in range(len(chosen))]
    ends = [sum(sizes[: n + 1]) for n in range(len(chosen))]
    return tuple(
        Shard(tuple(range(end - size, end)), tuple(map(Holder, order)))
        for order, size, end in zip(chosen, sizes, ends, strict=True)
    )


@cache
def _orders(devices: int) -> tuple[tuple[int, ...], ...]:
    """Orders of devices, of which any few first ones begin with different devices.

    Up to four: of any of the devices, each comes first equally often (the even permutations of four have that
    property). Of more that would take too many: every device is first, and every other one the next, equally often.
    """
    if devices < 4:
        every = list(permutations(range(devices)))
    elif devices == 4:
        every = [
            order
            for order in permutations(range(4))
            if sum(a > b for n, b in enumerate(order) for a in order[:n]) % 2 == 0
        ]
    else:
        pairs = [(first, (first + step) % devices) for first in range(devices) for step in range(1, devices)]
        rings = [[*range(second + 1, devices), *range(second)] for _, second in pairs]
        every = [(*pair, *(d for d in ring if d != pair[0])) for pair, ring in zip(pairs, rings, strict=True)]
    each = len(every) // devices
    in_turn = [[order for order in every if order[0] == device] for device in range(devices)]
    return tuple(in_turn[device][n] for n in range(each) for device in range(devices))


def pair_problem(devices: int, layers: Sequence[Layer], of_first: Sequence[Shard], of_second: Sequence[Shard]) -> str:
    """What is wrong with two layers as a pair, empty if nothing is: ``of_first`` and ``of_second`` are their shards."""
    first, second = layers
    everywhere = len(of_second) == 1 and sorted(of_second[0].devices) == list(range(devices))
    if second.group > 1 or second.reads_group or not second.filter_weights or second.filter_weights % first.neurons:
        return f"{second.name} does not read all of {first.name}'s {first.neurons} neurons alike"
    if any(shard.parity_of for shard in of_first):
        return f"{first.name} has a sum of shards already"
    return "" if everywhere else f"{second.name} is not one shard of all devices"
