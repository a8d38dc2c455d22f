"""An operator of an ONNX graph, and what operators read from their inputs.

Sizes are not tensors here: what ONNX computes of shapes and other integers is a NumPy array, whose entries are
numbers or, while torch.export traces, symbolic sizes. Everything else is a tensor, or a float where a constant is one
number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robustdice.errors import ModelError

Value = Any
"""A tensor, a float (a constant of one number), a NumPy array (integers), or None (an optional input left out)."""
Operator = Callable[..., Value]
"""From a :class:`Node` and its inputs' values to the value of its output, or a tuple of those of its outputs."""


@dataclass(frozen=True)
class Node:
    """An operator with what it is called with. ``batch`` is the batch size that the file fixes, or None."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    opset: int
    batch: int | None

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute, or ``default``."""
        return self.attributes.get(key, default)

    def refuse(self, why: str) -> ModelError:
        """The error for a use of the operator that is not supported."""
        return ModelError(
            f"the ONNX node {self.name or self.outputs[0]} ({self.operator}) {why}; "
            "export the model to a .pt2 file from where it was made, or, where class scores are computed before this "
            "node, take them out of the file: onnx.utils.extract_model('FILE.onnx', 'scores.onnx', ['IMAGE'], "
            f"{[name for name in self.inputs if name][:1]})"
        )


def integers(value: Value) -> list[Any]:
    """A list of sizes, from an attribute or a value."""
    if isinstance(value, torch.Tensor):
        raise ModelError("the ONNX model computes a shape from its activations; only fixed shapes are supported")
    return [] if value is None else np.asarray(value).ravel().tolist()


def number(value: Value) -> float | None:
    """A float, from an attribute or a value."""
    return None if value is None else float(value)


def given(node: Node, key: str, value: Value) -> list[Any]:
    """What is an attribute in early opsets and an input in later ones."""
    return integers(node.get(key) if value is None else value)
