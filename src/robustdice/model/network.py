"""A model as robustdice sees it: layers with their tails, and what is computed between them.

This is the one place that reads a model's graph; nothing here knows any architecture by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from robustdice.errors import ModelError, PlanError
from robustdice.markup import html_table
from robustdice.model.beside import check_types, run_beside
from robustdice.model.canonical import (
    CONVOLUTIONS,
    COPY_MARK,
    Shapes,
    arguments,
    aten,
    attribute,
    canonicalise,
    execute,
)
from robustdice.model.channelwise import Channels, ParameterSlice, channelwise, parameter_name
from robustdice.model.outputs import SOFTMAX, flatten_scores, read_output
from robustdice.plan import Layer, ModelReference, Plan

_NOT_INVERTED = {aten.sub.Tensor, aten.div.Tensor}
_AFFINE = {aten.batch_norm.default, aten.add.Tensor, aten.mul.Tensor, *_NOT_INVERTED}

BATCH_ELEMENTS = 1_000_000
"""Largest temporary, in numbers: larger ones cost more in page faults than they save in calls."""

Survivors = Sequence[torch.Tensor]
"""For every layer, which neurons are there: bool[neurons]."""


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


@dataclass(frozen=True)
class Network:
    """A model in the workshop. Made by :func:`build_network`; ``rd.load_model`` makes one from a name or file.

    ``activation`` is what makes probabilities of the class scores: a softmax, or a sigmoid where each class is a
    question of its own. ``shapes`` has the shape of every tensor of the graph, for some batch size; ``per_image`` are
    the tensors whose first axis is the batch; ``shared_parameters`` names the parameters outside of all layers.
    """

    module: fx.GraphModule
    layers: tuple[NetworkLayer, ...]
    input: fx.Node
    output: fx.Node
    input_shape: tuple[int, ...]
    outputs: int
    activation: str
    shapes: Mapping[fx.Node, tuple[int, ...]]
    per_image: frozenset[fx.Node]
    shared_parameters: tuple[str, ...]
    reference: ModelReference

    def __repr__(self) -> str:
        neurons = sum(layer.neurons for layer in self.plan_layers)
        return (
            f"<Network {self.reference.source}: {len(self.layers)} layers, {neurons:,} neurons, {self.parameters:,} "
            f"parameters, input {list(self.input_shape)}, {self.outputs} outputs>"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the layers."""
        rows = [
            [
                escape(layer.layer.name),
                f"{layer.layer.neurons}",
                f"{layer.layer.neurons * layer.layer.neuron_weights:,}",
                f"{layer.layer.neurons * layer.layer.neuron_macs:,}",
                "x".join(map(str, layer.shape)),
            ]
            for layer in self.layers
        ]
        return html_table(["layer", "neurons", "parameters", "multiply-adds", "exchange"], rows, repr(self)[1:-1])

    @property
    def parameters(self) -> int:
        """Number of parameters, those outside of all layers included."""
        return self.shared_weights + sum(layer.neurons * layer.neuron_weights for layer in self.plan_layers)

    @property
    def plan_layers(self) -> tuple[Layer, ...]:
        """The layers as a plan names them."""
        return tuple(layer.layer for layer in self.layers)

    @property
    def shared_weights(self) -> int:
        """Number of parameters outside of all layers."""
        return sum(attribute(self.module, name).numel() for name in self.shared_parameters)

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """How an image becomes an input, and the names of the classes (docs/formats.md)."""
        return self.reference.preprocessing

    @property
    def nodes(self) -> list[fx.Node]:
        """The graph's nodes, in an order in which they can be computed."""
        return list(self.module.graph.nodes)

    @cached_property
    def _constants(self) -> dict[torch.device, dict[fx.Node, torch.Tensor]]:
        return {}

    def constants(self, device: torch.device) -> dict[fx.Node, torch.Tensor]:
        """Every parameter and buffer of the graph, detached and on ``device``: what :func:`execute` starts from."""
        if device not in self._constants:
            self._constants[device] = {
                node: attribute(self.module, str(node.target)).detach().to(device)
                for node in self.nodes
                if node.op == "get_attr"
            }
        return dict(self._constants[device])

    def run(self, images: torch.Tensor, survivors: Survivors | None = None) -> torch.Tensor:
        """Class scores (before any softmax or sigmoid) [batch, outputs] of ``images`` [batch, channels, height, width].

        With ``survivors``, neurons that are not there are filled in at their layer's exchange.
        """
        values: dict[fx.Node, Any] = {**self.constants(images.device), self.input: images}
        exchanges = {} if survivors is None else exchange_masks(self, survivors)
        remaining = {node: len(node.users) for node in self.nodes}
        for node in self.nodes:
            execute(self.module, [node], values)
            if node in exchanges:
                values[node] = exchanges[node](values[node])
            for used in node.all_input_nodes:
                remaining[used] -= 1
                if not remaining[used] and used is not self.output:
                    del values[used]
        result = values[self.output]
        assert isinstance(result, torch.Tensor)
        return result


def on_best_device(images: torch.Tensor) -> torch.Tensor:
    """The images on a GPU when there is one. Always float32: TF32 is off, for nobody has measured what it does to
    rankings. On a CPU channels come last in memory, which every operation then keeps: pooling is ten times faster."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        return images.to("cuda")
    if images.ndim != 4:
        return images
    # With one channel both layouts are the same bytes, and contiguous() would leave the strides that say which it is.
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)


def check_plan_fits(network: Network, plan: Plan) -> None:
    """PlanError unless ``plan`` was made for ``network``."""
    planned, found = plan.model, network.reference
    if planned.digest != found.digest:
        raise PlanError(
            f"the plan was made for {planned.source} (digest {planned.digest[:12]}), "
            f"not for {found.source} (digest {found.digest[:12]}); make a new plan with 'robustdice plan'"
        )
    if plan.layers != network.plan_layers or plan.shared_weights != network.shared_weights:
        raise PlanError(
            f"the plan has other layers than this version finds in {found.source}; "
            "make a new plan with 'robustdice plan'"
        )


def exchange_masks(network: Network, survivors: Survivors) -> dict[fx.Node, Callable[[torch.Tensor], torch.Tensor]]:
    """For the exchanged value of every layer that has lost neurons: the function that fills them in."""
    fills: dict[fx.Node, Callable[[torch.Tensor], torch.Tensor]] = {}
    for layer, alive in zip(network.layers, survivors, strict=True):
        if not bool(alive.all()):
            fills[layer.value] = _Fill(layer.broadcast(~alive), layer.fill)
    return fills


@dataclass(frozen=True)
class _Fill:
    lost: torch.Tensor
    fill: float

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value.masked_fill(self.lost, self.fill)


def build_network(
    program: ExportedProgram,
    source: str,
    preprocessing: Mapping[str, Any] | None = None,
    random_weights_seed: int | None = None,
) -> Network:
    """Find the layers, tails and exchanges of an exported program; ModelError when there is something to refuse.

    The rewritten graph is run beside the program, on other batch sizes too, and must give the same scores.
    """
    module = canonicalise(program)
    graph = module.graph
    source_node = next(node for node in graph.nodes if node.op == "placeholder")
    exported = source_node.meta["val"].shape
    input_shape = tuple(exported[1:])
    if not all(isinstance(size, int) for size in input_shape) or len(input_shape) < 1:
        raise ModelError(
            f"the model takes inputs of shape {tuple(exported)}; all but the batch size must be fixed: "
            "say the size with --size, as in --size 3,224,224, or in the sidecar"
        )
    check_types(module, source_node)
    flatten_scores(module.graph)
    batch = exported[0] if isinstance(exported[0], int) else 2
    example = torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(0))
    shapes, per_image = run_beside(module, program, example)
    output_node, outputs, activation = read_output(module, shapes, preprocessing or {})
    shapes, per_image = {**shapes, output_node: (batch, outputs)}, per_image | {output_node}
    layers, shared = _find_layers(module, shapes, per_image)
    return Network(
        module=module,
        layers=layers,
        input=source_node,
        output=output_node,
        input_shape=input_shape,
        outputs=outputs,
        activation=activation,
        shapes=shapes,
        per_image=per_image,
        shared_parameters=shared,
        reference=ModelReference(source, _digest(module, activation), random_weights_seed, dict(preprocessing or {})),
    )


def _digest(module: fx.GraphModule, activation: str) -> str:
    """SHA-256 (hex) of the graph, all parameters, and what the scores mean where they are not one question."""
    digest = hashlib.sha256(b"" if activation == SOFTMAX else activation.encode())
    for node in module.graph.nodes:
        digest.update(f"{node.op} {node.target} {node.args} {node.kwargs}\n".encode())
        if node.op == "get_attr":
            digest.update(attribute(module, str(node.target)).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _find_layers(
    module: fx.GraphModule, shapes: Shapes, per_image: frozenset[fx.Node]
) -> tuple[tuple[NetworkLayer, ...], tuple[str, ...]]:
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
