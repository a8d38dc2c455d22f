"""Graphs of layers that are dealt out as pairs: what some neurons of the first add to the second, and what follows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from robustdice.bundle.onnx_graph import Array, Cut, OnnxGraph, array_name, cut, take
from robustdice.model.layers import NetworkLayer


def with_sums(graph: OnnxGraph, first: NetworkLayer, second: NetworkLayer) -> OnnxGraph:
    """The graph in which the second layer's pre-activations are what stands under the first one's value, the sums, and
    the second one's bias."""
    sums, value, bias = first.value.name, second.node.name, second.own_bias
    if bias is None:
        nodes, arrays = [helper.make_node("Identity", [sums], [value])], dict[str, Array]()
    else:
        shape, shaped = np.ones(graph.types[value][1], np.int64), f"{value}/@bias"
        shape[second.without_tail.axis] = -1
        arrays = {f"{shaped}/shape": shape}
        nodes = [
            helper.make_node("Reshape", [array_name(bias), f"{shaped}/shape"], [shaped]),
            helper.make_node("Add", [sums, shaped], [value]),
        ]
    producers = {output: node for node in nodes for output in node.output}
    return replace(graph, producers={**graph.producers, **producers}, arrays={**graph.arrays, **arrays})


def cut_second(
    graph: OnnxGraph, first: NetworkLayer, second: NetworkLayer, neurons: NDArray[np.int64], prefix: str
) -> Cut:
    """What ``neurons`` of the first layer add to the second one's pre-activations, from their values alone. Names are
    those of :func:`robustdice.bundle.onnx_graph.cut_layer`."""
    whole, weights = cut(graph, [first.value.name], [second.node.name]), array_name(second.own_filter)
    bias = None if second.own_bias is None else array_name(second.own_bias)
    names = {first.value.name, *whole.arrays, *(output for node in whole.nodes for output in node.output)}
    nodes = []
    for node in whole.nodes:
        copy = _without(node, bias)
        copy.name = ""
        copy.input[:] = [prefix + name if name in names else name for name in copy.input]
        copy.output[:] = [prefix + name for name in copy.output]
        nodes.append(copy)
    arrays = {
        prefix + name: take(array, neurons, 1, first.features) if name == weights else array
        for name, array in whole.arrays.items()
        if name != bias
    }
    return Cut(tuple(nodes), arrays, frozenset(prefix + name for name in whole.weights - {bias}))


def _without(node: onnx.NodeProto, bias: str | None) -> onnx.NodeProto:
    """A copy of the node that adds no bias."""
    if node.op_type == "Add" and bias in node.input:
        return helper.make_node("Identity", [name for name in node.input if name != bias], node.output)
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if bias in node.input:
        copy.input[:] = [name for name in node.input if name != bias]
    return copy
