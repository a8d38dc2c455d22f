"""Removal divergence (s3) as it is defined: the network runs again for every unit that is removed.

It runs from the unit's layer on only, many removals share a batch, and an image to which a unit has nothing to say (all
zeros at the exchange) is left out: there the divergence is zero. The next layer has only the unit's channels to look
at: what it gives changes by what it makes of their change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.importance.divergence import class_removal, jensen_shannon
from robustdice.importance.gradients import per_unit, units_of
from robustdice.model.canonical import CONVOLUTIONS, arguments, aten
from robustdice.model.channelwise import Channels, channelwise, parameter_name
from robustdice.model.execute import execute, readers
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import BATCH_ELEMENTS, Network
from robustdice.progress import Progress, silent

_BINARY = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def removal_divergences(
    network: Network, images: torch.Tensor, index: int, units: range | None = None, *, on_progress: Progress = silent
) -> NDArray[np.float64]:
    """s3 of ``units`` (all) of layer ``index``: the Jensen-Shannon divergence (natural logarithm) between the output
    distribution and the one without the unit, mean over ``images`` [n, channels, height, width]: float64 [units].
    """
    layer = network.layers[index]
    units = range(units_of(layer)) if units is None else units
    sums = torch.zeros(units_of(layer), dtype=torch.float64)
    suffix = nodes_after(network, layer.value)
    reached = _reached(network, layer)
    done = 0
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
                if not len(pairs):  # a part in which no unit says anything
                    continue
                lost, image = pairs.T
                removed = _run_without(network, layer, suffix, reached, values, lost, image)
                divergence = jensen_shannon(intact[image], removed.double().softmax(1))
                sums.index_add_(0, lost.cpu(), divergence.cpu())
                done += len(pairs)
                on_progress(done, len(units) * len(images))
    return sums[units.start : units.stop].numpy() / len(images)


def removal_macs(network: Network, index: int) -> int:
    """Multiply-adds that one removal from layer ``index`` costs for one image: those of the layers after it."""
    after = set(nodes_after(network, network.layers[index].value))
    return sum(layer.layer.neurons * layer.layer.neuron_macs for layer in network.layers if layer.node in after)


def _run_without(
    network: Network,
    layer: NetworkLayer,
    suffix: Sequence[fx.Node],
    reached: Mapping[fx.Node, Channels],
    intact: dict[fx.Node, Any],
    units: torch.Tensor,
    images: torch.Tensor,
) -> torch.Tensor:
    """Class scores [pairs, outputs] of each pair's image (a position in the batch) when its unit is lost."""
    every = torch.arange(units_of(layer), device=units.device)
    lost = (units[:, None] == every).repeat_interleave(layer.layer.group, dim=1)
    # The mask has an axis for the batch, between those for the pairs and for the neurons.
    altered = take(intact[layer.value], images).masked_fill(layer.broadcast(lost).squeeze(1), layer.fill)
    changed = _Overlay(network, intact, {layer.value: altered}, images)
    remaining = readers(suffix)
    for node in suffix:
        if _has_one_input_of(node, reached, network.shapes):
            channels = reached[node.args[0]]  # type: ignore[index]
            changed[node] = _updated(node, channels, layer.layer.group, changed, intact, units, images)
        else:
            execute(network.module, [node], changed)
        for used in node.all_input_nodes:
            remaining[used] -= 1
            if not remaining[used] and used is not network.output:
                changed.pop(used, None)
    result = changed[network.output]
    assert isinstance(result, torch.Tensor)
    return result


def _reached(network: Network, layer: NetworkLayer) -> dict[fx.Node, Channels]:
    """The layer's value and what follows from it channel by channel, so that a lost unit changes its channels only, and
    where these lie in each. Whatever else such a node reads does not depend on the layer."""
    shapes = network.shapes
    reached = {layer.value: Channels(layer.layer.neurons, layer.axis, layer.features, (), (), 0)}
    dependent = {layer.value}
    for node in network.nodes:
        changing = [used for used in node.all_input_nodes if used in dependent]
        if not changing:
            continue
        dependent.add(node)
        if not reached.keys() >= set(changing) or node not in shapes:
            continue
        before = [reached[used] for used in changing]
        alike = before.count(before[0]) == len(before)
        if alike and node.target in _BINARY and all(shapes.get(u) == shapes[node] for u in node.all_input_nodes):
            reached[node] = before[0]
        elif len(changing) == 1 and (after := channelwise(node, before[0], shapes)) is not None:
            reached[node] = after
    return reached


def _has_one_input_of(
    node: fx.Node, reached: Mapping[fx.Node, Channels], shapes: Mapping[fx.Node, tuple[int, ...]]
) -> bool:
    """Whether the node is a convolution or linear layer over the channels of one of ``reached``."""
    if node in reached or len(node.args) < 2 or node.args[0] not in reached or not parameter_name(node.args[1]):
        return False
    axis = reached[node.args[0]].axis  # type: ignore[index]
    if node.target is aten.linear.default:
        return axis == len(shapes[node.args[0]]) - 1  # type: ignore[index]
    *_, groups = arguments(node, None, None, None, 1, 0, 1, 1)
    return node.target in CONVOLUTIONS.values() and groups == 1 and axis == 1


def _updated(
    node: fx.Node,
    channels: Channels,
    group: int,
    changed: dict[fx.Node, Any],
    intact: dict[fx.Node, Any],
    units: torch.Tensor,
    images: torch.Tensor,
) -> torch.Tensor:
    """What a layer gives for each pair: what it gave, plus what it makes of the change in the unit's channels."""
    x, weight, _, *rest = arguments(node, None, None, None)
    function: Any = node.target
    result = take(intact[node], images)
    width = group * channels.features
    before, after = intact[x].movedim(channels.axis, 1), changed[x].movedim(channels.axis, 1)
    start = 0
    for unit, count in zip(
        *(found.tolist() for found in torch.unique_consecutive(units, return_counts=True)), strict=True
    ):
        here, mine = slice(start, start + count), slice(unit * width, (unit + 1) * width)
        change = after[here, mine] - before[images[here], mine]
        result[here] += function(change.movedim(1, channels.axis), intact[weight][:, mine], None, *rest)
        start += count
    return result


def take(value: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The rows of a value that belong to ``images``, in the value's layout (which index_select alone forgets)."""
    if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return value.permute(0, 2, 3, 1).index_select(0, images).permute(0, 3, 1, 2)
    return value.index_select(0, images)


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
            value = take(value, self._images)
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
