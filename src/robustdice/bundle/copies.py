"""How models compute with coarse copies of a plan's layers: with filters from outside, or multiplied as they are."""

from __future__ import annotations

from dataclasses import replace

from robustdice.bundle.integer_graph import (
    can_multiply,
    can_multiply_four_bits,
    with_four_bits,
    with_product,
    with_rounded_input,
)
from robustdice.bundle.model import Neurons, Taken
from robustdice.bundle.neuron_inputs import (
    filter_name,
    scale_name,
    shift_name,
    with_coarse_filters,
    with_scale_and_shift,
)
from robustdice.bundle.onnx_graph import OnnxGraph
from robustdice.model.execute import attribute
from robustdice.model.network import Network
from robustdice.plan import Plan


class Copies:
    """The coarse copies of one plan's layers, given by their positions."""

    def __init__(self, network: Network, plan: Plan) -> None:
        """``plan`` is one of the network's."""
        self._network, self._plan = network, plan

    def put_into(
        self, graph: OnnxGraph, index: int, neurons: Neurons, kind: str, packed: bool = True
    ) -> tuple[OnnxGraph, Taken]:
        """The graph in which a layer computes with copies of these neurons, and what it takes for that; ``packed``:
        codes may be multiplied as they are."""
        layer, steps = self._network.layers[index], self._plan.activations.get(index)
        taken = Taken(index, neurons, kind, at_once=len(neurons))
        multiplies = packed and self._multiplies(index, kind)
        if steps is not None and multiplies:
            shape = tuple(attribute(self._network.module, layer.own_filter).shape[1:])
            graph = with_product(graph, layer, steps, self._plan.coarse[index, kind].filter.codes[neurons], shape)
            taken = replace(taken, inside=True, factor=steps.scale)
        elif packed and self._multiplies_four_bits(index, kind):
            graph = with_four_bits(graph, layer, self._plan.coarse[index, kind].filter.codes[neurons])
            taken = replace(taken, inside=True)
        if steps is not None and not multiplies:
            graph = with_rounded_input(graph, layer, steps)
        graph = with_coarse_filters(graph, layer, own=not taken.inside)
        return with_scale_and_shift(graph, layer), taken

    def stay_packed(self, index: int, kind: str) -> bool:
        """Whether a layer's copies are multiplied as they are kept, so that they are never unpacked."""
        return self._multiplies(index, kind) or self._multiplies_four_bits(index, kind)

    def _multiplies(self, index: int, kind: str) -> bool:
        """In whole numbers."""
        if kind != "int8" or index not in self._plan.activations:
            return False
        return self._plan.coarse[index, kind].filter.scales.shape[1] == 1 and can_multiply(self._network.layers[index])

    def _multiplies_four_bits(self, index: int, kind: str) -> bool:
        if kind != "int4" or not can_multiply_four_bits(self._network.layers[index]):
            return False
        groups: int = self._plan.coarse[index, kind].filter.scales.shape[1]
        return groups == 1

    def filters(self, taken: Taken) -> list[str]:
        """The names of the filters that a model takes for coarse copies."""
        if taken.kind == "float32" or taken.pair == "scales":
            return []
        layer = self._network.layers[taken.layer]
        nodes = [*(() if taken.inside or taken.pair == "second" else (layer.node,)), *layer.tail_filter_nodes]
        if taken.pair == "first":
            nodes.append(self._network.layers[self._plan.pairs[taken.layer]].node)
        return [filter_name(node) for node in nodes]

    def scale_and_shift(self, index: int) -> list[str]:
        """The names of what a layer's neurons are scaled and shifted by."""
        layer = self._network.layers[index]
        return [scale_name(layer), shift_name(layer)]
