"""What the filters of a layer are multiplied with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from robustdice.model.canonical import CONVOLUTIONS, arguments
from robustdice.model.layers import NetworkLayer

MAX_COLUMNS = 20_000
"""So many inputs of a filter say enough; of more, some are taken at even distances."""


def columns(layer: NetworkLayer, x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor | None:
    """The inputs of a layer's filters when the layer reads ``x``: float32 [groups, columns, K], where a convolution
    that is not grouped has one group. ``size`` is the shape of the filters, [neurons, ...]. None for a convolution
    along three axes, for which there is no such function."""
    if layer.node.target not in CONVOLUTIONS.values():
        return _thinned(x.reshape(1, -1, x.shape[-1]))
    if layer.node.target is CONVOLUTIONS[3]:
        return None
    _, _, _, stride, padding, dilation, groups = arguments(layer.node, None, None, None, 1, 0, 1, 1)
    kernel = size[2:]
    steps = [_per_axis(each, len(kernel)) for each in (stride, padding, dilation)]
    if layer.node.target is CONVOLUTIONS[1]:
        x, kernel = x[:, :, None], (1, *kernel)
        steps = [(neutral, *each) for neutral, each in zip((1, 0, 1), steps, strict=True)]
    parts = []
    every = max(1, len(x) * math.prod(layer.own_shape[1:]) // MAX_COLUMNS)
    for number in range(len(x)):  # image by image: all inputs of a large map at once would not fit into memory
        image = x[number : number + 1].contiguous()
        found = functional.unfold(image, kernel, stride=steps[0], padding=steps[1], dilation=steps[2])[0]
        some = found[:, number % every :: every]
        parts.append(some.reshape(groups, -1, some.shape[1]))
    return torch.cat(parts, 2).transpose(1, 2)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers


def _thinned(found: torch.Tensor) -> torch.Tensor:
    return found[:, :: max(1, found.shape[1] // MAX_COLUMNS)]
