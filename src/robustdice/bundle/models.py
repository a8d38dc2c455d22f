"""A plan's parts as models: what every device computes by itself, and the pieces that compute shards.

They are the same for every device that holds the same; where a device keeps what they take from its weights is settled
when its bundle is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from robustdice.bundle.expected import Expected
from robustdice.bundle.neuron_inputs import (
    filter_name,
    scale_name,
    shift_name,
    with_coarse_filters,
    with_scale_and_shift,
)
from robustdice.bundle.onnx_graph import (
    Array,
    Cut,
    OnnxGraph,
    array_name,
    cut,
    cut_layer,
    cut_parity,
    make_model,
    mask_name,
    with_mask,
)
from robustdice.bundle.stages import StageGraph
from robustdice.bundle.trial import summary
from robustdice.errors import PlanError
from robustdice.model.canonical import arguments
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network
from robustdice.plan import Plan, Shard

UNPACKED_WEIGHTS = 2**18
"""So many weights are unpacked at a time, at most (or one neuron's): 1 MiB. Convolutions would like it larger, linear
layers smaller (docs/results/representations.md)."""

Neurons = NDArray[np.int64]


@dataclass(frozen=True)
class Model:
    """An ONNX file to be written, the bytes of the network's float32 parameters in it, and what else it takes:
    ``affine`` are the layers (their positions) and neurons that it scales and shifts, ``coarse`` the representation of
    the only one's filters, unpacked for ``at_once`` neurons at a time. ``trial`` is a :class:`Part`'s."""

    content: bytes
    weight_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    affine: tuple[tuple[int, Neurons], ...] = ()
    coarse: str | None = None
    at_once: int = 0
    trial: tuple[tuple[float, ...], ...] = ()


class Models:
    """Makes the models of one plan."""

    def __init__(self, network: Network, plan: Plan, graph: OnnxGraph) -> None:
        """``graph`` is the network's export. PlanError for what cannot be built."""
        self.network, self.plan = network, plan
        self.exchanged: dict[int, NetworkLayer] = {}
        """The layers that are exchanged, each up to the value that is handed over."""
        self.coarse_everywhere: dict[int, NetworkLayer] = {}
        """The layers that every device computes from coarse copies."""
        self.corrected = {
            index for of_layers in plan.corrections.values() for index, each in enumerate(of_layers) if each is not None
        }
        for index, layer in enumerate(network.layers):
            if not plan.held_by_all(index):
                self.exchanged[index] = layer.without_tail if plan.exchanged_before_tail(index) else layer
            elif {holder.representation for shard in plan.shards[index] for holder in shard.holders} != {"float32"}:
                self.coarse_everywhere[index] = layer
            if plan.exchanged_before_tail(index):
                if index in self.corrected or any(which == index for which, _ in plan.coarse):
                    raise PlanError(
                        f"layer {layer.layer.name} has sums of shards, so it can have neither coarse copies nor "
                        "corrections; make a plan with another method, or without those"
                    )
                if self.mask(index) is not None:
                    graph = with_mask(graph, layer)
        self._plain = graph
        for index in self.corrected:
            graph = with_scale_and_shift(graph, network.layers[index])
        self._graph = graph
        self._expected = Expected(network, plan, self.exchanged)

    def mask(self, index: int) -> str | None:
        """The name of an exchange's mask: it needs one when a tail follows it."""
        layer = self.network.layers[index]
        return mask_name(layer) if self.exchanged[index].value is not layer.value else None

    def local(self, stage: StageGraph) -> list[Model]:
        """What every device computes in a stage: from values that are there, then the layers of the stage that all hold
        in coarse copies."""
        models = []
        if stage.local_outputs:
            layers = [*self.network.layers]
            masks = [mask_name(each) for k, each in enumerate(layers) if k in self.exchanged and self.mask(k)]
            outputs = [node.name for node in stage.local_outputs]
            given = [name for index in sorted(self.corrected) for name in self._scale_and_shift(index)]
            sources = [node.name for node in stage.local_inputs]
            part = cut(self._graph, [*sources, *masks, *given], outputs)
            read = {name for node in part.nodes for name in node.input}
            inputs = [*sources, *(name for name in masks if name in read)]
            affine = [
                (index, np.arange(layers[index].layer.neurons))
                for index in sorted(self.corrected)
                if scale_name(layers[index]) in read
            ]
            results = [self._expected.value(name) for name in outputs]
            models.append(self._model([part], inputs, outputs, results, affine))
        for index in stage.layers:
            if index in self.coarse_everywhere:
                models.extend(self._whole(index))
        return models

    def _whole(self, index: int) -> list[Model]:
        """A layer that all hold in coarse copies: a model for each representation, and one that puts them together."""
        layer, shards = self.network.layers[index], self.plan.shards[index]
        kinds: dict[str, list[int]] = {}
        for shard in shards:
            kinds.setdefault(shard.holders[0].representation, []).extend(shard.neurons)
        if len(kinds) == 1:
            ((kind, _),) = kinds.items()
            return [self.of_layer(index, np.arange(layer.layer.neurons), kind, "")]
        prefixes = {kind: f"{layer.layer.name}/{kind}/" for kind in kinds}
        models = [self.of_layer(index, np.array(sorted(mine)), kind, prefixes[kind]) for kind, mine in kinds.items()]
        order = np.argsort(np.concatenate([sorted(mine) for mine in kinds.values()]))
        entries = (order[:, None] * layer.features + np.arange(layer.features)).ravel()
        names, value = [prefix + layer.value.name for prefix in prefixes.values()], layer.value.name
        nodes = (
            helper.make_node("Concat", names, [f"{value}/@parts"], axis=layer.axis),
            helper.make_node("Gather", [f"{value}/@parts", f"{value}/@order"], [value], axis=layer.axis),
        )
        together = Cut(nodes, {f"{value}/@order": entries}, frozenset())
        return [*models, self._model([together], names, [value], [self._expected.value(value)])]

    def of_layer(self, index: int, neurons: Neurons, kind: str, prefix: str) -> Model:
        """The model of some neurons of a layer from their copies of one representation."""
        layer = self.network.layers[index]
        source = arguments(layer.node)[0].name
        result = self._expected.of_layer(index, kind, neurons)
        if kind == "float32":
            part = self._cut_layer(index, neurons, prefix)
            affine = [(index, neurons)] if index in self.corrected else []
            return self._model([part], [source], [prefix + layer.value.name], [result], affine)
        graph = with_scale_and_shift(with_coarse_filters(self._plain, layer), layer)
        given = [*self._scale_and_shift(index), *(filter_name(node) for node in (layer.node, *layer.tail_filter_nodes))]
        part = cut_layer(graph, layer, neurons, prefix, given)
        model = self._model([part], [source], [prefix + layer.value.name], [result], [(index, neurons)], given[2:])
        at_once = len(neurons)
        grouped = any(a.name == "group" and a.i > 1 for node in part.nodes for a in node.attribute)
        sliced = {prefix + array_name(parameter.name) for parameter in layer.parameters} & part.arrays.keys()
        if not (grouped or sliced or layer.input_channels):  # else the model is one of just these neurons
            blocks = -(-len(neurons) * layer.layer.filter_weights // UNPACKED_WEIGHTS)
            at_once = max(1, -(-len(neurons) // blocks))
        return replace(model, coarse=kind, at_once=at_once)

    def piece(self, shards: Sequence[tuple[int, int]]) -> Model:
        """The model of (layer, shard) pairs that are kept in float32: an output for each layer."""
        cuts: list[Cut] = []
        outputs: list[str] = []
        inputs: dict[str, None] = {}
        affine, results = [], []
        for index in sorted({layer for layer, _ in shards}):
            layer, of_layer = self.exchanged[index], self.plan.shards[index]
            mine = [of_layer[number] for which, number in shards if which == index]
            prefix = f"{layer.layer.name}/"
            if mine[0].parity_of:  # then it is the only one of this layer here
                members = [np.array(of_layer[member].neurons) for member in mine[0].parity_of]
                cuts.append(cut_parity(self._graph, layer, members, prefix))
                results.append(self._expected.of_sum(index, members))
            else:
                neurons = neurons_of(mine)
                cuts.append(self._cut_layer(index, neurons, prefix))
                affine += [(index, neurons)] if index in self.corrected else []
                results.append(self._expected.of_layer(index, "float32", neurons))
            outputs.append(prefix + layer.value.name)
            inputs[arguments(layer.node)[0].name] = None
        return self._model(cuts, list(inputs), outputs, results, affine)

    def _cut_layer(self, index: int, neurons: Neurons, prefix: str) -> Cut:
        layer = self.exchanged.get(index, self.network.layers[index])
        given = self._scale_and_shift(index) if index in self.corrected else []
        return cut_layer(self._graph, layer, neurons, prefix, given)

    def _scale_and_shift(self, index: int) -> list[str]:
        layer = self.network.layers[index]
        return [scale_name(layer), shift_name(layer)]

    def _model(
        self,
        cuts: Sequence[Cut],
        inputs: Sequence[str],
        outputs: Sequence[str],
        results: Sequence[Array],
        affine: Sequence[tuple[int, Neurons]] = (),
        filters: Sequence[str] = (),
    ) -> Model:
        given = [name for index, _ in affine for name in self._scale_and_shift(index)]
        content = make_model(cuts, [*inputs, *given, *filters], outputs, self._graph.opset, self._graph.types)
        weight_bytes = sum(part.weight_bytes for part in cuts)
        trial = tuple(map(summary, results)) if all(np.isfinite(result).all() for result in results) else ()
        return Model(content, weight_bytes, tuple(inputs), tuple(outputs), tuple(affine), trial=trial)


def neurons_of(shards: Sequence[Shard]) -> Neurons:
    """The shards' neurons, one shard after the other."""
    return np.array([neuron for shard in shards for neuron in shard.neurons])


def merged(stages: Sequence[StageGraph], exchanged: Mapping[int, NetworkLayer]) -> list[list[StageGraph]]:
    """Stages that follow each other without an exchange, together."""
    groups: list[list[StageGraph]] = [[]]
    for stage in stages:
        groups[-1].append(stage)
        if any(index in exchanged for index in stage.layers):
            groups.append([])
    return groups if groups[-1] else groups[:-1]
