"""The affine chain behind a layer: folded into its filters, where a coarse copy has it, and what is left of it then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from robustdice.model.canonical import aten
from robustdice.model.channelwise import parameter_name
from robustdice.model.execute import attribute
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network
from robustdice.representation import CoarseFilter, CoarseLayer


@dataclass(frozen=True)
class Folded:
    """``filters @ inputs + shift`` is the value behind a layer's affine chain: float32 [neurons, K] and [neurons]."""

    filters: torch.Tensor
    shift: torch.Tensor


def fold(network: Network, layer: NetworkLayer) -> Folded:
    """The layer's own filters, its bias, and what scales and shifts its neurons before anything that is not linear."""

    def value(name: str) -> torch.Tensor:
        return attribute(network.module, name).detach().to(torch.float64).flatten()

    filters = value(layer.own_filter).reshape(layer.layer.neurons, -1)
    factor = torch.ones(len(filters), dtype=torch.float64)
    shift = torch.zeros_like(factor) if layer.own_bias is None else value(layer.own_bias)
    for node in layer.affine:
        if node.target is aten.batch_norm.default:
            weight, beta, mean, variance = (parameter_name(argument) for argument in node.args[1:5])
            assert mean is not None
            assert variance is not None
            gain = 1 / (value(variance) + float(node.args[7])).sqrt()  # type: ignore[arg-type]
            gain = gain * value(weight) if weight else gain
            factor, shift = factor * gain, (shift - value(mean)) * gain + (value(beta) if beta else 0)
            continue
        other = value(next(name for argument in node.args if (name := parameter_name(argument))))
        if node.target is aten.add.Tensor:
            shift = shift + other
        elif node.target is aten.sub.Tensor:
            shift = shift - other
        else:
            other = 1 / other if node.target is aten.div.Tensor else other
            factor, shift = factor * other, shift * other
    return Folded((filters * factor[:, None]).to(torch.float32), shift.to(torch.float32))


def coarse_parameters(network: Network, layer: NetworkLayer, coarse: CoarseLayer) -> dict[str, torch.Tensor]:
    """The values of a layer's parameters that make the network compute what the coarse copy does.

    The affine chain behind the layer is part of the copy's filter and shift: its own parameters change nothing then,
    except the one that adds the shift.
    """

    def whole(filters: CoarseFilter, name: str) -> torch.Tensor:
        return torch.from_numpy(filters.values()).reshape(attribute(network.module, name).shape)

    found = {layer.own_filter: whole(coarse.filter, layer.own_filter)}
    found |= {name: whole(filters, name) for name, filters in coarse.tail.items()}
    return found | _shifted_by(network, layer, torch.from_numpy(coarse.shift.astype(np.float32)))


def folded_parameters(network: Network, layer: NetworkLayer) -> dict[str, torch.Tensor]:
    """As :func:`coarse_parameters` of a copy that keeps the folded filters in float32, and the tail as it is."""
    folded = fold(network, layer)
    filters = folded.filters.reshape(attribute(network.module, layer.own_filter).shape)
    return {layer.own_filter: filters, **_shifted_by(network, layer, folded.shift)}


def _shifted_by(network: Network, layer: NetworkLayer, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values of the parameters of a layer's affine chain with which it does nothing but shift."""
    found: dict[str, torch.Tensor] = {}
    for name, (neutral, sign) in _chain_parameters(layer).items():
        like = attribute(network.module, name)
        found[name] = torch.full_like(like, neutral, requires_grad=False)
        if sign and shift.any():
            found[name] += sign * shift.reshape(like.shape)
            shift = torch.zeros(1)
    if shift.any():
        raise ValueError(f"layer {layer.layer.name} has nothing that adds, so its copies cannot be shifted")
    return found


def can_shift(layer: NetworkLayer) -> bool:
    """Whether something behind a layer adds to its neurons, so that copies can have a shift."""
    return any(sign for _, sign in _chain_parameters(layer).values())


def _chain_parameters(layer: NetworkLayer) -> dict[str, tuple[float, int]]:
    """Each parameter of a layer's affine chain: the value with which it changes nothing, and whether it is added (1),
    taken off (-1), or neither (0)."""
    found = {} if layer.own_bias is None else {layer.own_bias: (0.0, 1)}
    for node in layer.affine:
        if node.target is aten.batch_norm.default:
            kinds = ((1.0, 0), (0.0, 1), (0.0, -1), (1.0 - float(node.args[7]), 0))  # type: ignore[arg-type]
            for argument, kind in zip(node.args[1:5], kinds, strict=True):
                if (name := parameter_name(argument)) is not None:
                    found[name] = kind
        else:
            name = next(name for argument in node.args if (name := parameter_name(argument)) is not None)
            found[name] = _OPERATIONS[node.target]  # type: ignore[index]
    return found


_OPERATIONS = {
    aten.add.Tensor: (0.0, 1),
    aten.sub.Tensor: (0.0, -1),
    aten.mul.Tensor: (1.0, 0),
    aten.div.Tensor: (1.0, 0),
}
