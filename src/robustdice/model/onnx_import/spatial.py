"""ONNX operators over the axes of an image: convolutions, pooling, padding, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from robustdice.model.onnx_import.node import Node, Value, given, integers, number


def _pads(node: Node, x: torch.Tensor, kernel: Sequence[int]) -> list[tuple[int, int]]:
    """How much a convolution or pooling pads before and after, by axis."""
    automatic = node.get("auto_pad", b"NOTSET").decode()
    if automatic == "VALID":
        return [(0, 0)] * len(kernel)
    if automatic == "NOTSET":
        pads = node.get("pads") or [0] * 2 * len(kernel)
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    found = []
    for axis, size in enumerate(kernel):
        length = x.shape[2 + axis]
        stride, dilation = (node.get(key, [1] * len(kernel))[axis] for key in ("strides", "dilations"))
        both = max(0, (math.ceil(length / stride) - 1) * stride + dilation * (size - 1) + 1 - length)
        found.append((both // 2, both - both // 2) if automatic == "SAME_UPPER" else (both - both // 2, both // 2))
    return found


def _pad_spatial(x: torch.Tensor, pads: Sequence[tuple[int, int]], value: float) -> torch.Tensor:
    return functional.pad(x, [side for before, after in reversed(pads) for side in (before, after)], value=value)


def convolution(node: Node, x: torch.Tensor, weight: torch.Tensor, bias: Value = None) -> torch.Tensor:
    """Conv: padded differently on each side, the input is padded beforehand."""
    spatial = weight.ndim - 2
    pads = _pads(node, x, weight.shape[2:])
    padding = [before for before, _ in pads]
    if any(before != after for before, after in pads):
        x, padding = _pad_spatial(x, pads, 0.0), [0] * spatial
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
    strides, dilations = (node.get(key, [1] * spatial) for key in ("strides", "dilations"))
    return function(x, weight, bias, strides, padding, dilations, node.get("group", 1))


def transposed_convolution(node: Node, x: torch.Tensor, weight: torch.Tensor, bias: Value = None) -> torch.Tensor:
    """ConvTranspose, with the same padding on both sides."""
    spatial = weight.ndim - 2
    pads = _pads(node, x, weight.shape[2:])
    if node.get("output_shape") or any(before != after for before, after in pads):
        raise node.refuse("pads each side differently, which is not supported")
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[spatial - 1]
    strides, dilations = (node.get(key, [1] * spatial) for key in ("strides", "dilations"))
    extra = node.get("output_padding", [0] * spatial)
    return function(x, weight, bias, strides, [before for before, _ in pads], extra, node.get("group", 1), dilations)


def max_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    """MaxPool without indices; what is padded never wins."""
    kernel = node.get("kernel_shape")
    pads = _pads(node, x, kernel)
    padding = [before for before, _ in pads]
    if any(before != after or 2 * before > size for (before, after), size in zip(pads, kernel, strict=True)):
        x, padding = _pad_spatial(x, pads, -math.inf), [0] * len(kernel)
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    strides, dilations = (node.get(key, [1] * len(kernel)) for key in ("strides", "dilations"))
    pooled: torch.Tensor = function(x, kernel, strides, padding, dilations, ceil_mode=bool(node.get("ceil_mode", 0)))
    return pooled


def average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    """AveragePool: what is padded counts as zeros, or not at all."""
    kernel = node.get("kernel_shape")
    pads = _pads(node, x, kernel)
    padding, include = [before for before, _ in pads], bool(node.get("count_include_pad", 0))
    strides, ceil = node.get("strides", [1] * len(kernel)), bool(node.get("ceil_mode", 0))
    function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    if any(before != after or 2 * before > size for (before, after), size in zip(pads, kernel, strict=True)):
        pooled: torch.Tensor = function(_pad_spatial(x, pads, 0.0), kernel, strides, 0, ceil)
        if include:
            return pooled
        # The share of each window that lies on the image.
        shares = function(_pad_spatial(torch.ones(1, 1, *x.shape[2:]), pads, 0.0), kernel, strides, 0, ceil)
        return pooled / shares
    averaged: torch.Tensor = function(x, kernel, strides, padding, ceil, include)
    return averaged


def pad(node: Node, x: torch.Tensor, pads: Value = None, value: Value = None, axes: Value = None) -> torch.Tensor:
    """Pad, which early opsets tell by attributes."""
    amounts = given(node, "pads", pads)
    chosen = [axis % x.ndim for axis in integers(axes)] or list(range(x.ndim))
    sides = {axis: (amounts[i], amounts[i + len(chosen)]) for i, axis in enumerate(chosen)}
    first = min((axis for axis, both in sides.items() if any(both)), default=x.ndim)
    flat = [side for axis in reversed(range(first, x.ndim)) for side in sides.get(axis, (0, 0))]
    mode = node.get("mode", b"constant").decode()
    if not flat:
        return x
    if mode != "constant":
        return functional.pad(x, flat, {"edge": "replicate", "wrap": "circular"}.get(mode, mode))
    return functional.pad(x, flat, value=number(node.get("value") if value is None else value) or 0.0)


def resize(node: Node, x: torch.Tensor, *rest: Value) -> torch.Tensor:
    """Upsample, and Resize of opset 10 (scales) and later (region, scales, sizes), of the axes behind the second."""
    inputs = (*rest, None, None, None)
    scales, sizes = inputs[1:3] if len(rest) > 1 else (inputs[0], None)
    if sizes is not None:
        size = integers(sizes)[2:]
    else:
        factors = [float(factor) for factor in np.ravel(node.get("scales") if scales is None else scales)[2:]]
        size = [int(length * factor) for length, factor in zip(x.shape[2:], factors, strict=True)]
    mode = node.get("mode", b"nearest").decode()
    modern = len(rest) > 1
    where = node.get("coordinate_transformation_mode", b"half_pixel" if modern else b"asymmetric").decode()
    if mode == "nearest" and (
        where == "asymmetric" or all(to % n == 0 for n, to in zip(x.shape[2:], size, strict=True))
    ):
        return functional.interpolate(x, size, mode="nearest")
    aligned = where == "align_corners"
    if mode in ("linear", "cubic") and x.ndim == 4 and (aligned or where in ("half_pixel", "pytorch_half_pixel")):
        kind = {"linear": "bilinear", "cubic": "bicubic"}[mode]
        return functional.interpolate(x, size, mode=kind, align_corners=aligned)
    raise node.refuse(f"resizes {mode} with {where} coordinates, which is not supported")


def depth_to_space(node: Node, x: torch.Tensor) -> torch.Tensor:
    """DepthToSpace in both orders of channels."""
    if node.get("mode", b"DCR") == b"CRD":
        return functional.pixel_shuffle(x, node.get("blocksize"))
    size, (_, channels, height, width) = node.get("blocksize"), x.shape
    blocks = x.reshape(-1, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(-1, channels // size**2, height * size, width * size)


def space_to_depth(node: Node, x: torch.Tensor) -> torch.Tensor:
    """SpaceToDepth."""
    size, (_, channels, height, width) = node.get("blocksize"), x.shape
    blocks = x.reshape(-1, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(-1, channels * size**2, height // size, width // size)
