"""Which operations act on every neuron by itself, and where the neurons then lie.

A tail is made of such operations: a device that holds some neurons of a layer can run the tail on those alone.
One function per kind of operation takes the node and the :class:`Channels` of its input and returns
the :class:`Channels` of its output, or None when this use of the operation mixes neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from robustdice.model.canonical import arguments, aten
from robustdice.model.execute import Shapes


@dataclass(frozen=True)
class ParameterSlice:
    """A parameter with one neuron after the other along ``axis``, ``features`` entries each."""

    name: str
    axis: int
    features: int = 1


@dataclass(frozen=True)
class Channels:
    """A value made of neurons: ``neurons`` of them along ``axis``, ``features`` entries wide each.

    ``parameters`` are those that the operations so far slice by neuron, ``filters`` the ones among
    them that count in the scores; ``macs`` is the multiply-adds of one neuron so far.
    """

    neurons: int
    axis: int
    features: int
    parameters: tuple[ParameterSlice, ...]
    filters: tuple[str, ...]
    macs: int


Rule = Callable[[fx.Node, Channels, Shapes], Channels | None]


def channelwise(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    """Where ``node`` leaves the neurons of its only non-parameter input, or None when it mixes them."""
    rule = _RULES.get(node.target)
    if rule is None or node not in shapes:
        return None
    result = rule(node, channels, shapes)
    if result is not None:
        width = shapes[node][result.axis]
        assert width == result.neurons * result.features, f"{node.name}: {width} entries for {result}"
    return result


def parameter_name(argument: Any) -> str | None:
    """The name of the parameter or buffer that an argument is, or None."""
    return str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None


def _elementwise(node: fx.Node, channels: Channels, _: Shapes) -> Channels | None:
    return channels if len(node.all_input_nodes) == 1 else None


def _arithmetic(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    """A sum or product with a number, or with a parameter that has one entry per neuron."""
    left, right, *_ = arguments(node)
    if len(node.all_input_nodes) == 1:
        return channels if isinstance(left, (int, float)) or isinstance(right, (int, float)) else None
    parameter, value = (left, right) if parameter_name(left) else (right, left)
    if not parameter_name(parameter) or shapes[node] != shapes[value]:
        return None
    shape = shapes[parameter]
    axis = channels.axis - (len(shapes[node]) - len(shape))
    if axis < 0 or shape[axis] != channels.neurons * channels.features:
        return None
    return _with_parameters(channels, (parameter,), axis)


def _with_parameters(channels: Channels, arguments: tuple[Any, ...], axis: int) -> Channels:
    names = [name for argument in arguments if (name := parameter_name(argument))]
    slices = tuple(ParameterSlice(name, axis, channels.features) for name in names)
    return replace(channels, parameters=channels.parameters + slices)


def _batch_norm(node: fx.Node, channels: Channels, _: Shapes) -> Channels | None:
    return _with_parameters(channels, node.args[1:5], 0) if channels.axis == 1 else None


def _prelu(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    slope = arguments(node)[1]
    if channels.axis != 1 or not parameter_name(slope) or shapes[slope] != (channels.neurons * channels.features,):
        return None
    return _with_parameters(channels, (slope,), 0)


def _spatial(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    """Pooling and resampling: over the axes behind the second, whatever their number."""
    return channels if channels.axis == 1 and len(shapes[node]) > 2 and len(node.all_input_nodes) == 1 else None


def _pad(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    padded = len(arguments(node)[1]) // 2
    if len(shapes[node]) - padded > channels.axis:
        return channels
    # All that lies along its axis belongs to a layer's only neuron.
    return replace(channels, features=shapes[node][channels.axis]) if channels.neurons == 1 else None


def _slice(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    dimension = arguments(node, None, 0)[1] % len(shapes[node])
    return channels if dimension not in (0, channels.axis) else None


def _reduce(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    rank = len(shapes[node.all_input_nodes[0]])
    given = arguments(node, None, None)[1]
    if given is None or given == []:  # all axes
        return None
    reduced = {dimension % rank for dimension in (given if isinstance(given, (list, tuple)) else [given])}
    if 0 in reduced or channels.axis in reduced:
        return None
    if len(shapes[node]) == rank:
        return channels
    return replace(channels, axis=channels.axis - sum(dimension < channels.axis for dimension in reduced))


def _permute(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    rank = len(shapes[node])
    if node.target is aten.permute.default:
        order = [dimension % rank for dimension in arguments(node)[1]]
    else:
        first, second = (dimension % rank for dimension in arguments(node)[1:3])
        order = list(range(rank))
        order[first], order[second] = second, first
    return replace(channels, axis=order.index(channels.axis)) if order[0] == 0 else None


def _flatten(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    before = shapes[node.all_input_nodes[0]]
    start, end = (axis % len(before) for axis in arguments(node, None, 0, -1)[1:])
    if start == 0 or end < channels.axis:
        return None if start == 0 else replace(channels, axis=channels.axis - (end - start))
    if start > channels.axis:
        return channels
    if math.prod(before[start : channels.axis]) != 1:
        return None
    inner = math.prod(before[channels.axis + 1 : end + 1])
    return replace(channels, axis=start, features=channels.features * inner)


def _squeeze(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    before = shapes[node.all_input_nodes[0]]
    given = arguments(node, None, [d for d, size in enumerate(before) if size == 1])[1]
    dimensions = {d % len(before) for d in (given if isinstance(given, (list, tuple)) else [given])}
    removed = {d for d in dimensions if before[d] == 1}
    if 0 in removed or channels.axis in removed:
        return None
    return replace(channels, axis=channels.axis - sum(d < channels.axis for d in removed))


def _unsqueeze(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    position = arguments(node)[1] % len(shapes[node])
    return None if position == 0 else replace(channels, axis=channels.axis + (position <= channels.axis))


def _depthwise(node: fx.Node, channels: Channels, shapes: Shapes) -> Channels | None:
    """A convolution with one filter per channel, on a value that has one channel per neuron."""
    x, weight, bias, *_, groups = arguments(node, None, None, None, 1, 0, 1, 1)
    if channels.axis != 1 or channels.features != 1 or not parameter_name(weight) or x not in shapes:
        return None
    if groups != channels.neurons or shapes[weight][0] != channels.neurons:
        return None
    if bias is not None and not parameter_name(bias):
        return None
    result = _with_parameters(channels, (weight, bias), 0)
    filters = tuple(name for argument in (weight, bias) if (name := parameter_name(argument)))
    macs = math.prod(shapes[weight][1:]) * math.prod(shapes[node][2:])
    return replace(result, filters=channels.filters + filters, macs=channels.macs + macs)


def overloads(*names: str) -> list[torch._ops.OpOverload]:
    """The overloads of ``aten`` with these names, without those that this version of torch lacks."""
    found = []
    for name in names:
        packet, overload = name.split(".")
        if hasattr(aten, packet) and hasattr(getattr(aten, packet), overload):
            found.append(getattr(getattr(aten, packet), overload))
    return found


_UNARY = """relu relu6 hardtanh hardswish hardsigmoid silu gelu sigmoid tanh leaky_relu elu selu celu mish softplus
clamp clamp_min clamp_max neg exp abs sqrt rsqrt square log_sigmoid softsign threshold tanhshrink hardshrink"""
_POOLS = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d _adaptive_avg_pool2d"""

ELEMENTWISE = tuple(overloads(*(f"{name}.default" for name in _UNARY.split()), "pow.Tensor_Scalar"))
"""Functions of one number."""
ARITHMETIC = tuple(
    overloads(*(f"{name}.{kind}" for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")))
)
"""Functions of two numbers."""

_RULES: dict[Any, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(ARITHMETIC, _arithmetic),
    **dict.fromkeys(overloads(*(f"{name}.default" for name in _POOLS.split())), _spatial),
    **dict.fromkeys(overloads("upsample_nearest2d.default", "upsample_nearest2d.vec"), _spatial),
    **dict.fromkeys(overloads("upsample_bilinear2d.default", "upsample_bilinear2d.vec"), _spatial),
    **dict.fromkeys(overloads("mean.dim", "sum.dim_IntList", "amax.default"), _reduce),
    **dict.fromkeys(overloads("permute.default", "transpose.int"), _permute),
    **dict.fromkeys(overloads("squeeze.default", "squeeze.dim", "squeeze.dims"), _squeeze),
    **dict.fromkeys(overloads("pad.default", "constant_pad_nd.default"), _pad),
    **dict.fromkeys(overloads("conv1d.default", "conv2d.default", "conv3d.default"), _depthwise),
    aten.slice.Tensor: _slice,
    aten.unsqueeze.default: _unsqueeze,
    aten.flatten.using_ints: _flatten,
    aten.batch_norm.default: _batch_norm,
    aten.prelu.default: _prelu,
}
