"""What an ONNX file takes and gives: its image, which output has the class scores, what it says about itself."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from robustdice.errors import ModelError

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_ACTIVATIONS = {"Softmax", "LogSoftmax", "Sigmoid"}
_SAME = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Transpose"}
_NAME_KEYS = ("names", "classes", "labels", "class_names", "id2label")
_SIZE_KEYS = ("imgsz", "input_size", "image_size")
_TEXT_LIMIT = 1_000_000
"""Longest entry of a file's metadata that is read, in characters."""


@dataclass(frozen=True)
class Image:
    """The image that a model takes: ``batch`` is the batch size that the file fixes, or None; ``shape`` [channels,
    height, width], None where the file leaves a size open. ``channels_last``: in the file they come behind."""

    name: str
    batch: int | None
    shape: tuple[int | None, ...]
    channels_last: bool


def image_of(model: onnx.ModelProto) -> Image:
    """The only input of a model; ModelError when there are several, or when it is no float32 tensor."""
    inputs = model.graph.input
    if len(inputs) != 1:
        raise ModelError(
            f"the ONNX model has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}); robustdice runs "
            f"models of one image tensor. With the file alone: {_extract('[IMAGE]', '[SCORES]')} takes out what lies "
            "between"
        )
    tensor_type = inputs[0].type.tensor_type
    if tensor_type.elem_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(tensor_type.elem_type)
        raise ModelError(f"the ONNX model takes {kind} inputs; robustdice gives it pixels as float32 or uint8")
    # What says nothing about its shape is an image of any size; some makers write -1 for what is open.
    batch, *sizes = [size.dim_value if size.dim_value > 0 else None for size in tensor_type.shape.dim] or [None] * 4
    last = len(sizes) == 3 and sizes[2] in (1, 3) and sizes[0] not in (1, 3)
    shape = (sizes[2], *sizes[:2]) if last else tuple(sizes)
    return Image(inputs[0].name, batch, shape, last)


def choose_scores(model: onnx.ModelProto, results: Sequence[Any], batch: int) -> None:
    """Leave a model, in place, the one output that has the class scores, and what is needed for it.

    ``results`` are the outputs for some ``batch``. Of several, those that are no floats [batch, classes] do not count,
    nor features from which another one's layers compute the scores, nor what is made of the scores (the largest, say).
    ModelError when more than one is left.
    """
    outputs = [value.name for value in model.graph.output]
    if len(outputs) > 1:
        fits = [name for name, result in zip(outputs, results, strict=True) if _are_scores(result, batch)]
        left = [name for name in fits if not any(_is_made_of(model, name, other) for other in fits if other != name)]
        if len(left) != 1:
            keeping = _extract(repr([model.graph.input[0].name]), repr(outputs[:1]))
            raise ModelError(
                f"the ONNX model has {len(outputs)} outputs ({', '.join(outputs)}); robustdice needs one that gives "
                f"one score per class. With the file alone: {keeping} keeps the first"
            )
        chosen = next(value for value in model.graph.output if value.name == left[0])
        del model.graph.output[:]
        model.graph.output.append(chosen)
    needed, kept = {model.graph.output[0].name}, []
    for node in reversed(model.graph.node):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))


def _extract(inputs: str, outputs: str) -> str:
    return f"onnx.utils.extract_model('FILE.onnx', 'scores.onnx', {inputs}, {outputs})"


def _are_scores(result: Any, batch: int) -> bool:
    if not isinstance(result, np.ndarray) or result.dtype.kind != "f" or result.shape[:1] != (batch,):
        return False
    return len([size for size in result.shape[1:] if size != 1]) <= 1


def _is_made_of(model: onnx.ModelProto, one: str, other: str) -> bool:
    """Whether ``other`` makes ``one`` superfluous: it is computed from ``one`` by layers, or by an activation that
    says what the scores mean; or ``one`` is computed from it in any other way."""
    behind = _between(model, one, other)
    if behind is not None:
        kinds = {node.op_type for node in behind}
        return bool(kinds & _LAYERS) or kinds <= _ACTIVATIONS | _SAME
    before = _between(model, other, one)
    if before is None:
        return False
    kinds = {node.op_type for node in before}
    return not kinds & _LAYERS and not kinds <= _ACTIVATIONS | _SAME


def _between(model: onnx.ModelProto, start: str, end: str) -> list[onnx.NodeProto] | None:
    """The nodes on the ways from one tensor to another; None when there is no way."""
    reached, forward = {start}, []
    for node in model.graph.node:
        if not reached.isdisjoint(node.input):
            reached.update(node.output)
            forward.append(node)
    if end not in reached:
        return None
    needed, found = {end}, []
    for node in reversed(forward):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            found.append(node)
    return found


def metadata_of(model: onnx.ModelProto) -> dict[str, Any]:
    """What a file's metadata say about classes, size and normalisation, with a sidecar's keys.

    Exporters write class names as ``names`` = ``{0: 'cat', 1: 'dog'}`` or as a list, as JSON or as Python, or with
    commas or lines between them; ``imgsz`` = ``[height, width]`` or one number. What is not understood is left out.
    """
    texts = {entry.key.lower(): entry.value for entry in model.metadata_props if len(entry.value) <= _TEXT_LIMIT}
    found: dict[str, Any] = {}
    names = next((names for key in _NAME_KEYS if (names := _names(texts.get(key, "")))), None)
    if names:
        found["classes"] = names
    mean, std = (_numbers(texts.get(key, "")) for key in ("mean", "std"))
    if mean and std:
        scale = 255 if max(map(abs, mean)) > 4 else 1  # said of pixels from 0 to 255
        found |= {"mean": [number / scale for number in mean], "std": [number / scale for number in std]}
    size = next((size for key in _SIZE_KEYS if (size := _numbers(texts.get(key, "")))), [])
    if size and all(number >= 1 and number == int(number) for number in size):
        whole = [int(number) for number in size]
        found["size"] = whole * 2 if len(whole) == 1 else whole
    return found


def fitting(metadata: Mapping[str, Any], shape: Sequence[int | None], outputs: int) -> dict[str, Any]:
    """Of a file's metadata what fits the model: a size (channels, height and width) that it leaves open, as many names
    as it has outputs (two for one of a yes or no)."""
    found = {key: metadata[key] for key in ("mean", "std") if len(metadata.get(key, ())) == shape[0]}
    if len(metadata.get("classes", ())) == max(outputs, 2):
        found["classes"] = metadata["classes"]
    return found


def size_from(metadata: Mapping[str, Any], shape: Sequence[int | None]) -> list[int] | None:
    """The size of an image that metadata say, where the file's own ``shape`` leaves it open."""
    size = metadata.get("size", [])
    if None not in shape or len(shape) != 3 or len(size) not in (2, 3):
        return None
    whole = size if len(size) == 3 else [shape[0], *size]
    fits = all(own is None or own == said for own, said in zip(shape, whole, strict=True))
    return list(whole) if fits and None not in whole else None


def _literal(text: str) -> Any:
    """The value that JSON or Python text stands for; None when it stands for none."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return read(text)
    return None


def _names(text: str) -> list[str]:
    value = _literal(text.strip())
    if value is None and not text.lstrip().startswith(("{", "[")):
        value = [name.strip() for name in text.strip().split("\n" if "\n" in text.strip() else ",")]
    if isinstance(value, dict):
        try:
            numbered = {int(number): name for number, name in value.items()}
        except (TypeError, ValueError):
            return []
        value = [numbered.get(number) for number in range(len(numbered))]
    if not isinstance(value, (list, tuple)) or len(value) < 2 or not all(isinstance(name, str) for name in value):
        return []
    # Two classes of one name (ImageNet has two cranes) are told apart by their number.
    return [name if value.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(value)]


def _numbers(text: str) -> list[float]:
    value = _literal(text)
    several = value if isinstance(value, (list, tuple)) else [value]
    return [float(number) for number in several] if all(type(number) in (int, float) for number in several) else []
