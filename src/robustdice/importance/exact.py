"""Removal divergence (s3) as it is defined: the network runs again for every unit that is removed.

It runs from the unit's layer on only, many removals share a batch, and an image to which a unit has nothing to say (all
zeros at the exchange) is left out: there the divergence is zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.importance.gradients import class_removal, per_unit, units_of
from robustdice.model.canonical import execute
from robustdice.model.network import Network, NetworkLayer

BATCH_ELEMENTS = 1_000_000
"""Largest temporary, in numbers: larger ones cost more in page faults than they save in calls."""


def removal_divergences(
    network: Network, images: torch.Tensor, index: int, units: range | None = None
) -> NDArray[np.float64]:
    """s3 of ``units`` (all) of layer ``index``: the Jensen-Shannon divergence (natural logarithm) between the output
    distribution and the one without the unit, mean over ``images`` [n, channels, height, width]: float64 [units].
    """
    layer = network.layers[index]
    units = range(units_of(layer)) if units is None else units
    sums = torch.zeros(units_of(layer), dtype=torch.float64)
    suffix = nodes_after(network, layer.value)
    with torch.no_grad():
        for part in torch.split(images, rows_at_once(network, network.nodes)):
            values: dict[fx.Node, Any] = {**network.constants(images.device), network.input: part}
            execute(network.module, network.nodes, values)
            intact = values[network.output].double().softmax(1)
            if math.isinf(layer.fill):
                sums += class_removal(per_unit(layer, intact)).sum(0).cpu()
                continue
            speaks = per_unit(layer, values[layer.value].ne(0)).bool()
            speaks[:, : units.start] = speaks[:, units.stop :] = False
            rows = rows_at_once(network, [layer.value, *suffix])
            for pairs in torch.split(speaks.T.nonzero(), rows):
                lost, image = pairs.T
                removed = _run_without(network, layer, suffix, values, lost, image)
                divergence = jensen_shannon(intact[image], removed.double().softmax(1))
                sums.index_add_(0, lost.cpu(), divergence.cpu())
    return sums[units.start : units.stop].numpy() / len(images)


def removal_macs(network: Network, index: int) -> int:
    """Multiply-adds that one removal from layer ``index`` costs for one image: those of the layers after it."""
    after = set(nodes_after(network, network.layers[index].value))
    return sum(layer.layer.neurons * layer.layer.neuron_macs for layer in network.layers if layer.node in after)


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence (natural logarithm) of distributions over the last axis."""
    middle = (p + q) / 2
    divergence = torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)
    return divergence.nan_to_num(0.0).sum(-1).clamp_min(0) / 2


def _run_without(
    network: Network,
    layer: NetworkLayer,
    suffix: Sequence[fx.Node],
    intact: dict[fx.Node, Any],
    units: torch.Tensor,
    images: torch.Tensor,
) -> torch.Tensor:
    """Class scores [pairs, outputs] of each pair's image (a position in the batch) when its unit is lost."""
    every = torch.arange(units_of(layer), device=units.device)
    lost = (units[:, None] == every).repeat_interleave(layer.layer.group, dim=1)
    # The mask has an axis for the batch, between those for the pairs and for the neurons.
    altered = intact[layer.value].index_select(0, images).masked_fill(layer.broadcast(lost).squeeze(1), layer.fill)
    changed = _Overlay(network, intact, {layer.value: altered}, images)
    remaining = Counter(used for node in suffix for used in node.all_input_nodes)
    for node in suffix:
        execute(network.module, [node], changed)
        for used in node.all_input_nodes:
            remaining[used] -= 1
            if not remaining[used] and used is not network.output:
                changed.pop(used, None)
    result = changed[network.output]
    assert isinstance(result, torch.Tensor)
    return result


class _Overlay(dict[fx.Node, Any]):
    """Values of a batch of pairs; what no removal changes is taken from the intact run's images when it is read."""

    def __init__(
        self, network: Network, intact: dict[fx.Node, Any], changed: dict[fx.Node, Any], images: torch.Tensor
    ) -> None:
        super().__init__(changed)
        self._per_image = network.per_image
        self._intact = intact
        self._images = images

    def __missing__(self, node: fx.Node) -> Any:
        value = self._intact[node]
        if node in self._per_image:
            value = value.index_select(0, self._images)
        self[node] = value
        return value


def nodes_after(network: Network, value: fx.Node) -> list[fx.Node]:
    """The nodes to run again when ``value`` changes, in order: those that depend on it, and whatever else they
    read that depends on the batch but cannot be repeated along it (sizes, tensors with the batch on another axis)."""
    dependent, of_input = {value}, {network.input}
    for node in network.nodes:
        if node.op == "call_function":
            if not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
            if not of_input.isdisjoint(node.all_input_nodes):
                of_input.add(node)
    chosen: set[fx.Node] = set()
    pending = list(dependent - {value})
    while pending:
        node = pending.pop()
        chosen.add(node)
        pending.extend(
            used
            for used in node.all_input_nodes
            if used in of_input and used not in chosen and used not in dependent and used not in network.per_image
        )
    return [node for node in network.nodes if node in chosen]


def rows_at_once(network: Network, nodes: Sequence[fx.Node]) -> int:
    """How many images (or copies of one) keep every temporary below the limit."""
    sizes = [
        int(np.prod(network.shapes[node][1:])) for node in nodes if node in network.shapes and node.op != "get_attr"
    ]
    return max(1, BATCH_ELEMENTS // max(1, *sizes))
