"""A network as ONNX nodes and arrays, and models cut out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from robustdice.errors import ModelError, first_line
from robustdice.model.canonical import arguments, aten
from robustdice.model.execute import attribute
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network
from robustdice.model.tracing import quiet

IR_VERSION = 9
"""The newest that ONNX Runtime 1.18, the oldest supported on a device, reads with opset 20."""

Array = NDArray[np.generic]


@dataclass(frozen=True)
class OnnxGraph:
    """The whole network: ``producers`` has the node that makes each value; every tensor of the network's
    graph is a value under its node's name. ``types`` has the ONNX element type and the number of axes of these,
    ``per_image`` the names of those whose first axis is the batch. ``parameters`` names the arrays that count as
    weights: constants of other types (index tables and the like) do not."""

    producers: Mapping[str, onnx.NodeProto]
    arrays: Mapping[str, Array]
    types: Mapping[str, tuple[int, int]]
    per_image: frozenset[str]
    parameters: frozenset[str]
    opset: int


@dataclass(frozen=True)
class Cut:
    """Nodes and arrays of a part of an :class:`OnnxGraph`, in the order in which they are computed.

    ``weights`` names the arrays that count as weights.
    """

    nodes: tuple[onnx.NodeProto, ...]
    arrays: Mapping[str, Array]
    weights: frozenset[str]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the network's parameters in it."""
        return sum(self.arrays[name].nbytes for name in self.weights)


def export_onnx(network: Network) -> OnnxGraph:
    """One ONNX export of the whole network; ModelError naming what ONNX cannot express."""
    values = [node for node in network.nodes if node.op == "call_function" and node in network.shapes]
    # The exporter names what it takes operations apart into as torch would, and does not look who else is called so:
    # parameters and tensors get names that nothing else has, and their own ones afterwards.
    names = {f"ours/{node.name}": node.name for node in (network.input, *values)}
    parameters = {f"ours__{n}": str(node.target) for n, node in enumerate(network.nodes) if node.op == "get_attr"}
    names |= {ours: array_name(parameter) for ours, parameter in parameters.items()}
    root = torch.nn.Module()
    for ours, parameter in parameters.items():
        root.register_buffer(ours, attribute(network.module, parameter).detach())
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(network.module.graph, copies)
    for n, node in enumerate(network.nodes):
        if node.op == "get_attr":
            copies[node].target = f"ours__{n}"
    graph.output(tuple(copies[node] for node in values))
    module = fx.GraphModule(root, graph)
    example = torch.zeros(2, *network.input_shape)
    try:
        with quiet():
            program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[f"ours/{network.input.name}"],
                output_names=[f"ours/{node.name}" for node in values],
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps what went wrong in advice about itself
            cause = cause.__cause__
        raise ModelError(f"the model cannot be written as ONNX: {first_line(cause)}") from None
    assert exported is not None
    model = exported.model
    if model.functions:
        raise ModelError(f"the model cannot be written as ONNX: it needs the function {next(iter(model.functions))}")
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    model.graph.initializers.clear()
    proto = exported.model_proto
    _rename(proto.graph, names)
    producers = {output: node for node in proto.graph.node for output in node.output if output}
    if missing := [node.name for node in values if node.name not in producers]:
        raise ModelError(f"the model cannot be written as ONNX: the export lost the value of node {missing[0]}")
    shapes: dict[str, Array] = {}
    for name, (source, shape) in _reshapes(network).items():
        shapes[f"{name}/shape"] = np.array(shape, dtype=np.int64)
        producers[name] = helper.make_node("Reshape", [source, f"{name}/shape"], [name])
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    types = {
        value.name: (value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim))
        for value in (*proto.graph.input, *proto.graph.output)
    }
    return OnnxGraph(
        producers=producers,
        arrays={_renamed(name, names): array for name, array in arrays.items()} | shapes,
        types=types,
        per_image=frozenset(node.name for node in network.per_image),
        parameters=frozenset(
            array_name(name) for name in parameters.values() if attribute(network.module, name).is_floating_point()
        ),
        opset=opset,
    )


def array_name(parameter: str) -> str:
    """The name of a parameter's array: a parameter may be called as some tensor of the network is."""
    return f"weights/{parameter}"


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [_renamed(name, names) for name in node.input]
        node.output[:] = [_renamed(name, names) for name in node.output]
    for value in (*graph.input, *graph.output):
        value.name = _renamed(value.name, names)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name from ``names``, or one that none of those can be; the empty name stays so."""
    return names.get(name, name and f"inner/{name}")


def cut(graph: OnnxGraph, inputs: Iterable[str], outputs: Iterable[str]) -> Cut:
    """The nodes that compute ``outputs`` from ``inputs``.

    Exporters take the batch size from where they like, mostly from the network's input; here it comes from ``inputs``.
    """
    inputs, outputs = list(inputs), list(outputs)
    known = set(inputs)
    sized = next((name for name in inputs if name in graph.per_image), None)
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
        if name not in graph.producers:
            raise ModelError(f"the model cannot be cut into stages: {outputs} cannot be computed without {name}")
        node = graph.producers[name]
        if sized is not None and _is_batch_size(node, graph):
            node = helper.make_node("Shape", [sized], [name], start=0, end=1)
        if ready:
            known.update(node.output)
            nodes[node.output[0]] = node
        else:
            pending.append((name, True))
            pending.extend((used, False) for used in node.input)
    return Cut(tuple(nodes.values()), arrays, graph.parameters & arrays.keys())


def _is_batch_size(node: onnx.NodeProto, graph: OnnxGraph) -> bool:
    if node.op_type != "Shape" or node.input[0] not in graph.per_image:
        return False
    ends = {attribute.name: attribute.i for attribute in node.attribute}
    return ends.get("start", 0) == 0 and ends.get("end") == 1


def cut_layer(
    graph: OnnxGraph, layer: NetworkLayer, neurons: NDArray[np.int64], prefix: str, given: Iterable[str] = ()
) -> Cut:
    """The part of a layer and its tail that computes ``neurons``, from the layer's input, and the values ``given`` from
    outside, to its value.

    Everything inside gets ``prefix`` before its name, so that layers of one stage can share a model.
    """
    source = layer.node.args[0]
    assert isinstance(source, fx.Node)
    whole = cut(graph, [source.name, *given], [layer.value.name])
    rename = {output: prefix + output for node in whole.nodes for output in node.output}
    rename |= {name: prefix + name for name in whole.arrays}
    rename[layer.value.name] = prefix + layer.value.name
    slices = {array_name(parameter.name): parameter for parameter in layer.parameters}
    arrays = {
        prefix + name: take(array, neurons, slices[name].axis, slices[name].features) if name in slices else array
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
    return Cut(tuple(nodes), arrays, frozenset(prefix + name for name in whole.weights))


def cut_parity(graph: OnnxGraph, layer: NetworkLayer, members: Sequence[NDArray[np.int64]], prefix: str) -> Cut:
    """What computes the sum of the values of ``members`` (neurons each), padded with zeros to the longest.

    Where all neurons read the same input, the sum of their filters gives the sum of their values; in a grouped
    convolution, whose filters read different channels, the values themselves are added up. ``layer`` has no tail.
    """
    longest = max(members, key=len)
    if not layer.input_channels:
        whole = cut_layer(graph, layer, longest, prefix)
        arrays = dict(whole.arrays)
        for parameter in layer.parameters:
            array = array_name(parameter.name)
            summed = np.zeros(arrays[prefix + array].shape, np.float64)
            for neurons in members:
                part = np.asarray(take(graph.arrays[array], neurons, parameter.axis, parameter.features), np.float64)
                summed[(slice(None),) * parameter.axis + (slice(part.shape[parameter.axis]),)] += part
            arrays[prefix + array] = summed.astype(np.float32)
        return Cut(whole.nodes, arrays, whole.weights)
    nodes: list[onnx.NodeProto] = []
    arrays = {}
    weights: set[str] = set()
    terms = []
    rank = len(layer.shape) + 1
    for number, neurons in enumerate(members):
        inner = f"{prefix}{number}/"
        part_cut = cut_layer(graph, layer, neurons, inner)
        nodes.extend(part_cut.nodes)
        arrays.update(part_cut.arrays)
        weights |= part_cut.weights
        ends = np.zeros(2 * rank, dtype=np.int64)
        ends[rank + layer.axis] = len(longest) - len(neurons)
        arrays[f"{inner}pads/indices"] = ends
        terms.append(f"{inner}{layer.value.name}/padded")
        nodes.append(helper.make_node("Pad", [f"{inner}{layer.value.name}", f"{inner}pads/indices"], [terms[-1]]))
    nodes.append(helper.make_node("Sum", terms, [prefix + layer.value.name]))
    return Cut(tuple(nodes), arrays, frozenset(weights))


def mask_name(layer: NetworkLayer) -> str:
    """The name of the value that says which neurons of a layer are there: bool[neurons]."""
    return f"{layer.value.name}__mask"


def with_mask(graph: OnnxGraph, layer: NetworkLayer) -> OnnxGraph:
    """The graph with the layer's value, after its tail, filled where the layer's mask says that a neuron is lost."""
    value, mask = layer.value.name, mask_name(layer)
    whole, wide, shaped = f"{value}/whole", f"{mask}/wide", f"{mask}/shaped"
    tail_end = onnx.NodeProto()
    tail_end.CopyFrom(graph.producers[value])
    tail_end.output[:] = [whole if output == value else output for output in tail_end.output]
    entries = np.repeat(np.arange(layer.layer.neurons), layer.features)
    shape = np.ones(len(layer.shape) + 1, dtype=np.int64)
    shape[layer.axis] = -1
    arrays: dict[str, Array] = {
        f"{mask}/entries": entries,
        f"{mask}/shape": shape,
        f"{value}/fill": np.array(layer.fill, np.float32),
    }
    nodes = (
        tail_end,
        helper.make_node("Gather", [mask, f"{mask}/entries"], [wide]),
        helper.make_node("Reshape", [wide, f"{mask}/shape"], [shaped]),
        helper.make_node("Where", [shaped, whole, f"{value}/fill"], [value]),
    )
    return replace(
        graph,
        producers={**graph.producers, **{output: node for node in nodes for output in node.output if output}},
        arrays={**graph.arrays, **arrays},
        types={**graph.types, mask: (TensorProto.BOOL, 1)},
    )


def take(array: Array, neurons: NDArray[np.int64], axis: int, features: int) -> Array:
    """What belongs to ``neurons`` along an axis on which each of them has ``features`` entries."""
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
            if not all(isinstance(size, int) for size in shape):
                continue  # it is computed from the batch's own size
        else:
            before = network.shapes[source]
            start, end = (axis % len(before) for axis in arguments(node, None, 0, -1)[1:])
            shape = (*(0,) * start, -1, *before[end + 1 :])
        found[node.name] = (source.name, shape)
    return found


def make_model(
    cuts: Sequence[Cut],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    types: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    apart: str | None = None,
) -> bytes:
    """An ONNX model whose inputs and outputs may have any size along every axis.

    ``types`` are an :class:`OnnxGraph`'s; what it does not know is float32, with any number of axes. The weights are in
    the model, or in the file ``apart`` beside it: :func:`weights_apart`.
    """
    nodes = [node for part in cuts for node in part.nodes]
    used = {name for node in nodes for name in node.input} | set(outputs)
    arrays = {name: array for part in cuts for name, array in part.arrays.items() if name in used}
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]
    if apart is not None:
        offsets = _offsets(cuts)
        for tensor in (tensor for tensor in tensors if tensor.name in offsets):
            onnx.external_data_helper.set_external_data(tensor, apart, offsets[tensor.name], len(tensor.raw_data))
            tensor.ClearField("raw_data")
    described_inputs, described_outputs = ([_describe(name, types) for name in names] for names in (inputs, outputs))
    body = helper.make_graph(nodes, "robustdice", described_inputs, described_outputs, initializer=tensors)
    domains = {"": opset, **{node.domain: 1 for node in nodes if node.domain}}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    model = helper.make_model(body, opset_imports=opsets, producer_name="robustdice")
    model.ir_version = IR_VERSION
    content: bytes = model.SerializeToString()
    return content


def weights_apart(cuts: Sequence[Cut]) -> bytes:
    """The content of a file with the weights of ``cuts``, which models can share."""
    arrays = {name: np.ascontiguousarray(part.arrays[name]) for part in cuts for name in part.weights}
    content = bytearray()
    for name, offset in _offsets(cuts).items():
        content += bytes(offset - len(content)) + arrays[name].tobytes()
    return bytes(content)


def _offsets(cuts: Sequence[Cut]) -> dict[str, int]:
    """Where each weight lies in a file apart: the widest numbers first, so that all lie where processors like them."""
    arrays = {name: part.arrays[name] for part in cuts for name in part.weights}
    sizes = {name: array.nbytes for name, array in arrays.items()}
    names = sorted(sizes, key=lambda name: (-arrays[name].itemsize, name))
    return dict(zip(names, np.cumsum([0, *(sizes[name] for name in names)]).tolist(), strict=False))


def _describe(name: str, types: Mapping[str, tuple[int, int]]) -> onnx.ValueInfoProto:
    kind, axes = types.get(name.rpartition("/")[2], (TensorProto.FLOAT, None))
    return helper.make_tensor_value_info(name, kind, None if axes is None else [None] * axes)
