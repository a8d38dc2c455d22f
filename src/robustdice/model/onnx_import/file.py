"""An ``.onnx`` file as a PyTorch module, which torch.export then traces like any other."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxscript import optimizer

from robustdice.errors import ModelError, first_line
from robustdice.model.onnx_import.node import Node, Value
from robustdice.model.onnx_import.operators import TAKES_ARRAYS, TAKES_NUMBERS, run_node
from robustdice.runtime.executor import open_session

TOLERANCE = 1e-3
"""Largest relative difference between the module's scores and ONNX Runtime's: float32 sums in another order."""

Array = NDArray[Any]


class OnnxModule(torch.nn.Module):
    """The operators of an ONNX graph, run in order; its floating-point constants are parameters under their names.

    Images are [batch, channels, height, width], also where the file has the channels last. ``batch`` is the batch size
    that the file fixes, or None; ``input_shape`` the sizes of an image, None where the file leaves one open.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """ModelError when the graph is not one from an image tensor to class scores."""
        super().__init__()
        graph = model.graph
        constants: dict[str, Array] = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ModelError(
                f"the ONNX model has {len(inputs)} inputs and {len(graph.output)} outputs; "
                "robustdice runs models of one image tensor that give one score per class"
            )
        tensor_type = inputs[0].type.tensor_type
        if tensor_type.elem_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(tensor_type.elem_type)
            raise ModelError(f"the ONNX model takes {kind} inputs; robustdice takes float32 models")
        # What says nothing about its shape is an image of any size.
        batch, *sizes = [size.dim_value or None for size in tensor_type.shape.dim] or [None] * 4
        self.batch: int | None = batch
        self.channels_last = len(sizes) == 3 and sizes[2] in (1, 3) and sizes[0] not in (1, 3)
        self.input_shape: tuple[int | None, ...] = tuple([sizes[2], *sizes[:2]] if self.channels_last else sizes)
        self._input, self._output = inputs[0].name, graph.output[0].name
        self._paths: dict[str, str] = {}  # of the parameters, by the constants' names
        self._steps: list[tuple[Node, list[Value]]] = []
        opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        for proto in graph.node:
            node = _node(proto, opset, batch)
            if node.operator == "Constant":
                constants[node.outputs[0]] = _constant(node)
            else:
                node = _with_turned_weight(node, constants)
                self._steps.append((node, [self._argument(node, name, constants) for name in node.inputs]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores [batch, classes] of ``images`` [batch, *input_shape]."""
        result = self._run(images).get(self._output)
        if not isinstance(result, torch.Tensor):
            raise ModelError("the ONNX model's output does not depend on its input")
        return result

    def turn_gathers_into_reshapes(self, images: torch.Tensor) -> None:
        """Make each Gather that takes all entries of a flattened tensor in their order the Reshape that it is.

        So exporters write views by strides, with indices that depend on the batch; ``images`` show which these are.
        """
        values = self._run(images)
        for number, (node, arguments) in enumerate(self._steps):
            if node.operator != "Gather" or not isinstance(arguments[1], _Computed):
                continue
            source, indices = (self._value(argument, values) for argument in arguments)
            if np.shape(indices)[:1] == (len(images),) and np.array_equal(np.ravel(indices), np.arange(len(source))):
                shape = np.array([-1, *np.shape(indices)[1:]])
                self._steps[number] = (replace(node, operator="Reshape", attributes={}), [arguments[0], shape])
        needed = {self._output}
        for number in reversed(range(len(self._steps))):
            node, arguments = self._steps[number]
            if needed.isdisjoint(node.outputs):
                del self._steps[number]
            else:
                needed.update(argument.name for argument in arguments if isinstance(argument, _Computed))

    def _run(self, images: torch.Tensor) -> dict[str, Value]:
        values: dict[str, Value] = {self._input: images.permute(0, 2, 3, 1) if self.channels_last else images}
        for node, arguments in self._steps:
            results = run_node(node, [self._value(argument, values) for argument in arguments])
            values.update(zip(node.outputs, results, strict=False))  # outputs for training may be named, or left out
        return values

    def _value(self, argument: Value, values: Mapping[str, Value]) -> Value:
        if isinstance(argument, _Computed):
            if argument.name not in values:
                raise ModelError(f"the ONNX model reads {argument.name!r} before anything has computed it")
            return values[argument.name]
        # Read from the module each time: so torch.export sees a parameter, and not a constant.
        return self.get_parameter(argument.path) if isinstance(argument, _Parameter) else argument

    def _argument(self, node: Node, name: str, constants: Mapping[str, Array]) -> Value:
        if name not in constants:
            return _Computed(name) if name else None
        constant = constants[name]
        if constant.dtype.kind != "f" or node.operator in TAKES_ARRAYS:
            return constant
        if constant.dtype != np.float32:
            raise ModelError(f"the ONNX model's {name!r} is {constant.dtype}; robustdice takes float32 models")
        if constant.size == 1 and node.operator in TAKES_NUMBERS:
            return float(constant.item())
        if name not in self._paths:
            self._paths[name] = self._register(name, constant)
        return _Parameter(self._paths[name])

    def _register(self, name: str, constant: Array) -> str:
        """Make a constant a parameter; its path in the module follows the dots in its name."""
        *modules, own = [re.sub(r"\W", "_", part) or "_" for part in name.split(".")]
        holder: torch.nn.Module = self
        path = []
        for part in modules:
            step = _free(holder, part, torch.nn.Module)
            if not hasattr(holder, step):
                holder.add_module(step, torch.nn.Module())
            holder = holder.get_submodule(step)
            path.append(step)
        own = _free(holder, own)
        value = torch.tensor(constant, dtype=torch.float32)
        holder.register_parameter(own, torch.nn.Parameter(value, requires_grad=False))
        return ".".join((*path, own))


@dataclass(frozen=True)
class _Computed:
    """The value of that name."""

    name: str


@dataclass(frozen=True)
class _Parameter:
    """The module's parameter at that path."""

    path: str


def load_onnx(path: Path, input_size: Sequence[int] | None = None) -> tuple[OnnxModule, tuple[int, ...]]:
    """The model of an ``.onnx`` file (with the weights that it keeps beside itself, if it does) as a module, and the
    shape of an image; ``input_size`` is that shape where the file leaves it open.

    The module gives random images the scores that ONNX Runtime gives them. ModelError when it does not, when the file
    is damaged, or holds what is not supported.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # whatever a damaged file, or one without its weights, makes the parser raise
        raise ModelError(f"{path} is not an ONNX model: {first_line(error)}") from None
    with contextlib.suppress(Exception):  # what it cannot simplify (inline functions, fold constants) stays as it is
        model = optimizer.optimize(model)
    module = OnnxModule(model)
    fixed = module.input_shape
    if None in fixed and (input_size is None or len(input_size) != len(fixed)):
        raise ModelError(f"{path} leaves the size of its images open; say it with --size, as in --size 3,224,224")
    shape = tuple(size or int(said) for size, said in zip(fixed, input_size or fixed, strict=False))  # type: ignore[arg-type]
    images = torch.randn(module.batch or 3, *shape, generator=torch.Generator().manual_seed(0))
    module.turn_gathers_into_reshapes(images)
    _check_beside_runtime(module, path, images)
    return module, shape


def _check_beside_runtime(module: OnnxModule, path: Path, images: torch.Tensor) -> None:
    try:
        session = open_session(path, threads=0)
        given = images.permute(0, 2, 3, 1) if module.channels_last else images
        (expected,) = session.run(None, {session.get_inputs()[0].name: given.contiguous().numpy()})
    except Exception as error:  # ONNX Runtime's exceptions have no common root below Exception
        raise ModelError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from None
    with torch.no_grad():
        found = module(images).numpy()
    if not np.isfinite(expected).all():
        raise ModelError("the model's scores for random images are not finite; look for NaN or infinity in its weights")
    scale = max(float(np.abs(expected).max()), 1e-12)
    if found.shape != expected.shape or not float(np.abs(found - expected).max()) <= TOLERANCE * scale:
        raise ModelError(
            f"{path} gives other scores in ONNX Runtime than its operators read as PyTorch's do; "
            "export the model to a .pt2 file from where it was made"
        )


def _node(proto: onnx.NodeProto, opset: int, batch: int | None) -> Node:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute}
    own = proto.domain in ("", "ai.onnx")
    operator = proto.op_type if own else f"{proto.domain}.{proto.op_type}"
    return Node(proto.name, operator, tuple(proto.input), tuple(proto.output), attributes, opset, batch)


def _constant(node: Node) -> Array:
    """The value of a Constant node, whichever of its attributes it stands in."""
    ((_, value),) = node.attributes.items()
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)


def _with_turned_weight(node: Node, constants: dict[str, Array]) -> Node:
    """A product with a constant matrix as a linear layer has it: [outputs, inputs], so that neurons come first.

    The turned matrix is added to ``constants``.
    """
    turned = node.operator == "MatMul" or (node.operator == "Gemm" and not node.get("transB", 0))
    if not turned or node.inputs[1] not in constants or constants[node.inputs[1]].ndim != 2:
        return node
    name = f"{node.inputs[1]}.weight"
    constants[name] = constants[node.inputs[1]].T
    operator = "Linear" if node.operator == "MatMul" else "Gemm"
    inputs = (node.inputs[0], name, *node.inputs[2:])
    return replace(node, operator=operator, inputs=inputs, attributes={**node.attributes, "transB": 1})


def _free(holder: torch.nn.Module, name: str, kind: type | None = None) -> str:
    """``name``, with underscores behind it until the module has nothing of that name, or has a ``kind``."""
    while hasattr(holder, name) and not (kind and isinstance(getattr(holder, name), kind)):
        name += "_"
    return name
