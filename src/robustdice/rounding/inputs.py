"""What the filters of a layer are multiplied with."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from robustdice.model.canonical import CONVOLUTIONS, arguments, per_axis
from robustdice.model.layers import NetworkLayer

MAX_COLUMNS = 8_192
"""So many inputs of a filter say enough where they are wide; of more, some are taken at even distances."""
MOST_COLUMNS, MAX_NUMBERS = 16_384, 2**23
"""Of narrow ones so many, as long as neither they nor what is to come out for them are more numbers than that: there
more inputs are worth something and cost little."""


def columns(layer: NetworkLayer, x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor | None:
    """The inputs of a layer's filters when the layer reads ``x``: float32 [groups, columns, K], where a convolution
    that is not grouped has one group. ``size`` is the shape of the filters, [neurons, ...]. None for a convolution
    along three axes, for which there is no such function."""
    if layer.node.target not in CONVOLUTIONS.values():
        found = x.reshape(1, -1, x.shape[-1])
        return found[:, :: -(-found.shape[1] // _enough(max(size[0], found.shape[-1])))]
    if layer.node.target is CONVOLUTIONS[3]:
        return None
    _, _, _, stride, padding, dilation, groups = arguments(layer.node, None, None, None, 1, 0, 1, 1)
    kernel = size[2:]
    steps = [per_axis(each, len(kernel)) for each in (stride, padding, dilation)]
    if layer.node.target is CONVOLUTIONS[1]:
        x, kernel = x[:, :, None], (1, *kernel)
        steps = [(neutral, *each) for neutral, each in zip((1, 0, 1), steps, strict=True)]
    windows = functional.pad(x, (steps[1][1], steps[1][1], steps[1][0], steps[1][0]))
    for axis, (width, stride, apart) in enumerate(zip(kernel, steps[0], steps[2], strict=True), start=2):
        windows = windows.unfold(axis, (width - 1) * apart + 1, stride)[..., ::apart]
    windows = windows.permute(0, 2, 3, 1, 4, 5)  # [images, height, width, channels, *kernel], a view
    _, high, wide = windows.shape[:3]
    every = -(-len(x) * high * wide // _enough(max(x.shape[1] * math.prod(kernel), size[0])))
    taken = [torch.arange(number % every, high * wide, every) for number in range(len(x))]
    images = torch.arange(len(x)).repeat_interleave(torch.tensor([len(some) for some in taken]))
    places = torch.cat(taken)
    found = windows[images, places // wide, places % wide]
    return found.reshape(len(found), groups, -1).transpose(0, 1)


def _enough(numbers: int) -> int:
    """How many places are looked at, at each of which all filters of a layer read, or give, so many ``numbers``."""
    return min(MOST_COLUMNS, max(MAX_COLUMNS, MAX_NUMBERS // numbers))
