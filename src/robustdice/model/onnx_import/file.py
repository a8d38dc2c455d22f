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
from robustdice.model.onnx_import.interface import Image, choose_scores, fitting, image_of, metadata_of, size_from
from robustdice.model.onnx_import.node import Node, Value
from robustdice.model.onnx_import.operators import OPERATORS, TAKES_ARRAYS, TAKES_NUMBERS, run_node
from robustdice.model.onnx_import.prepare import bring_up_to_date, opset_of, simplify
from robustdice.runtime.sessions import open_session

TOLERANCE = 1e-3
"""Largest relative difference between the module's scores and ONNX Runtime's: float32 sums in another order."""
QUANTISED_TOLERANCE = 0.5
"""Largest length of the difference, over that of the scores, of a file that rounds to few bits: misreading one gives
about 1.4, as any two scores do."""

Array = NDArray[Any]


class OnnxModule(torch.nn.Module):
    """The operators of an ONNX graph, run in order; its floating-point constants are parameters under their names.

    Images are [batch, channels, height, width], also where the file has the channels last.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """``model`` has one input and one output; ModelError when the input is no image tensor."""
        super().__init__()
        graph = model.graph
        constants: dict[str, Array] = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.image = image_of(model)
        self._output = graph.output[0].name
        self._paths: dict[str, str] = {}  # of the parameters, by the constants' names
        self._steps: list[tuple[Node, list[Value]]] = []
        self.opset = opset_of(model)
        for proto in graph.node:
            node = _with_turned_weight(_node(proto, self.opset, self.image.batch), constants)
            self._steps.append((node, [self._argument(node, name, constants) for name in node.inputs]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores [batch, classes] of ``images`` [batch, channels, height, width]."""
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
        values: dict[str, Value] = {self.image.name: _as_in_file(self.image, images)}
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


def load_onnx(
    path: Path, input_size: Sequence[int] | None = None
) -> tuple[OnnxModule, tuple[int, ...], dict[str, Any]]:
    """The model of an ``.onnx`` file (with the weights that it keeps beside itself, if it does) as a module, the shape
    of an image, and what the file's metadata say (keys as in a sidecar); ``input_size`` is that shape where the file
    leaves it open.

    The module gives random images the scores that ONNX Runtime gives them. ModelError when it does not, when the file
    is damaged, or holds what is not supported.
    """
    try:
        original = onnx.load(path)
    except Exception as error:  # whatever a damaged file, or one without its weights, makes the parser raise
        raise ModelError(
            f"{path} is not an ONNX model, or not all of one (a file of weights beside it belongs to it): "
            f"{first_line(error)}"
        ) from None
    given_types = {value.name: value.type.tensor_type.elem_type for value in original.graph.input}
    model = bring_up_to_date(original)
    weights = {tensor.name for tensor in model.graph.initializer}
    unread = given_types.keys() - weights - {value.name for value in model.graph.input}
    rewritten = model is not original or bool(unread)
    with contextlib.suppress(Exception):  # what it cannot simplify (inline functions, fold constants) stays as it is
        model = optimizer.optimize(model)
    rewritten |= simplify(model)
    image, metadata = image_of(model), metadata_of(model)
    size = input_size or size_from(metadata, image.shape)
    if None in image.shape and (size is None or len(size) != len(image.shape)):
        raise ModelError(f"{path} leaves the size of its images open; say it with --size, as in --size 3,224,224")
    shape = tuple(own or int(said) for own, said in zip(image.shape, size or image.shape, strict=False))  # type: ignore[arg-type]
    images = torch.rand(image.batch or 3, *shape, generator=torch.Generator().manual_seed(0))
    given = _as_in_file(image, images).contiguous().numpy()
    try:
        expected = _run(path, model.SerializeToString() if rewritten else path, given)
    except ModelError:
        _check_operators(model, image)  # which say better what is wrong
        raise
    choose_scores(model, list(expected.values()), len(images))
    scores = expected[model.graph.output[0].name]
    module = OnnxModule(model)
    module.turn_gathers_into_reshapes(images)
    _check_beside_runtime(module, path, images, scores)
    kind = given_types[image.name]
    if rewritten and module.opset == opset_of(original):
        _check_original(path, given, kind, scores, model.graph.output[0].name)
    return module, shape, fitting(metadata, shape, scores.size // len(images))


def _check_operators(model: onnx.ModelProto, image: Image) -> None:
    for proto in model.graph.node:
        node = _node(proto, opset_of(model), image.batch)
        if node.operator not in OPERATORS:
            raise node.refuse("is an operator that is not supported")


def _run(path: Path, source: Path | bytes, images: Array) -> dict[str, Any]:
    """What ONNX Runtime computes, by the outputs' names."""
    try:
        session = open_session(source, threads=0)
        results = session.run(None, {session.get_inputs()[0].name: images})
    except Exception as error:  # ONNX Runtime's exceptions have no common root below Exception
        raise ModelError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from None
    return dict(zip([output.name for output in session.get_outputs()], results, strict=True))


def _check_beside_runtime(module: OnnxModule, path: Path, images: torch.Tensor, expected: Any) -> None:
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


def _check_original(path: Path, images: Array, kind: int, found: Array, output: str) -> None:
    """That a file of few bits is not misread: its own arithmetic gives scores near those of real numbers."""
    given = (images * 255).round() if kind == onnx.TensorProto.UINT8 else images
    try:
        expected = _run(path, path, given.astype(helper.tensor_dtype_to_np_dtype(kind)))[output]
    except ModelError:  # half precision, say, which ONNX Runtime has not for every operator
        return
    if expected.dtype.kind in "iu":  # codes
        return
    expected = expected.astype(np.float32)
    if not float(np.linalg.norm(found - expected)) <= QUANTISED_TOLERANCE * float(np.linalg.norm(expected)):
        raise ModelError(
            f"{path} gives other scores in ONNX Runtime than its quantised operators read as those of real numbers do; "
            "take the float32 model that it was made of"
        )


def _as_in_file(image: Image, images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1) if image.channels_last else images


def _node(proto: onnx.NodeProto, opset: int, batch: int | None) -> Node:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute}
    own = proto.domain in ("", "ai.onnx")
    operator = proto.op_type if own else f"{proto.domain}.{proto.op_type}"
    return Node(proto.name, operator, tuple(proto.input), tuple(proto.output), attributes, opset, batch)


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
