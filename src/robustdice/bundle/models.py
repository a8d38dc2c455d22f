"""A plan's parts as models: what every device computes by itself, and the pieces that compute shards.

They are the same for every device that holds the same; where a device keeps what they take from its weights is settled
when its bundle is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from onnx import helper

from robustdice.bundle.copies import Copies
from robustdice.bundle.expected import Expected
from robustdice.bundle.integer_graph import with_signed_codes
from robustdice.bundle.model import Model, Neurons, Taken, neurons_of
from robustdice.bundle.neuron_inputs import scale_name, with_scale_and_shift
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
    weights_apart,
    with_mask,
)
from robustdice.bundle.pair_graph import (
    cut_coarse_second,
    cut_second,
    with_folded_filters,
    with_folded_sums,
    with_sums,
)
from robustdice.bundle.parts import STRIPS, Work
from robustdice.bundle.stages import StageGraph, tensors_used
from robustdice.bundle.strip_graph import cut_strip
from robustdice.bundle.trial import summary
from robustdice.errors import PlanError
from robustdice.model.canonical import arguments
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network
from robustdice.model.strips import ROWS, Region, region_of
from robustdice.plan import Plan, column_weights
from robustdice.rounding.affine import fold

UNPACKED_WEIGHTS = 2**18
"""So many weights are unpacked at a time, at most (or one neuron's): 1 MiB. Convolutions would like it larger, linear
layers smaller (docs/results/representations.md)."""

APART_BYTES = 2**20
"""What multiplies single vectors reads each weight once: in the file, where it lies, if these are as many. ONNX Runtime
holds what is in a model several times while it loads it, and packs it for matrices, which takes vectors a fifth more
time."""


@dataclass(frozen=True)
class _Local:
    """What every device computes: the values ``outputs`` from ``inputs``, with a layer that all hold in coarse copies
    or without one, and so many weights in memory while it is computed."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: int | None
    weights: int


class Models:
    """Makes the models of one plan."""

    def __init__(self, network: Network, plan: Plan, graph: OnnxGraph) -> None:
        """``graph`` is the network's export. PlanError for what cannot be built."""
        self.network, self.plan, self._copies = network, plan, Copies(network, plan)
        self.exchanged: dict[int, NetworkLayer] = {}
        """The layers that are exchanged, each up to the value that is handed over; of a run, the last one."""
        self.regions = {run.layers[-1]: region_of(network, run.layers) for run in plan.strips}
        """What is computed in strips, by the last layer."""
        self.coarse_everywhere: dict[int, NetworkLayer] = {}
        """The layers that every device computes from coarse copies."""
        self.corrected = {
            index for of_layers in plan.corrections.values() for index, each in enumerate(of_layers) if each is not None
        }
        for index, layer in enumerate(network.layers):
            if plan.owned_first(index) is not None:
                self.exchanged[index] = layer
            elif not plan.held_by_all(index):
                self.exchanged[index] = layer.without_tail if plan.exchanged_before_tail(index) else layer
            elif index in self.regions:
                self.exchanged[index] = _handed_over(network, layer, self.regions[index])
            elif index not in plan.pairs.values() and plan.copies(())[index].any():
                self.coarse_everywhere[index] = layer
            if plan.exchanged_before_tail(index):
                if index in self.corrected or any(which == index for which, _ in plan.coarse):
                    raise PlanError(
                        f"layer {layer.layer.name} has sums of shards, so it can have neither coarse copies nor "
                        "corrections; make a plan with another method, or without those"
                    )
                if self.mask(index) is not None:
                    graph = with_mask(graph, layer)
        self._exported = graph
        self._added: dict[int, Taken] = {}
        """The second layers of pairs with coarse copies, and what a model takes that goes on from their sums."""
        for first, second in plan.pairs.items():
            layers = network.layers[first], network.layers[second]
            if plan.is_coarse_pair(first):
                neurons, (holder, *_) = np.arange(plan.layers[second].neurons), plan.shards[second][0].holders
                kind = holder.representation
                self._added[second] = Taken(second, neurons, kind, at_once=len(neurons), pair="second")
                graph = with_folded_sums(graph, *layers, coarse=kind != "float32")
            else:
                graph = with_sums(graph, *layers)
        self._plain = graph
        for index in self.corrected - self._added.keys():
            graph = with_scale_and_shift(graph, network.layers[index])
        self._graph = graph
        self._expected = Expected(network, plan, self.exchanged, self.regions)

    def mask(self, index: int) -> str | None:
        """The name of an exchange's mask: it needs one when a tail follows it."""
        layer = self.network.layers[index]
        before_tail = index not in self.regions and self.exchanged[index].value is not layer.value
        return mask_name(layer) if before_tail else None

    def locals(self, stages: Sequence[StageGraph], name: str) -> list[Model]:
        """What every device computes between two exchanges, in order. What fits into memory together is one model: each
        takes a third of a megabyte, and some time, whatever it computes. Files of weights have names of their own that
        begin with ``name``."""
        every = [local for stage in stages for local in self._locals(stage)]
        apart = (f"{name}-{number}.bin" for number in count())
        models: list[Model] = []
        at = 0
        while at < len(every):
            end = at + 1
            while end < len(every) and sum(local.weights for local in every[at : end + 1]) <= UNPACKED_WEIGHTS:
                end += 1
            index = every[at].layer
            if end == at + 1 and index is not None:
                models.extend(self._whole(index, apart))
            else:
                needed = {name for local in every[end:] for name in local.inputs} | self._needed_after(stages)
                models.append(self._together(every[at:end], needed, next(apart)))
            at = end
        return models

    def _locals(self, stage: StageGraph) -> list[_Local]:
        found = []
        if stage.local_outputs:
            sources, outputs = ([node.name for node in nodes] for nodes in (stage.local_inputs, stage.local_outputs))
            weights = sum(each.arrays[name].size for each in [self._cut(sources, outputs)] for name in each.weights)
            found.append(_Local(tuple(sources), tuple(outputs), None, weights))
        for index in stage.layers:
            if index in self.coarse_everywhere:
                layer = self.network.layers[index]
                kinds = {shard.holders[0].representation for shard in self.plan.shards[index]}
                weights = layer.layer.neurons * (layer.layer.filter_weights + layer.layer.tail_filter_weights)
                if len(kinds) > 1:
                    weights = UNPACKED_WEIGHTS + 1  # several models
                elif self._copies.stay_packed(index, min(kinds)):
                    weights = 0  # they stay packed
                found.append(_Local((arguments(layer.node)[0].name,), (layer.value.name,), index, weights))
        return found

    def _needed_after(self, stages: Sequence[StageGraph]) -> set[str]:
        """The values that pieces of the last of these stages, or other ones behind it, read."""
        needed = {node.name for node in stages[-1].keep} | {self.network.output.name}
        exchanged = [self.exchanged[index] for index in stages[-1].layers if index in self.exchanged]
        return needed | {used.name for layer in exchanged for used in tensors_used(self.network, layer.node)}

    def _together(self, parts: Sequence[_Local], needed: set[str], apart: str) -> Model:
        """Parts that follow each other as one model that gives those of their values that are ``needed`` behind."""
        graph, taken = self._plain, {}
        for index in (part.layer for part in parts if part.layer is not None):
            kind = self.plan.shards[index][0].holders[0].representation
            graph, taken[index] = self._copies.put_into(graph, index, np.arange(self.plan.layers[index].neurons), kind)
        for index in self.corrected - taken.keys() - self._added.keys():
            graph = with_scale_and_shift(graph, self.network.layers[index])
        outputs = [name for part in parts for name in part.outputs if name in needed]
        made = {name for part in parts for name in part.outputs}
        sources = list(dict.fromkeys(name for part in parts for name in part.inputs if name not in made))
        filters = [name for index, each in taken.items() for name in self._copies.filters(each)]
        part = self._cut([*sources, *filters], outputs, graph, taken)
        read = {name for node in part.nodes for name in node.input}
        masks = [mask_name(self.network.layers[index]) for index in self.exchanged if self.mask(index)]
        taken |= self._added
        used = [
            taken.get(index, Taken(index, np.arange(self.plan.layers[index].neurons)))
            for index in sorted(self.corrected | taken.keys())
            if scale_name(self.network.layers[index]) in read
        ]
        results = [self._expected.value(name) for name in outputs]
        computed = {name for node in part.nodes for name in node.output}
        work = [
            self._work(index, layer.neurons, self.plan.shards[index][0].holders[0].representation)
            for index, layer in enumerate(self.plan.layers)
            if self.plan.split(index) == "whole" and self.network.layers[index].node.name in computed
        ]
        inputs = [*sources, *(name for name in masks if name in read)]
        return self._model([part], inputs, outputs, results, used, _shared(part, apart), work)

    def _work(self, index: int, neurons: int, kind: str = "float32") -> Work:
        exact = "float32" if index in self.plan.activations else kind
        return Work(index, neurons / self.plan.layers[index].neurons, exact)

    def _cut(
        self, sources: Sequence[str], outputs: Sequence[str], graph: OnnxGraph | None = None, more: Iterable[int] = ()
    ) -> Cut:
        masks = [mask_name(self.network.layers[index]) for index in self.exchanged if self.mask(index)]
        given = [
            name for index in {*self.corrected, *self._added, *more} for name in self._copies.scale_and_shift(index)
        ]
        given += [name for taken in self._added.values() for name in self._copies.filters(taken)]
        return cut(graph or self._graph, [*sources, *masks, *given], outputs)

    def _whole(self, index: int, apart: Iterator[str]) -> list[Model]:
        """A layer that all hold in coarse copies: a model for each representation, and one that puts them together."""
        layer, shards = self.network.layers[index], self.plan.shards[index]
        kinds: dict[str, list[int]] = {}
        for shard in shards:
            kinds.setdefault(shard.holders[0].representation, []).extend(shard.neurons)
        if len(kinds) == 1:
            ((kind, _),) = kinds.items()
            return [self.of_layer(index, np.arange(layer.layer.neurons), kind, "", next(apart))]
        prefixes = {kind: f"{layer.layer.name}/{kind}/" for kind in kinds}
        models = [
            self.of_layer(index, np.array(sorted(mine)), kind, prefixes[kind], next(apart))
            for kind, mine in kinds.items()
        ]
        order = np.argsort(np.concatenate([sorted(mine) for mine in kinds.values()]))
        entries = (order[:, None] * layer.features + np.arange(layer.features)).ravel()
        names, value = [prefix + layer.value.name for prefix in prefixes.values()], layer.value.name
        nodes = (
            helper.make_node("Concat", names, [f"{value}/@parts"], axis=layer.axis),
            helper.make_node("Gather", [f"{value}/@parts", f"{value}/@order"], [value], axis=layer.axis),
        )
        together = Cut(nodes, {f"{value}/@order": entries}, frozenset())
        return [*models, self._model([together], names, [value], [self._expected.value(value)])]

    def of_layer(self, index: int, neurons: Neurons, kind: str, prefix: str, apart: str) -> Model:
        """The model of some neurons of a layer from their copies of one representation. ``apart`` is where its weights
        are, if there are two forms of it."""
        layer = self.network.layers[index]
        source = arguments(layer.node)[0].name
        result, work = self._expected.of_layer(index, kind, neurons), self._work(index, len(neurons), kind)
        if kind == "float32":
            part = self._cut_layer(index, neurons, prefix)
            taken = [Taken(index, neurons)] if index in self.corrected else []
            return self._model([part], [source], [prefix + layer.value.name], [result], taken, work=[work])
        graph, whole = self._copies.put_into(self._plain, index, neurons, kind)
        part, whole = self._in_blocks(graph, whole, prefix, layer.layer.filter_weights)
        outputs, shared = [prefix + layer.value.name], _shared(part, apart)
        return self._model([part], [source], outputs, [result], [whole], shared, [work])

    def of_pair(self, index: int, neurons: Neurons, kind: str, prefix: str) -> Model:
        """The model of what coarse copies of some neurons of a pair's first layer add to the second one."""
        which = self.plan.pairs[index]
        first, second = self.network.layers[index], self.network.layers[which]
        graph, whole = self._copies.put_into(self._plain, index, neurons, kind, packed=False)
        per_neuron = first.layer.filter_weights + column_weights(first.layer, second.layer)
        part, whole = self._in_blocks(graph, replace(whole, pair="first"), prefix, per_neuron)
        behind = cut_coarse_second(self._exported, first, second, prefix)
        scales = Taken(which, np.arange(second.layer.neurons), kind, second.layer.neurons, pair="scales")
        source, result = arguments(first.node)[0].name, self._expected.of_pair(index, kind, neurons)
        work = self._work(index, len(neurons), kind)
        both, outputs = [work, replace(work, layer=which)], [prefix + second.node.name]
        return self._model([part, behind], [source], outputs, [result], [whole, scales], work=both)

    def _in_blocks(self, graph: OnnxGraph, whole: Taken, prefix: str, per_neuron: int) -> tuple[Cut, Taken]:
        """The part of a graph with coarse copies of a layer, computed as few neurons at a time as ``per_neuron``
        weights of each allow, where that is possible."""
        layer, neurons = self.network.layers[whole.layer], whole.neurons
        part = cut_layer(
            graph, layer, neurons, prefix, [*self._copies.scale_and_shift(whole.layer), *self._copies.filters(whole)]
        )
        grouped = any(a.name == "group" and a.i > 1 for node in part.nodes for a in node.attribute)
        sliced = {prefix + array_name(parameter.name) for parameter in layer.parameters} & part.arrays.keys()
        just_these = grouped or sliced or layer.input_channels  # the model has something of each of its neurons
        if whole.inside or just_these:
            return part, whole
        blocks = -(-len(neurons) * per_neuron // UNPACKED_WEIGHTS)
        return part, replace(whole, at_once=max(1, -(-len(neurons) // blocks)))

    def piece(self, shards: Sequence[tuple[int, int]], apart: str) -> Model:
        """The model of (layer, shard) pairs that are kept in float32: an output for each layer. ``apart`` is where its
        weights are, if they are worth a file of their own."""
        cuts: list[Cut] = []
        outputs: list[str] = []
        inputs: dict[str, None] = {}
        taken, results, work = [], [], list[Work]()
        for index in sorted({layer for layer, _ in shards}):
            layer, of_layer = self.exchanged[index], self.plan.exchanged_shards(index)
            mine = [of_layer[number] for which, number in shards if which == index]
            prefix = f"{layer.layer.name}/"
            if mine[0].parity_of:  # then it is the only one of this layer here
                members = [np.array(of_layer[member].neurons) for member in mine[0].parity_of]
                cuts.append(cut_parity(self._graph, layer, members, prefix))
                results.append(self._expected.of_sum(index, members))
                work.append(self._work(index, max(map(len, members))))
            else:
                neurons = neurons_of(mine[:1] if index in self.plan.pairs else mine)
                cuts.append(self._cut_layer(index, neurons, prefix))
                taken += [Taken(index, neurons)] if index in self.corrected else []
                results.append(self._expected.of_layer(index, "float32", neurons))
                work.append(self._work(index, len(neurons)))
            if index in self.plan.pairs:
                second, graph = self.network.layers[self.plan.pairs[index]], self._exported
                if self.plan.is_coarse_pair(index):
                    graph = with_folded_filters(graph, second, fold(self.network, second).filters.numpy())
                cuts.append(cut_second(graph, layer, second, neurons, prefix))
                results[-1] = self._expected.of_pair(index, "float32", neurons)
                work.append(replace(work[-1], layer=self.plan.pairs[index]))
                layer = second.without_tail
            outputs.append(prefix + layer.value.name)
            inputs[arguments(self.network.layers[index].node)[0].name] = None
        sources = (arguments(self.network.layers[index].node)[0] for index, _ in shards)
        of_vectors = all(len(self.network.shapes[source]) == 2 for source in sources)
        worth_it = of_vectors and sum(part.weight_bytes for part in cuts) >= APART_BYTES
        return self._model(cuts, list(inputs), outputs, results, taken, apart if worth_it else None, work)

    def owner(self, index: int) -> Model:
        """The model that computes a pair's second layer from its sums, all of it whoever owns what."""
        layer, neurons = self.network.layers[index], np.arange(self.plan.layers[index].neurons)
        prefix = f"{layer.layer.name}/"
        taken = [self._added.get(index, Taken(index, neurons))] if index in self.corrected | self._added.keys() else []
        given = [name for each in taken for name in (*self._copies.scale_and_shift(index), *self._copies.filters(each))]
        part = cut_layer(self._graph, layer, neurons, prefix, given)
        result = self._expected.of_layer(index, "float32", neurons)
        source = arguments(layer.node)[0].name
        return self._model([part], [source], [prefix + layer.value.name], [result], taken)

    def strips(self, index: int, numbers: Sequence[int]) -> Model:
        """The model of strips that follow each other, of the run that ends with a layer. Its weights are apart."""
        run, region = self.plan.run_of(index), self.regions[index]
        assert run is not None  # else there were no region
        rows = run.bounds[numbers[0]], run.bounds[numbers[-1] + 1]
        prefix = f"{self.plan.layers[index].name}/"
        taken = [Taken(i, np.arange(self.plan.layers[i].neurons)) for i in run.layers if i in self.corrected]
        given = [name for each in taken for name in self._copies.scale_and_shift(each.layer)]
        part = cut_strip(self._graph, self.network, region, rows, prefix, given)
        result = self._expected.of_strip(index, rows)
        work = [Work(i, min(1.0, sum(run.shares(i)[number] for number in numbers))) for i in run.layers]
        outputs, apart = [prefix + region.end.name], f"{STRIPS}{index:03d}.bin"
        return self._model([part], [region.source.name], outputs, [result], taken, apart, work)

    def _cut_layer(self, index: int, neurons: Neurons, prefix: str) -> Cut:
        layer = self.exchanged.get(index, self.network.layers[index])
        given = self._copies.scale_and_shift(index) if index in self.corrected else []
        return cut_layer(self._graph, layer, neurons, prefix, given)

    @property
    def opset(self) -> int:
        """The version of ONNX's operators that the models are written in."""
        return self._graph.opset

    def _model(
        self,
        cuts: Sequence[Cut],
        inputs: Sequence[str],
        outputs: Sequence[str],
        results: Sequence[Array],
        layers: Sequence[Taken] = (),
        apart: str | None = None,
        work: Sequence[Work] = (),
    ) -> Model:
        given = [
            name for each in layers for name in (*self._copies.scale_and_shift(each.layer), *self._copies.filters(each))
        ]
        every, graph = [*inputs, *given], self._graph
        content, signed = (
            make_model(form, every, outputs, graph.opset, graph.types, apart) if form else b""
            for form in (cuts, with_signed_codes(cuts))
        )
        weight_bytes = 0 if apart else sum(part.weight_bytes for part in cuts)
        trial = tuple(map(summary, results)) if all(np.isfinite(result).all() for result in results) else ()
        beside = (apart, weights_apart(cuts)) if apart else None
        names = tuple(inputs), tuple(outputs)
        return Model(content, weight_bytes, *names, tuple(layers), trial, beside, tuple(work), signed)


def _shared(part: Cut, apart: str) -> str | None:
    """Where the weights are of a part that comes in two forms, which share them."""
    return apart if part.weights and with_signed_codes([part]) else None


def _handed_over(network: Network, last: NetworkLayer, region: Region) -> NetworkLayer:
    """A region as one layer whose neurons are rows; ``last`` is its last one."""
    shape = network.shapes[region.end][1:]
    return replace(last, node=region.nodes[0], value=region.end, shape=shape, axis=ROWS, features=1, fill=0.0)
