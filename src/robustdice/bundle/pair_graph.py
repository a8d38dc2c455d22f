"""Graphs of layers that are dealt out as pairs: what some neurons of the first add to the second, and what follows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from robustdice.bundle.neuron_inputs import (
    filter_name,
    scale_name,
    shift_name,
    with_coarse_filters,
    with_scale_and_shift,
)
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


def with_folded_sums(graph: OnnxGraph, first: NetworkLayer, second: NetworkLayer, coarse: bool) -> OnnxGraph:
    """As :func:`with_sums` where the sums stand behind the second layer's affine chain, and are shifted by a value from
    outside; with its tail's filters from outside as well where its copy is ``coarse``."""
    sums = helper.make_node("Identity", [first.value.name], [second.node.name])
    graph = replace(graph, producers={**graph.producers, second.node.name: sums})
    return with_scale_and_shift(with_coarse_filters(graph, second, own=False, tail=coarse), second)


def with_folded_filters(graph: OnnxGraph, second: NetworkLayer, filters: NDArray[np.float32]) -> OnnxGraph:
    """The graph with what scales the second layer's neurons in its ``filters`` [neurons, weights]."""
    name = array_name(second.own_filter)
    return replace(graph, arrays={**graph.arrays, name: filters.reshape(graph.arrays[name].shape)})


def cut_coarse_second(graph: OnnxGraph, first: NetworkLayer, second: NetworkLayer, prefix: str) -> Cut:
    """As :func:`cut_second`, with the second layer's filters from outside, float32 [neurons of the first, neurons of
    the second, features, ...], and what they give scaled by a value from outside."""
    weights, node = array_name(second.own_filter), second.node.name
    part = cut_second(graph, first, second, np.arange(1), prefix)  # of whichever neurons: weights are left out
    raw, shaped = f"{prefix}{node}/@raw", f"{prefix}{node}/@shape"
    for each in part.nodes:
        each.output[:] = [raw if name == prefix + node else name for name in each.output]
    neurons, _, *behind = graph.arrays[weights].shape
    turned = f"{prefix}{weights}/@turned"
    arrays = {name: array for name, array in part.arrays.items() if name != prefix + weights}
    arrays[f"{turned}/shape"] = np.array([neurons, -1, *behind])
    before = [
        helper.make_node("Transpose", [filter_name(second.node)], [turned], perm=[1, 0, *range(2, 3 + len(behind))]),
        helper.make_node("Reshape", [turned, f"{turned}/shape"], [prefix + weights]),
    ]
    shape = np.ones(graph.types[node][1], np.int64)
    shape[second.without_tail.axis] = -1
    after = []
    value = raw
    for name, operation in ((scale_name(second), "Mul"), (shift_name(second), "Add")):
        result = prefix + node if operation == "Add" else f"{raw}/scaled"
        after.append(helper.make_node("Reshape", [name, shaped], [f"{prefix}{name}/shaped"]))
        after.append(helper.make_node(operation, [value, f"{prefix}{name}/shaped"], [result]))
        value = result
    return Cut((*before, *part.nodes, *after), {**arrays, shaped: shape}, part.weights - {prefix + weights})


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
