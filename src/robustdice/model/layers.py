"""The layers of a graph: where they begin, how far their tails reach, and which parameters are whose."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from robustdice.errors import ModelError
from robustdice.model.canonical import CONVOLUTIONS, COPY_MARK, arguments, aten
from robustdice.model.channelwise import Channels, ParameterSlice, channelwise, parameter_name
from robustdice.model.execute import Shapes, attribute
from robustdice.plan import Layer

_NOT_INVERTED = {aten.sub.Tensor, aten.div.Tensor}
_AFFINE = {aten.batch_norm.default, aten.add.Tensor, aten.mul.Tensor, *_NOT_INVERTED}


@dataclass(frozen=True)
class NetworkLayer:
    """A layer, and where it lies in the graph.

    ``node`` is the convolution or linear node, ``value`` the end of its tail: what is exchanged. ``shape`` is the
    value's shape (without the batch axis), ``own_shape`` that of ``node``; neurons lie along ``axis`` of the value
    (counted with the batch axis), ``features`` entries each. ``fill`` stands in for a lost neuron. ``parameters``
    hold one slice per neuron, ``filters`` names those that count in the scores. ``input_channels`` is 0 when every
    neuron reads the whole input, else the number of input channels that each group of neurons reads. ``affine`` are the
    nodes directly behind ``node`` that scale and shift each neuron by parameters, before anything that is not linear;
    at their end neurons lie along ``affine_axis``.
    """

    layer: Layer
    node: fx.Node
    value: fx.Node
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    axis: int
    features: int
    fill: float
    parameters: tuple[ParameterSlice, ...]
    filters: tuple[str, ...]
    input_channels: int
    affine: tuple[fx.Node, ...] = ()
    affine_axis: int = 1

    @property
    def affine_end(self) -> fx.Node:
        """The value behind the affine chain: where a coarse copy's own output stands, and corrections apply."""
        return self.affine[-1] if self.affine else self.node

    @property
    def own_filter(self) -> str:
        """The name of the layer's own filters, [neurons, ...]."""
        name = parameter_name(arguments(self.node)[1])
        assert name is not None  # else it were no layer
        return name

    @property
    def own_bias(self) -> str | None:
        """The name of the layer's own bias, if it has one."""
        return parameter_name(arguments(self.node, None, None, None)[2])

    @property
    def tail_filter_nodes(self) -> Mapping[fx.Node, str]:
        """The depthwise convolutions in the tail, and the names of their filters."""
        convolutions = set(CONVOLUTIONS.values())
        found, end = {}, self.node
        while end is not self.value:
            end = next(iter(end.users))
            if end.target in convolutions and (name := parameter_name(arguments(end)[1])) is not None:
                found[end] = name
        return found

    @property
    def tail_filters(self) -> tuple[str, ...]:
        """The names of the depthwise filters in the tail."""
        return tuple(self.tail_filter_nodes.values())

    @property
    def without_tail(self) -> NetworkLayer:
        """The layer alone, for exchanging before the tail: its value are the pre-activations."""
        if self.value is self.node:
            return self
        own = {str(argument.target) for argument in self.node.args[1:3] if isinstance(argument, fx.Node)}
        return replace(
            self,
            value=self.node,
            shape=self.own_shape,
            axis=1 if self.node.target in CONVOLUTIONS.values() else len(self.own_shape),
            features=1,
            fill=0.0,
            parameters=tuple(parameter for parameter in self.parameters if parameter.name in own),
            affine=(),
            affine_axis=1 if self.node.target in CONVOLUTIONS.values() else len(self.own_shape),
        )

    def broadcast(self, per_neuron: torch.Tensor) -> torch.Tensor:
        """A tensor [..., neurons] in the shape that combines with the exchanged value [..., batch, ...]."""
        wide = per_neuron.repeat_interleave(self.features, dim=-1)
        behind = len(self.shape) - self.axis
        return wide.reshape(*per_neuron.shape[:-1], *(1,) * self.axis, -1, *(1,) * behind)


def find_layers(
    module: fx.GraphModule, shapes: Shapes, per_image: frozenset[fx.Node]
) -> tuple[tuple[NetworkLayer, ...], tuple[str, ...]]:
    """All layers in the order of the graph, and the names of the parameters outside of them; ModelError without any."""
    layers: list[NetworkLayer] = []
    names: set[str] = set()
    in_tails: set[fx.Node] = set()
    output = module.graph.output_node().args[0]
    for node in module.graph.nodes:
        if node in in_tails or node not in per_image or (start := _layer_start(node, shapes)) is None:
            continue
        value, channels = node, start
        while value is not output and len(value.users) == 1:
            following = next(iter(value.users))
            reached = channelwise(following, channels, shapes)
            if reached is None or (following.args[0] is not value and value not in following.args[:2]):
                break
            value, channels = following, reached
            in_tails.add(following)
        name = _unique_name(re.sub(rf"(\.weight)?({COPY_MARK}\d+)?$", "", str(node.args[1].target), count=1), names)
        layers.append(_network_layer(module, name, node, value, start, channels, shapes, output))
    if not layers:
        raise ModelError(
            "the model has no convolution or linear layer that works image by image: there is nothing to distribute"
        )
    sliced = {parameter.name for layer in layers for parameter in layer.parameters}
    used = {str(node.target): node for node in module.graph.nodes if node.op == "get_attr"}
    shared = tuple(name for name in used if name not in sliced and attribute(module, name).is_floating_point())
    return tuple(layers), shared


def _layer_start(node: fx.Node, shapes: Shapes) -> Channels | None:
    """The neurons of a convolution or linear node, or None when the node is neither."""
    if node.target not in {*CONVOLUTIONS.values(), aten.linear.default}:
        return None
    _, weight, bias, *_ = arguments(node, None, None, None)
    if not parameter_name(weight) or not (bias is None or parameter_name(bias)):
        return None
    neurons = shapes[weight][0]
    axis = 1 if node.target in CONVOLUTIONS.values() else len(shapes[node]) - 1
    own = tuple(name for argument in (weight, bias) if (name := parameter_name(argument)))
    per_filter = math.prod(shapes[weight][1:])
    return Channels(
        neurons=neurons,
        axis=axis,
        features=1,
        parameters=tuple(ParameterSlice(name, 0) for name in own),
        filters=own,
        macs=per_filter * math.prod(shapes[node][1:]) // neurons,
    )


def _unique_name(base: str, taken: set[str]) -> str:
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}#{count}"
    taken.add(name)
    return name


def _network_layer(
    module: fx.GraphModule,
    name: str,
    node: fx.Node,
    value: fx.Node,
    start: Channels,
    channels: Channels,
    shapes: Shapes,
    output: Any,
) -> NetworkLayer:
    """``start`` are the neurons at ``node``, ``channels`` at the end of the tail, ``value``."""
    x, *_, groups = (
        arguments(node, None, None, None, 1, 0, 1, 1) if node.target in CONVOLUTIONS.values() else (node.args[0], 1)
    )
    sliced = [(parameter, attribute(module, parameter.name)) for parameter in channels.parameters]
    weights = sum(
        tensor.numel() // (tensor.shape[parameter.axis] // parameter.features)
        for parameter, tensor in sliced
        if tensor.is_floating_point()  # masks and the like are no weights
    )
    own_weights = sum(math.prod(attribute(module, name).shape[1:]) for name in start.filters)
    shape = shapes[value][1:]
    affine, affine_axis = _affine_chain(
        node, value, start, shapes, {parameter.name for parameter in channels.parameters}
    )
    per_neuron = {
        parameter.name: tensor.numel() // (tensor.shape[parameter.axis] // parameter.features)
        for parameter, tensor in sliced
        if tensor.is_floating_point()
    }
    in_chain = {found for each in affine for argument in each.args if (found := parameter_name(argument))}
    in_chain.update(start.filters[1:])  # the bias
    tail_filters = [name for name in channels.filters if name not in start.filters and attribute(module, name).ndim > 1]
    return NetworkLayer(
        layer=Layer(
            name=name,
            neurons=channels.neurons,
            group=channels.neurons // groups if groups > 1 else 1,
            neuron_weights=weights,
            neuron_macs=channels.macs,
            neuron_outputs=math.prod(shape) // channels.neurons,
            tail_weights=weights - own_weights,
            tail_macs=channels.macs - start.macs,
            neuron_preactivations=math.prod(shapes[node][1:]) // channels.neurons,
            reads_group=groups > 1,
            filter_weights=per_neuron[start.filters[0]],
            affine_weights=sum(per_neuron[name] for name in in_chain & per_neuron.keys()),  # masks are none
            tail_filter_weights=sum(per_neuron[name] for name in tail_filters),
            tail_filters=len(tail_filters),
            gives_scores=value is output,
        ),
        node=node,
        value=value,
        shape=shape,
        own_shape=shapes[node][1:],
        axis=channels.axis,
        features=channels.features,
        fill=-math.inf if value is output else 0.0,
        parameters=channels.parameters,
        filters=channels.filters,
        input_channels=shapes[x][1] // groups if groups > 1 else 0,
        affine=affine,
        affine_axis=affine_axis,
    )


def _affine_chain(
    node: fx.Node, value: fx.Node, channels: Channels, shapes: Shapes, sliced: set[str]
) -> tuple[tuple[fx.Node, ...], int]:
    """The batch norms, sums and products with a parameter behind a layer's ``node``, up to the first other operation,
    and the axis along which neurons lie at their end.

    Reordering axes does not end the chain, but is no part of it.
    """
    chain: list[fx.Node] = []
    axis = channels.axis
    while node is not value:
        node = next(iter(node.users))
        reached = channelwise(node, channels, shapes)
        assert reached is not None  # it is in the tail
        channels = reached
        if node.target in _AFFINE and {name for a in node.args if (name := parameter_name(a))} & sliced:
            if node.target in _NOT_INVERTED and parameter_name(node.args[0]):
                break  # a parameter divided by the value, or less the value
            chain.append(node)
            axis = channels.axis
        elif node.target not in {aten.permute.default, aten.transpose.int}:
            break
    return tuple(chain), axis
