"""Graphs that take from outside what they would otherwise hold: a layer's scales and shifts, and its coarse filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper
from torch import fx

from robustdice.bundle.onnx_graph import Array, OnnxGraph, array_name, cut
from robustdice.model.canonical import arguments
from robustdice.model.channelwise import parameter_name
from robustdice.model.layers import NetworkLayer


def scale_name(layer: NetworkLayer) -> str:
    """The value that a layer's neurons are scaled by behind its affine chain: float32 [neurons]."""
    return f"{layer.node.name}/@scale"


def shift_name(layer: NetworkLayer) -> str:
    """The value that a layer's neurons are shifted by, after scaling: float32 [neurons]."""
    return f"{layer.node.name}/@shift"


def filter_name(node: fx.Node) -> str:
    """The value that a convolution or linear node takes its filters from: float32 [neurons, ...]."""
    return f"{node.name}/@filter"


def with_scale_and_shift(graph: OnnxGraph, layer: NetworkLayer) -> OnnxGraph:
    """The graph with what stands behind a layer's affine chain scaled and shifted by two values from outside."""
    end, raw = layer.affine_end.name, f"{layer.affine_end.name}/@raw"
    producer = onnx.NodeProto()
    producer.CopyFrom(graph.producers[end])
    producer.output[:] = [raw if output == end else output for output in producer.output]
    shape = np.ones(graph.types[end][1], dtype=np.int64)
    shape[layer.affine_axis] = -1
    nodes = [producer]
    value = raw
    for name, operation in ((scale_name(layer), "Mul"), (shift_name(layer), "Add")):
        result = end if operation == "Add" else f"{end}/@scaled"
        nodes.append(helper.make_node("Reshape", [name, f"{end}/@shape"], [f"{name}/shaped"]))
        nodes.append(helper.make_node(operation, [value, f"{name}/shaped"], [result]))
        value = result
    return _with(graph, nodes, {f"{end}/@shape": shape})


def with_coarse_filters(graph: OnnxGraph, layer: NetworkLayer, own: bool = True, tail: bool = True) -> OnnxGraph:
    """The graph with the depthwise filters in a layer's ``tail``, and its ``own``, unless they are to stay as they are,
    taken from outside. The layer's bias and the rest of its affine chain are left out: coarse copies have them in their
    scales and shifts."""
    filters = {**({layer.node: layer.own_filter} if own else {}), **(layer.tail_filter_nodes if tail else {})}
    nodes: list[onnx.NodeProto] = []
    arrays: dict[str, Array] = {}
    for node, parameter in filters.items():
        source = arguments(node)[0]
        for part in cut(graph, [source.name], [node.name]).nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(part)
            if node is layer.node:
                if part.op_type in ("Conv", "Gemm"):
                    del copy.input[2:]
                bias = layer.own_bias
                if bias is not None and array_name(bias) in copy.input:
                    arrays[f"{node.name}/@nothing"] = np.zeros(1, np.float32)
                    copy.input[:] = [f"{node.name}/@nothing" if i == array_name(bias) else i for i in copy.input]
            copy.input[:] = [filter_name(node) if name == array_name(parameter) else name for name in copy.input]
            nodes.append(copy)
    for node in layer.affine:
        source = next(a for a in arguments(node) if isinstance(a, fx.Node) and parameter_name(a) is None)
        nodes.append(helper.make_node("Identity", [source.name], [node.name]))
    return _with(graph, nodes, arrays)


def _with(graph: OnnxGraph, nodes: list[onnx.NodeProto], arrays: Mapping[str, Array]) -> OnnxGraph:
    return replace(
        graph,
        producers={**graph.producers, **{output: node for node in nodes for output in node.output if output}},
        arrays={**graph.arrays, **arrays},
    )
