"""A network as ONNX nodes and arrays, and models cut out of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import fx

from robustdice.errors import ModelError
from robustdice.model.canonical import arguments, aten
from robustdice.model.network import Network, NetworkLayer

IR_VERSION = 9
"""The newest that ONNX Runtime 1.18, the oldest supported on a device, reads with opset 20."""

Array = NDArray[np.generic]


@dataclass(frozen=True)
class OnnxGraph:
    """The whole network: ``producers`` has the node that makes each value; every tensor of the network's
    graph is a value under its node's name."""

    producers: Mapping[str, onnx.NodeProto]
    arrays: Mapping[str, Array]
    opset: int


@dataclass(frozen=True)
class Cut:
    """Nodes and arrays of a part of an :class:`OnnxGraph`, in the order in which they are computed."""

    nodes: tuple[onnx.NodeProto, ...]
    arrays: Mapping[str, Array]


def export_onnx(network: Network) -> OnnxGraph:
    """One ONNX export of the whole network; ModelError naming what ONNX cannot express."""
    values = [node for node in network.nodes if node.op == "call_function" and node in network.shapes]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(network.module.graph, copies)
    graph.output(tuple(copies[node] for node in values))
    module = fx.GraphModule(network.module, graph)
    example = torch.zeros(2, *network.input_shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates parts of itself that it still uses
            program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[network.input.name],
                output_names=[node.name for node in values],
            )
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"the model cannot be written as ONNX: {reason}") from None
    assert exported is not None
    model = exported.model
    if model.functions:
        raise ModelError(f"the model cannot be written as ONNX: it needs the function {next(iter(model.functions))}")
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    model.graph.initializers.clear()
    proto = exported.model_proto
    producers = {output: node for node in proto.graph.node for output in node.output if output}
    if missing := [node.name for node in values if node.name not in producers]:
        raise ModelError(f"the model cannot be written as ONNX: the export lost the value of node {missing[0]}")
    for name, (source, shape) in _reshapes(network).items():
        arrays[f"{name}/shape"] = np.array(shape, dtype=np.int64)
        producers[name] = helper.make_node("Reshape", [source, f"{name}/shape"], [name])
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return OnnxGraph(producers, arrays, opset)


def cut(graph: OnnxGraph, inputs: Iterable[str], outputs: Iterable[str]) -> Cut:
    """The nodes that compute ``outputs`` from ``inputs``."""
    known = set(inputs)
    nodes: dict[str, onnx.NodeProto] = {}
    arrays: dict[str, Array] = {}
    pending = [(name, False) for name in outputs]
    while pending:
        name, ready = pending.pop()
        if name in known or name == "":
            continue
        if name in graph.arrays:
            arrays[name] = graph.arrays[name]
            continue
        node = graph.producers[name]
        if ready:
            known.update(node.output)
            nodes[node.output[0]] = node
        else:
            pending.append((name, True))
            pending.extend((used, False) for used in node.input)
    return Cut(tuple(nodes.values()), arrays)


def cut_layer(graph: OnnxGraph, layer: NetworkLayer, neurons: NDArray[np.int64], prefix: str) -> Cut:
    """The part of a layer and its tail that computes ``neurons``, from the layer's input to its value.

    Everything inside gets ``prefix`` before its name, so that layers of one stage can share a model.
    """
    source = layer.node.args[0]
    assert isinstance(source, fx.Node)
    whole = cut(graph, [source.name], [layer.value.name])
    rename = {output: prefix + output for node in whole.nodes for output in node.output}
    rename |= {name: prefix + name for name in whole.arrays}
    rename[layer.value.name] = prefix + layer.value.name
    slices = {parameter.name: parameter for parameter in layer.parameters}
    arrays = {
        prefix + name: _take(array, neurons, slices[name].axis, slices[name].features) if name in slices else array
        for name, array in whole.arrays.items()
    }
    nodes = []
    if layer.input_channels:
        groups = neurons[:: layer.layer.group] // layer.layer.group
        channels = (groups[:, None] * layer.input_channels + np.arange(layer.input_channels)).ravel()
        gathered = f"{prefix}{source.name}/channels"
        arrays[f"{gathered}/indices"] = channels
        nodes.append(helper.make_node("Gather", [source.name, f"{gathered}/indices"], [gathered], axis=1))
        rename[source.name] = gathered
    for node in whole.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        copy.input[:] = [rename.get(name, name) for name in node.input]
        copy.output[:] = [rename.get(name, name) for name in node.output]
        if node.op_type == "Conv":
            for attribute in copy.attribute:
                if attribute.name == "group" and attribute.i > 1:
                    attribute.i = attribute.i * len(neurons) // layer.layer.neurons
        nodes.append(copy)
    return Cut(tuple(nodes), arrays)


def _take(array: Array, neurons: NDArray[np.int64], axis: int, features: int) -> Array:
    if features > 1:
        neurons = (neurons[:, None] * features + np.arange(features)).ravel()
    return np.take(array, neurons, axis=axis)


def _reshapes(network: Network) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Source and target shape of every reshape, said so that it holds for any batch and any number of neurons.

    Exporters write the batch size of the input, or the number of channels, into them.
    """
    found = {}
    for node in network.nodes:
        if node.target not in {aten.flatten.using_ints, aten.reshape.default}:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target is aten.reshape.default:
            shape = tuple(arguments(node)[1])
        else:
            before = network.shapes[source]
            start, end = (axis % len(before) for axis in arguments(node, None, 0, -1)[1:])
            shape = (*(0,) * start, -1, *before[end + 1 :])
        found[node.name] = (source.name, shape)
    return found


def make_model(
    cuts: Sequence[Cut], inputs: Sequence[str], outputs: Sequence[str], opset: int
) -> tuple[bytes, set[str]]:
    """An ONNX model with float32 inputs and outputs of open shape, and the names of the arrays stored in it."""
    nodes = [node for part in cuts for node in part.nodes]
    used = {name for node in nodes for name in node.input}
    arrays = {name: array for part in cuts for name, array in part.arrays.items() if name in used}
    graph = helper.make_graph(
        nodes,
        "robustdice",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        initializer=[numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="robustdice")
    model.ir_version = IR_VERSION
    return model.SerializeToString(), set(arrays)
