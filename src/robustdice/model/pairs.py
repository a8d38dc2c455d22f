"""Which layers can be dealt out together with the one layer that reads them, and where that pays."""

from __future__ import annotations

from collections.abc import Mapping

from robustdice.model.canonical import CONVOLUTIONS
from robustdice.model.network import Network

EXCHANGE = 2**12
"""Activations that take about as long to hand over as an exchange takes beside them: 16 KiB."""
Cost = tuple[int, int]
"""Activations of one image that all devices hand over, and in how many exchanges."""


def possible_pairs(network: Network) -> dict[int, int]:
    """For each layer that one other layer alone reads, and that is no output: that layer, both as positions.

    The second layer reads the end of the first one's tail along the axis that its neurons lie on: an ungrouped
    convolution its channels, a linear layer the last axis. Lost neurons have to be zeros there.
    """
    readers = {layer.node: index for index, layer in enumerate(network.layers)}
    found = {}
    for index, first in enumerate(network.layers):
        reader = next(iter(first.value.users)) if len(first.value.users) == 1 else None
        if reader not in readers or first.value is network.output:
            continue
        second = network.layers[readers[reader]]
        axis = 1 if second.node.target in CONVOLUTIONS.values() else len(first.shape)
        reads = second.node.args[0] is first.value and first.axis == axis and not second.input_channels
        if reads and first.layer.neurons * first.features == first.shape[axis - 1]:
            found[index] = readers[reader]
    return found


def choose_pairs(network: Network, devices: int) -> dict[int, int]:
    """Of :func:`possible_pairs`, those that a plan for so many devices has: no layer is in two of them, and what all
    devices hand over for an image is the least, in as few exchanges as that allows.

    Gathering a layer, devices hand over each of its activations once, and in the next exchange the second layer's. A
    pair has one exchange, in which each device hands over a partial sum of every activation that the second layer has
    before its tail, or two: with owners, those activations once, and then the second layer's. So a pair is made only
    where it carries less than gathering both, or as much in fewer exchanges.
    """
    possible = possible_pairs(network)
    chosen: dict[int, int] = {}
    for start in sorted(possible.keys() - possible.values()):
        chain = [start]
        while chain[-1] in possible:
            chain.append(possible[chain[-1]])
        chosen.update(_best(network, chain, devices))
    return chosen


def choose_owned(network: Network, pairs: Mapping[int, int], devices: int) -> frozenset[int]:
    """The pairs, by their first layers, whose sums are better added up by owners than by everybody: where that saves
    more than the second exchange costs, or all sums to all would carry more than gathering both layers."""
    found = set()
    for pair in pairs.items() if devices > 2 else ():
        first, second = (network.layers[index].layer for index in pair)
        outputs = [layer.neurons * layer.neuron_outputs for layer in (first, second)]
        sums = second.neurons * second.neuron_preactivations
        if devices * sums > sum(outputs) or sums + outputs[1] + EXCHANGE < devices * sums:
            found.add(pair[0])
    return frozenset(found)


def _cost(network: Network, second: int, devices: int) -> Cost:
    """The least that a pair hands over that ends with this layer, all sums to all or with owners."""
    layer = network.layers[second].layer
    sums, outputs = layer.neurons * layer.neuron_preactivations, layer.neurons * layer.neuron_outputs
    options = [(devices * sums, 1)]
    if devices > 2:
        options.append((sums + outputs, 2))
    return min(options)


def _best(network: Network, chain: list[int], devices: int) -> Mapping[int, int]:
    """The cheapest pairs of layers that follow each other."""
    best: list[tuple[Cost, dict[int, int]]] = [((0, 0), {})]
    for number, index in enumerate(chain):
        layer = network.layers[index].layer
        (activations, exchanges), pairs = best[-1]
        options = [((activations + layer.neurons * layer.neuron_outputs, exchanges + 1), pairs)]
        if number:
            (activations, exchanges), pairs = best[-2]
            more, hops = _cost(network, index, devices)
            options.append(((activations + more, exchanges + hops), {**pairs, chain[number - 1]: index}))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]
