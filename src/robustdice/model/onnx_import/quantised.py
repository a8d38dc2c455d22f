"""Quantised ONNX models read as models of real numbers.

A quantised tensor stands for ``(code - zero_point) * scale``, and here it *is* that number: quantising keeps a value
within the range that the codes reach, dequantising does nothing, an operator on codes is the operator on what they
stand for. What is left out is the rounding of activations to codes, which would make an image's scores jump with the
last bit of a sum, and so differ from one partition to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from robustdice.errors import ModelError

Array = NDArray[Any]

_LIMITS: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
}
_MOVES = {"Transpose", "Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Slice", "Gather", "MaxPool", "Concat"}
"""What gives codes again when it is given codes, of the same scale."""
_ONE_INPUT = {
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearAveragePool": "AveragePool",
    "QLinearSigmoid": "Sigmoid",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearSoftmax": "Softmax",
}
_TWO_INPUTS = {"QLinearMatMul": "MatMul", "QLinearAdd": "Add", "QLinearMul": "Mul"}
_INTEGER_SUMS = {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}
_QUANTISED = {
    *{"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearConcat", "QGemm"},
    *_ONE_INPUT,
    *_TWO_INPUTS,
    *_INTEGER_SUMS,
}
_QUANTISATION_ATTRIBUTES = {"channels_last", "axis", "block_size", "saturate", "precision", "output_dtype", "opset"}


def dequantise(model: onnx.ModelProto) -> bool:
    """Replace, in place, everything that is quantised; whether there was anything.

    An image input of type uint8 becomes float32, with pixels from 0 to 1. ModelError for scales that are computed, and
    for codes that are used as numbers in a way that is not known.
    """
    inputs = [value for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8]
    if not inputs and not any(node.op_type in _QUANTISED for node in model.graph.node):
        return False
    rewriting = _Rewriting(model, {tensor.name: tensor for tensor in model.graph.initializer})
    for value in inputs:
        rewriting.take_pixels(value)
    for node in model.graph.node:
        rewriting.rewrite(node)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(rewriting.nodes)
    model.graph.initializer.extend(rewriting.added)
    for value in model.graph.output:
        if value.type.tensor_type.elem_type in _LIMITS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return True


@dataclass
class _Rewriting:
    """``codes`` are tensors that hold codes as numbers (an image of bytes), and ``scales`` those that are worth what
    codes of that scale stand for."""

    model: onnx.ModelProto
    constants: dict[str, TensorProto]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    added: list[TensorProto] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    scales: dict[str, float] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def take_pixels(self, value: onnx.ValueInfoProto) -> None:
        """Bytes of an image, from pixels between 0 and 1."""
        value.type.tensor_type.elem_type = TensorProto.FLOAT
        self.renamed[value.name] = self.add("Mul", [value.name, self.constant(np.float32(255))], f"{value.name}/bytes")
        self.codes.add(self.renamed[value.name])

    def rewrite(self, node: onnx.NodeProto) -> None:
        """Add what stands for a node."""
        inputs = [self.renamed.get(name, name) for name in node.input]
        kind = node.op_type
        if kind not in _QUANTISED or (kind == "DequantizeLinear" and inputs[0] in self.constants):
            self._keep(node, inputs)
        elif kind == "QuantizeLinear":
            self._bound(node, inputs[0], *inputs[1:3])
        elif kind == "DequantizeLinear":
            self.add("Identity", [self._real(node, *inputs[:3])], node.output[0])
        elif kind == "DynamicQuantizeLinear":
            self.add("Identity", inputs, node.output[0])
            self.scales[node.output[0]] = 1.0
            for name, number in zip(node.output[1:], (1.0, 0.0), strict=False):
                self.constant(np.float32(number), name)
        elif kind in _INTEGER_SUMS:
            self._sum_integers(node, *inputs)
        elif kind == "QLinearConv":
            weight = self._real(node, *inputs[3:6], axis=0)
            bias = [self._bias(node, inputs[8], inputs[1], inputs[4])] if len(inputs) > 8 and inputs[8] else []
            self._call(node, "Conv", [self._real(node, *inputs[:3]), weight, *bias], *inputs[6:8])
        elif kind == "QLinearConcat":
            parts = [self._real(node, *inputs[at : at + 3]) for at in range(2, len(inputs), 3)]
            self._call(node, "Concat", parts, *inputs[:2], keep={"axis"})
        elif kind == "QGemm":
            weight = self._real(node, *inputs[3:6], axis=0 if _attribute(node, "transB", 0) else 1)
            bias = [self._bias(node, inputs[6], inputs[1], inputs[4])] if len(inputs) > 6 and inputs[6] else []
            self._call(node, "Gemm", [self._real(node, *inputs[:3]), weight, *bias], *inputs[7:9])
        elif kind in _ONE_INPUT:
            if _attribute(node, "channels_last", 0):
                raise _refusal(node, "has its channels last")
            keep = {"axis"} if kind == "QLinearSoftmax" else set()
            self._call(node, _ONE_INPUT[kind], [self._real(node, *inputs[:3])], *inputs[3:5], keep=keep)
        else:
            last = kind == "QLinearMatMul"
            both = [self._real(node, *inputs[:3]), self._real(node, *inputs[3:6], axis=-1 if last else 0)]
            self._call(node, _TWO_INPUTS[kind], both, *inputs[6:8])

    def _keep(self, node: onnx.NodeProto, inputs: Sequence[str]) -> None:
        node.input[:] = inputs
        self.nodes.append(node)
        if node.op_type in _MOVES and inputs[0] in self.codes:
            self.codes.add(node.output[0])
        if node.op_type in _MOVES and inputs[0] in self.scales:
            self.scales[node.output[0]] = self.scales[inputs[0]]

    def _call(
        self,
        node: onnx.NodeProto,
        operator: str,
        inputs: Sequence[str],
        scale: str = "",
        zero: str = "",
        *,
        keep: set[str] | frozenset[str] = frozenset(),
    ) -> None:
        """An operator on real numbers, and the range that its result is kept in (none: it stays a float)."""
        result = f"{node.output[0]}/unbounded" if scale else node.output[0]
        called = helper.make_node(operator, inputs, [result], name=node.name)
        dropped = _QUANTISATION_ATTRIBUTES - keep
        called.attribute.extend(attribute for attribute in node.attribute if attribute.name not in dropped)
        self.nodes.append(called)
        if scale:
            self._bound(node, result, scale, zero)

    def _bound(self, node: onnx.NodeProto, x: str, scale: str, zero: str = "") -> None:
        """The node's output: ``x``, within what its codes reach."""
        step = self._number(node, scale, "scale")
        said = _attribute(node, "output_dtype", 0) or TensorProto.UINT8
        kind = self.constants[zero].data_type if zero in self.constants else said
        if kind not in _LIMITS:
            raise _refusal(node, f"quantises to {TensorProto.DataType.Name(kind)}")
        at = self._number(node, zero, "zero point") if zero else 0.0
        low, high = ((limit - at) * step for limit in _LIMITS[kind])
        opset = max(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset < 11:
            self.nodes.append(helper.make_node("Clip", [x], [node.output[0]], min=low, max=high))
        else:
            bounds = [self.constant(np.float32(limit)) for limit in (low, high)]
            self.add("Clip", [x, *bounds], node.output[0])
        self.scales[node.output[0]] = step

    def _real(self, node: onnx.NodeProto, x: str, scale: str, zero: str = "", *, axis: int = 0) -> str:
        """The name of what the codes ``x`` stand for; a constant's scales lie along ``axis``, where it has several."""
        if x in self.constants:
            codes = numpy_helper.to_array(self.constants[x]).astype(np.float32)
            along = [-1 if each == axis % codes.ndim else 1 for each in range(codes.ndim)]
            step, at = (self._array(node, name, what) for name, what in ((scale, "scale"), (zero, "zero point")))
            step, at = (array.reshape(along) if array.size > 1 else array for array in (step, at))
            return self.constant((codes - at) * step)
        if x not in self.codes:
            return x
        at_name = self.constant(np.float32(self._number(node, zero, "zero point") if zero else 0.0))
        centred = self.add("Sub", [x, at_name])
        return self.add("Mul", [centred, self.constant(np.float32(self._number(node, scale, "scale")))])

    def _bias(self, node: onnx.NodeProto, bias: str, scale: str, weight_scale: str) -> str:
        """A bias of 32-bit integers, whose scale is that of the products it is added to."""
        codes = numpy_helper.to_array(self.constants[bias]).astype(np.float32)
        return self.constant(codes * self._array(node, scale, "scale") * self._array(node, weight_scale, "scale"))

    def _sum_integers(self, node: onnx.NodeProto, x: str, w: str, x_zero: str = "", w_zero: str = "") -> None:
        """ConvInteger and MatMulInteger: their result is multiplied by the scales behind them."""
        sides = []
        for name, zero in ((x, x_zero), (w, w_zero)):
            if name in self.constants:
                codes = numpy_helper.to_array(self.constants[name]).astype(np.float32)
                at = self._array(node, zero, "zero point")
                if at.size > 1 and node.op_type == "ConvInteger":
                    at = at.reshape(-1, *(1,) * (codes.ndim - 1))
                sides.append(self.constant(codes - at))
            elif name in self.codes:
                at_name = self.constant(np.float32(self._number(node, zero, "zero point") if zero else 0.0))
                sides.append(self.add("Sub", [name, at_name]))
            elif name in self.scales:
                step = self.scales[name]
                sides.append(name if step == 1 else self.add("Div", [name, self.constant(np.float32(step))]))
            else:
                raise _refusal(node, f"multiplies {name!r}, whose scale is not known")
        self._call(node, _INTEGER_SUMS[node.op_type], sides)

    def _array(self, node: onnx.NodeProto, name: str, what: str) -> Array:
        if not name:
            return np.zeros((), np.float32)
        if name not in self.constants:
            raise _refusal(node, f"computes its {what}")
        return numpy_helper.to_array(self.constants[name]).astype(np.float32)

    def _number(self, node: onnx.NodeProto, name: str, what: str) -> float:
        array = self._array(node, name, what)
        if array.size != 1:
            raise _refusal(node, f"has a {what} for each channel of its activations")
        return float(array.item())

    def add(self, operator: str, inputs: Sequence[str], output: str = "") -> str:
        """A node, and the name of its result."""
        output = output or f"dequantised_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output]))
        return output

    def constant(self, value: Any, name: str = "") -> str:
        """A constant, and its name."""
        name = name or f"dequantised_constant_{len(self.added)}"
        tensor = numpy_helper.from_array(np.asarray(value, np.float32), name)
        self.added.append(tensor)
        self.constants[name] = tensor
        return name


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def _refusal(node: onnx.NodeProto, why: str) -> ModelError:
    return ModelError(
        f"the ONNX node {node.name or node.output[0]} ({node.op_type}) {why}, which is not supported; quantise the "
        "float32 model with onnxruntime.quantization.quantize_static, or take the float32 model"
    )
