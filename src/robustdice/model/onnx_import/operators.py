"""ONNX operators as torch operations: a table from operator names to functions of a node and its inputs' values.

Where operators differ between opsets, a function takes both forms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch.nn import functional

from robustdice.errors import ModelError, first_line
from robustdice.model.onnx_import import spatial
from robustdice.model.onnx_import.node import Node, Operator, Value, given, integers, number


def run_node(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
    """What a node makes of its inputs' values; ModelError when it, or this use of it, is not supported."""
    function = OPERATORS.get(node.operator)
    if function is None:
        raise node.refuse("is an operator that is not supported")
    try:
        result = function(node, *values)
    except ModelError:
        raise
    except Exception as error:  # whatever torch makes of inputs that do not fit, or of attributes that are not there
        raise node.refuse(f"cannot be run: {first_line(error)}") from None
    return result if isinstance(result, tuple) else (result,)


def _tensor(value: Value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value).tolist())


def _elementwise(of_tensors: Operator, of_sizes: Operator) -> Operator:
    def run(_: Node, *values: Value) -> Value:
        if not any(isinstance(value, torch.Tensor) for value in values):
            return of_sizes(*values)
        # Nothing but whole numbers of more than one entry is left that torch does not take as it is.
        plain = [v.item() if isinstance(v, np.ndarray) and v.size == 1 else v for v in values]
        return of_tensors(*(_tensor(v) if isinstance(v, np.ndarray) else v for v in plain))

    return run


def _unary(function: Operator) -> Operator:
    return lambda _, x: function(x)


def _many(function: Operator) -> Operator:
    """An elementwise operator of any number of inputs."""

    def run(_: Node, *values: Value) -> Value:
        result = _tensor(values[0])
        for value in values[1:]:
            result = function(result, _tensor(value))
        return result

    return run


def _divide(a: Value, b: Value) -> Value:
    return np.floor_divide(a, b) if np.asarray(a).dtype.kind in "iO" else np.divide(a, b)


def _cast(node: Node, x: Value) -> Value:
    kind = onnx.helper.tensor_dtype_to_np_dtype(node.get("to"))
    if not isinstance(x, torch.Tensor):
        array = np.asarray(x)
        return array if kind.kind in "iu" and array.dtype.kind in "iO" else array.astype(kind)
    return x.to(getattr(torch, kind.name))


def _global_pool(reduce: Operator) -> Operator:
    return lambda _, x: reduce(x, list(range(2, x.ndim)), True)


def _gemm(node: Node, a: torch.Tensor, b: torch.Tensor, c: Value = None) -> torch.Tensor:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if node.get("transA", 0):
        raise node.refuse("transposes its activations, which is not supported")
    b = b if node.get("transB", 0) else b.t()
    if isinstance(c, torch.Tensor) and c.shape == (1, b.shape[0]):
        c = c.flatten()
    if alpha == 1 and (c is None or (beta == 1 and c.shape == (b.shape[0],))):
        return functional.linear(a, b, c)
    product: torch.Tensor = alpha * functional.linear(a, b)
    return product if c is None else product + beta * c


def _batch_norm(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    if node.get("training_mode", 0):
        raise node.refuse("learns")
    return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=node.get("epsilon", 1e-5))


def _layer_norm(node: Node, x: torch.Tensor, scale: Value, bias: Value = None) -> torch.Tensor:
    shape = list(x.shape[node.get("axis", -1) % x.ndim :])
    return functional.layer_norm(x, shape, scale, bias, node.get("epsilon", 1e-5))


def _group_norm(node: Node, x: torch.Tensor, scale: Value, bias: Value) -> torch.Tensor:
    return functional.group_norm(x, node.get("num_groups"), scale, bias, node.get("epsilon", 1e-5))


def _instance_norm(node: Node, x: torch.Tensor, scale: Value, bias: Value) -> torch.Tensor:
    return functional.group_norm(x, x.shape[1], scale, bias, node.get("epsilon", 1e-5))


def _local_response_norm(node: Node, x: torch.Tensor) -> torch.Tensor:
    return functional.local_response_norm(
        x, node.get("size"), node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    )


def _parametric_relu(_: Node, x: torch.Tensor, slope: Value) -> torch.Tensor:
    return functional.leaky_relu(x, slope) if isinstance(slope, float) else functional.prelu(x, slope.flatten())


def _clip(node: Node, x: torch.Tensor, low: Value = None, high: Value = None) -> torch.Tensor:
    lowest, highest = (number(node.get(k) if v is None else v) for k, v in (("min", low), ("max", high)))
    return x if lowest is None and highest is None else torch.clamp(x, lowest, highest)


def _hard_sigmoid(node: Node, x: torch.Tensor) -> torch.Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return functional.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def _softmax(function: Operator) -> Operator:
    def run(node: Node, x: torch.Tensor) -> torch.Tensor:
        if node.opset >= 13 or (x.ndim == 2 and node.get("axis", 1) in (1, -1)):
            return function(x, node.get("axis", -1))  # type: ignore[no-any-return]
        axis = node.get("axis", 1) % x.ndim  # over all axes from this one on
        return function(x.flatten(axis), axis).reshape(x.shape)  # type: ignore[no-any-return]

    return run


def _reduce(function: Operator) -> Operator:
    def run(node: Node, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
        chosen = given(node, "axes", axes)
        if not chosen and node.get("noop_with_empty_axes", 0):
            return x
        return function(x, chosen or list(range(x.ndim)), bool(node.get("keepdims", 1)))  # type: ignore[no-any-return]

    return run


def _reshape(node: Node, x: Value, shape: Value) -> Value:
    if not isinstance(x, torch.Tensor):
        return np.asarray(x).reshape(integers(shape))
    sizes = integers(shape)
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(sizes)]
    # A file that fixes the batch size has it in its shapes; here any batch is computed.
    if node.batch is not None and isinstance(sizes[0], int) and sizes[0] == node.batch and len(sizes) > 1:
        sizes[0] = x.shape[0]
    return x.reshape(sizes)


def _flatten(node: Node, x: torch.Tensor) -> torch.Tensor:
    axis = node.get("axis", 1) % (x.ndim + 1)
    return x.flatten(1) if axis == 1 else x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.permute(node.get("perm", list(range(x.ndim))[::-1]))


def _squeeze(node: Node, x: Value, axes: Value = None) -> Value:
    chosen = given(node, "axes", axes)
    if not isinstance(x, torch.Tensor):
        return np.squeeze(x, tuple(chosen) or None)
    return x.squeeze(chosen or [axis for axis in range(1, x.ndim) if isinstance(n := x.shape[axis], int) and n == 1])


def _unsqueeze(node: Node, x: Value, axes: Value = None) -> Value:
    chosen = given(node, "axes", axes)
    if not isinstance(x, torch.Tensor):
        return np.expand_dims(x, tuple(chosen))
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _concat(node: Node, *values: Value) -> Value:
    if any(isinstance(value, torch.Tensor) for value in values):
        return torch.cat([_tensor(value) for value in values], node.get("axis"))
    return np.concatenate([np.atleast_1d(value) for value in values], node.get("axis"))


def _split(node: Node, x: torch.Tensor, sizes: Value = None) -> Value:
    axis = node.get("axis", 0)
    chosen = given(node, "split", sizes)
    return torch.split(x, chosen or -(-x.shape[axis] // len(node.outputs)), axis)


def _slice(
    node: Node, x: Value, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Value:
    starts, ends = given(node, "starts", starts), given(node, "ends", ends)
    axes = given(node, "axes", axes) or list(range(len(starts)))
    steps = integers(steps) or [1] * len(starts)
    places = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step > 0 or not isinstance(x, torch.Tensor):
            places[axis] = slice(start, end, step)
        elif isinstance(x.shape[axis], int):
            backwards = range(*slice(start, end, step).indices(x.shape[axis]))
            x = x.index_select(axis, torch.tensor(backwards, dtype=torch.int64))
        else:
            raise node.refuse("turns the images of a batch around, which is not supported")
    return x[tuple(places)]


def _gather(node: Node, x: Value, indices: Value) -> Value:
    axis = node.get("axis", 0)
    if not isinstance(x, torch.Tensor):
        return np.take(x, np.asarray(indices).astype(np.int64), axis)
    chosen = np.asarray(indices)
    if chosen.ndim == 0:
        return x.select(axis, int(chosen))
    picked = x.index_select(axis, torch.as_tensor(chosen.astype(np.int64).ravel() % x.shape[axis]))
    return picked.reshape(*x.shape[:axis], *chosen.shape, *x.shape[axis + 1 :]) if chosen.ndim > 1 else picked


def _shape(node: Node, x: Value) -> Value:
    sizes = np.empty(x.ndim, dtype=object)
    sizes[:] = list(x.shape)
    return sizes[node.get("start", 0) : node.get("end")]


def _range(node: Node, start: Value, end: Value, step: Value) -> Value:
    first, last, by = (np.asarray(value).item() for value in (start, end, step))
    if isinstance(last, torch.SymInt):
        raise node.refuse("counts the images of the batch, which is not supported")
    return np.arange(first, last, by)


def _constant_of_shape(node: Node, shape: Value) -> Value:
    given = node.get("value")
    value = 0.0 if given is None else onnx.numpy_helper.to_array(given).item()
    if isinstance(value, int):
        return np.full(integers(shape), value, dtype=object)
    return torch.full(integers(shape), value)


def _expand(_: Node, x: Value, shape: Value) -> torch.Tensor:
    tensor = _tensor(x)
    broadcast: Any = torch.broadcast_shapes
    return tensor.expand(broadcast(tensor.shape, tuple(integers(shape))))


OPERATORS: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _elementwise(torch.add, np.add),
    "And": _elementwise(torch.logical_and, np.logical_and),
    "AveragePool": spatial.average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": _unary(torch.ceil),
    "Celu": lambda node, x: functional.celu(x, node.get("alpha", 1.0)),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": spatial.convolution,
    "ConvTranspose": spatial.transposed_convolution,
    "DepthToSpace": spatial.depth_to_space,
    "Div": _elementwise(torch.div, _divide),
    "Dropout": lambda _, x, *__: x,
    "Elu": lambda node, x: functional.elu(x, node.get("alpha", 1.0)),
    "Equal": _elementwise(torch.eq, np.equal),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _unary(torch.floor),
    "Gather": _gather,
    "Gelu": lambda node, x: functional.gelu(x, approximate=node.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "Greater": _elementwise(torch.gt, np.greater),
    "GreaterOrEqual": _elementwise(torch.ge, np.greater_equal),
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "Identity": lambda _, x: x,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, x: functional.leaky_relu(x, node.get("alpha", 0.01)),
    "Less": _elementwise(torch.lt, np.less),
    "LessOrEqual": _elementwise(torch.le, np.less_equal),
    "Linear": lambda _, x, weight: functional.linear(x, weight),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": lambda _, a, b: torch.matmul(a, b),
    "Max": _many(torch.maximum),
    "MaxPool": spatial.max_pool,
    "Min": _many(torch.minimum),
    "Mish": _unary(functional.mish),
    "Mod": _elementwise(torch.remainder, np.mod),
    "Mul": _elementwise(torch.mul, np.multiply),
    "Neg": _elementwise(torch.neg, np.negative),
    "Not": _elementwise(torch.logical_not, np.logical_not),
    "Or": _elementwise(torch.logical_or, np.logical_or),
    "PRelu": _parametric_relu,
    "Pad": spatial.pad,
    "Pow": _elementwise(torch.pow, np.power),
    "Range": _range,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": _unary(functional.relu),
    "Round": _unary(torch.round),
    "Reshape": _reshape,
    "Resize": spatial.resize,
    "Selu": _unary(functional.selu),
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": _unary(functional.softplus),
    "Softsign": _unary(functional.softsign),
    "SpaceToDepth": spatial.space_to_depth,
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(torch.sub, np.subtract),
    "Sum": _many(operator.add),
    "Swish": lambda node, x: x * torch.sigmoid(node.get("alpha", 1.0) * x),
    "Tanh": _unary(torch.tanh),
    "ThresholdedRelu": lambda node, x: torch.where(x > node.get("alpha", 1.0), x, 0.0),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": spatial.resize,
    "Where": _elementwise(torch.where, np.where),
}
"""Operators by name, those of the default domain; ``Linear`` is a MatMul with a constant matrix, transposed."""

TAKES_ARRAYS = frozenset({"Resize", "Upsample"})
"""Operators that read their constants as numbers: they get NumPy arrays, and not parameters."""
TAKES_NUMBERS = frozenset(
    {"Add", "Clip", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "PRelu"}
    | {"Pad", "Pow", "Sub", "Where"}
)
"""Operators that get a constant of one number as a float: as parameters such would stand in the way of tails."""
