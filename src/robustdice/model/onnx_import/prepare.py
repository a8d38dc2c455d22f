"""ONNX files of many makers brought to one form: a recent opset, float32, nothing quantised, constants computed.

Each step takes a model and changes it in place, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference, version_converter

from robustdice.errors import ModelError, first_line
from robustdice.model.onnx_import.quantised import dequantise

OLDEST_OPSET = 7
"""Operators of earlier opsets mean other things: they broadcast along an axis that they name."""
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_FLOATS = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_ONLY_BEFORE_7 = {"broadcast", "is_test", "consumed_inputs"}
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype"}


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the operators that a model is written in."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def bring_up_to_date(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in opset 7 or later, with neither its weights nor what nothing reads among its inputs; ModelError when
    onnx cannot convert it."""
    constants = {tensor.name for tensor in model.graph.initializer}
    read = {name for node in model.graph.node for name in (*node.input, *_read_inside(node))}
    read |= {value.name for value in model.graph.output}
    inputs = [value for value in model.graph.input if value.name not in constants and value.name in read]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)  # before it, weights had to be inputs
    opset = opset_of(model)
    if opset >= OLDEST_OPSET:
        return model
    try:
        converted = version_converter.convert_version(model, OLDEST_OPSET - 1) if opset < OLDEST_OPSET - 1 else model
        inferred = shape_inference.infer_shapes(converted)
    except Exception as error:  # the converter's own, RuntimeError and others
        raise ModelError(
            f"the ONNX model is of opset {opset}, and onnx.version_converter cannot bring it to a later one "
            f"({first_line(error)}); replace what it names with onnx.helper, or export the model again"
        ) from None
    return _with_numpys_broadcasting(inferred)


def _with_numpys_broadcasting(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of opset 6, with its shapes, in opset 7, where the second input no longer names the axis that it starts
    at. (onnx.version_converter counts the axes behind it wrongly.)"""
    graph = model.graph
    known = (*graph.input, *graph.output, *graph.value_info)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in known}
    ranks |= {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        said = {attribute.name: attribute.i for attribute in node.attribute}
        if said.get("broadcast") and "axis" in said:
            first, second = node.input
            if first not in ranks or second not in ranks:
                raise ModelError(f"the ONNX node {node.name or node.output[0]} broadcasts a tensor of unknown shape")
            behind = ranks[first] - said["axis"] % ranks[first] - ranks[second]
            axes = list(range(ranks[second], ranks[second] + behind))
            wide = f"{node.output[0]}/{second}"
            if axes:
                nodes.append(helper.make_node("Unsqueeze", [second], [wide], axes=axes))
                node.input[1] = wide
        dropped = _ONLY_BEFORE_7 | ({"axis"} if "broadcast" in said else set())
        kept = [attribute for attribute in node.attribute if attribute.name not in dropped]
        del node.attribute[:]
        node.attribute.extend(kept)
        nodes.append(node)
    later = helper.make_graph(nodes, graph.name, graph.input, graph.output, graph.initializer)
    opsets = [entry for entry in model.opset_import if entry.domain not in ("", "ai.onnx")]
    opsets.append(helper.make_opsetid("", OLDEST_OPSET))
    made = helper.make_model(later, opset_imports=opsets, ir_version=model.ir_version)
    made.metadata_props.extend(model.metadata_props)
    return made


def simplify(model: onnx.ModelProto) -> bool:
    """Everything in float32, with constants computed; whether that changed what is computed: another precision than
    the file's, or no rounding to few bits between operators."""
    changed = _use_float32(model.graph)
    compute_constants(model)
    if dequantise(model):
        compute_constants(model)
        changed = True
    return changed


def compute_constants(model: onnx.ModelProto) -> None:
    """Make what depends on constants alone a constant itself; what ONNX Runtime cannot compute stays as it is."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants[node.output[0]] = numpy_helper.from_array(_value(node), node.output[0])
            continue
        known = bool(node.input) and all(not name or name in constants for name in node.input)
        results = _compute(model, node, constants) if known and node.op_type not in _RANDOM else None
        if results is None:
            kept.append(node)
        else:
            constants.update({tensor.name: tensor for tensor in results})
    used = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    # Subgraphs read what lies around them.
    used |= {name for node in kept for name in _read_inside(node)}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in used)


def _compute(
    model: onnx.ModelProto, node: onnx.NodeProto, constants: dict[str, TensorProto]
) -> list[TensorProto] | None:
    inputs = [constants[name] for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "constant", [], outputs, inputs)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in outputs]
        return [numpy_helper.from_array(v, n) for n, v in zip(names, session.run(names, {}), strict=True)]
    except Exception:  # ONNX Runtime's exceptions have no common root below Exception
        return None


def _value(node: onnx.NodeProto) -> NDArray[Any]:
    """The value of a Constant node, whichever of its attributes it stands in."""
    value = helper.get_attribute_value(node.attribute[0])
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    array = np.array(value)
    return array.astype({"f": np.float32, "i": np.int64}.get(array.dtype.kind, array.dtype))


def _use_float32(graph: onnx.GraphProto) -> bool:
    """Half, bfloat16 and double numbers become float32, wherever they stand."""
    changed = False
    for tensor in graph.initializer:
        changed |= _as_float32(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _FLOATS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            changed = True
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                changed |= _as_float32(attribute.t)
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _FLOATS:
                attribute.i = TensorProto.FLOAT
                changed = True
        for inner in _subgraphs(node):
            changed |= _use_float32(inner)
    return changed


def _as_float32(tensor: TensorProto) -> bool:
    if tensor.data_type not in _FLOATS:
        return False
    limits = np.finfo(np.float32)
    array = numpy_helper.to_array(tensor).astype(np.float64)
    array = np.where(np.isfinite(array), array.clip(limits.min, limits.max), array)
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return True


def _read_inside(node: onnx.NodeProto) -> Iterator[str]:
    """The names of all that the subgraphs of a node read, what lies around them included."""
    for graph in _subgraphs(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from (*inner.input, *_read_inside(inner))


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
