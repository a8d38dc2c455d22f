"""Graphs that multiply by the codes of a layer's filters, and those whose layers read 8-bit inputs.

Where inputs are rounded, a product of whole numbers times the two scales is the same as that of the real numbers, but
for rounding errors. Whole numbers are exact on every processor: devices ask ONNX Runtime for its path without sums that
saturate where it has another.

Codes of inputs are unsigned, 0 to 255. The same less 128, that of zero included, are signed and give the same, bit for
bit; which a device multiplies faster depends on its processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from robustdice.bundle.onnx_graph import Array, Cut, OnnxGraph, cut
from robustdice.model.canonical import CONVOLUTIONS, arguments, aten, per_axis
from robustdice.model.layers import NetworkLayer
from robustdice.representation import Steps

ZERO = "/@zero"
"""So ends the name of what zero is among the codes of a layer's inputs; its type is that of them all."""

COLUMN_BYTES = 2**22
"""A convolution is a product with a matrix that has all inputs of a filter for each of its outputs. Where that takes
more memory for one image, filters are unpacked instead."""


def with_rounded_input(graph: OnnxGraph, layer: NetworkLayer, steps: Steps) -> OnnxGraph:
    """The graph in which a layer reads its input rounded; everyone else reads it as it is."""
    source, name = layer.node.all_input_nodes[0].name, layer.node.name
    codes, rounded = f"{name}/@codes of {source}", f"{name}/@rounded {source}"
    arrays = _steps(name, steps)
    nodes = [
        helper.make_node("QuantizeLinear", [source, *arrays], [codes]),
        helper.make_node("DequantizeLinear", [codes, *arrays], [rounded]),
    ]
    for part in cut(graph, [source], [name]).nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(part)
        copy.input[:] = [rounded if used == source else used for used in part.input]
        nodes.append(copy)
    return _with(graph, nodes, arrays)


def can_multiply(layer: NetworkLayer) -> bool:
    """Whether :func:`with_product` is for such a layer."""
    if layer.input_channels or layer.node.target is CONVOLUTIONS[3]:
        return False
    return layer.node.target not in CONVOLUTIONS.values() or _column_bytes(layer) <= COLUMN_BYTES


def _column_bytes(layer: NetworkLayer) -> int:
    return layer.layer.filter_weights * int(np.prod(layer.own_shape[1:], dtype=np.int64))


def with_product(
    graph: OnnxGraph, layer: NetworkLayer, steps: Steps, codes: NDArray[np.int8], shape: tuple[int, ...]
) -> OnnxGraph:
    """The graph in which a layer gives the product of the ``codes`` of its filters, [neurons, K], with those of its
    input, not scaled; ``shape`` is a filter's. The codes are among the graph's parameters."""
    source, name = layer.node.all_input_nodes[0].name, layer.node.name
    arrays = _steps(name, steps)
    zero, columns = name + ZERO, f"{name}/@codes of {source}"
    filters = codes.reshape(len(codes), *shape)
    nodes = [helper.make_node("QuantizeLinear", [source, *arrays], [columns])]
    convolution = layer.node.target in CONVOLUTIONS.values()
    if convolution:
        filters = np.moveaxis(filters, 1, -1)  # channels last, as the columns have them
        found, columns, more = _columns(layer, columns, zero, shape)
        nodes += found
        arrays |= more
    arrays[f"{name}/@codes"] = np.ascontiguousarray(filters.reshape(len(codes), -1).T)
    # Codes need no zero point, but ONNX Runtime up to 1.24 at least reads beyond the inputs of a node without one.
    arrays[f"{name}/@no zero"] = np.array(0, np.int8)
    multiplied = [columns, f"{name}/@codes", zero, f"{name}/@no zero"]
    nodes.append(helper.make_node("MatMulInteger", multiplied, [f"{name}/@product"]))
    last = f"{name}/@last" if convolution else name
    nodes.append(helper.make_node("Cast", [f"{name}/@product"], [last], to=TensorProto.FLOAT))
    if convolution:
        axes = len(layer.own_shape) + 1
        nodes.append(helper.make_node("Transpose", [last], [name], perm=[0, axes - 1, *range(1, axes - 1)]))
    graph = _with(graph, nodes, arrays)
    return replace(graph, parameters=graph.parameters | {f"{name}/@codes"})


def with_signed_codes(parts: Sequence[Cut]) -> list[Cut]:
    """Parts of a graph with signed codes of inputs instead of unsigned ones; none where no input is rounded."""
    found = [
        replace(
            part,
            arrays={
                name: (array.astype(np.int16) - 128).astype(np.int8) if name.endswith(ZERO) else array
                for name, array in part.arrays.items()
            },
        )
        for part in parts
    ]
    return found if any(name.endswith(ZERO) for part in parts for name in part.arrays) else []


BLOCKS = (256, 128, 64, 32)
"""So many weights in a row of a matrix of 4 bits have a scale, which is 1 here: the fewer of them, the faster."""


def can_multiply_four_bits(layer: NetworkLayer) -> bool:
    """Whether :func:`with_four_bits` is for such a layer."""
    return layer.node.target is aten.linear.default and layer.layer.filter_weights % BLOCKS[-1] == 0


def with_four_bits(graph: OnnxGraph, layer: NetworkLayer, codes: NDArray[np.int8]) -> OnnxGraph:
    """The graph in which a linear layer gives the product of its input with the ``codes`` of its filters, [neurons, K],
    not scaled. The codes, two in a byte, are among the graph's parameters.

    Without zero points (8 is zero): with them ONNX Runtime returns wrong numbers for one row on some processors.
    """
    source, name = layer.node.all_input_nodes[0].name, layer.node.name
    neurons, weights = codes.shape
    block = next(size for size in BLOCKS if weights % size == 0)
    unsigned = (codes + 8).astype(np.uint8)
    packed = (unsigned[:, ::2] | unsigned[:, 1::2] << 4).reshape(neurons, -1, block // 2)
    arrays: dict[str, Array] = {
        f"{name}/@codes": packed,
        f"{name}/@ones": np.ones(packed.shape[:2], np.float32).ravel(),
    }
    attributes = {"K": weights, "N": neurons, "bits": 4, "block_size": block, "accuracy_level": 0}
    node = helper.make_node("MatMulNBits", [source, *arrays], [name], domain="com.microsoft", **attributes)
    graph = _with(graph, [node], arrays)
    return replace(graph, parameters=graph.parameters | {f"{name}/@codes"})


def _columns(
    layer: NetworkLayer, source: str, zero: str, shape: tuple[int, ...]
) -> tuple[list[onnx.NodeProto], str, dict[str, Array]]:
    """For each output of a convolution what its filters read, [batch, *outputs, K] with channels last: nodes, the name
    of their result, and arrays."""
    name, kernel, outputs = layer.node.name, shape[1:], layer.own_shape[1:]
    _, _, _, stride, padding, dilation, _ = arguments(layer.node, None, None, None, 1, 0, 1, 1)
    stride, padding, dilation = (per_axis(each, len(kernel)) for each in (stride, padding, dilation))
    axes = len(kernel) + 2
    last = f"{name}/@channels last"
    arrays: dict[str, Array] = {}
    nodes = [helper.make_node("Transpose", [source], [last], perm=[0, *range(2, axes), 1])]
    if any(padding):
        arrays[f"{name}/@pads"] = np.array([0, *padding, 0] * 2, np.int64)
        nodes.append(helper.make_node("Pad", [last, f"{name}/@pads", zero], [f"{name}/@padded"]))
        last = f"{name}/@padded"
    arrays[f"{name}/@axes"] = np.arange(1, axes - 1)
    arrays[f"{name}/@steps"] = np.array(stride, np.int64)
    parts = []
    for number, position in enumerate(product(*map(range, kernel))):
        starts = np.array(position, np.int64) * np.array(dilation, np.int64)
        arrays[f"{name}/@starts {number}"] = starts
        arrays[f"{name}/@ends {number}"] = starts + (np.array(outputs) - 1) * np.array(stride) + 1
        slices = [f"{name}/@{what}" for what in (f"starts {number}", f"ends {number}", "axes", "steps")]
        parts.append(f"{name}/@part {number}")
        nodes.append(helper.make_node("Slice", [last, *slices], [parts[-1]]))
    if len(parts) == 1:
        return nodes, parts[0], arrays
    nodes.append(helper.make_node("Concat", parts, [f"{name}/@columns"], axis=axes - 1))
    return nodes, f"{name}/@columns", arrays


def _steps(name: str, steps: Steps) -> dict[str, Array]:
    return {f"{name}/@step": np.array(steps.scale, np.float32), name + ZERO: np.array(steps.zero, np.uint8)}


def _with(graph: OnnxGraph, nodes: list[onnx.NodeProto], arrays: dict[str, Array]) -> OnnxGraph:
    return replace(
        graph,
        producers={**graph.producers, **{output: node for node in nodes for output in node.output}},
        arrays={**graph.arrays, **arrays},
    )
