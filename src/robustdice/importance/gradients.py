"""The scores that backward passes give: connection sensitivity (s2) and a removal divergence (s3) without removals.

Losing unit j moves the logarithm of every outcome's probability by about -a_j . d log p_y / d a_j, where a_j is what
the unit hands over at the exchange. One backward pass for each outcome y gives this for *all* units, and the
divergence between p and the moved distribution follows. For small removals that is half of the divergence's metric
along the step, 1/8 * sum over y of p_y * (a_j . d log p_y / d a_j)^2 (the Fisher information over 4); for large ones
it stays below ln 2, as it must. Few classes are an outcome each. Of many, the likeliest of every image are, and all
others together are one more: what that neglects is how the doubtful rest is divided among itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.errors import ModelError, first_line
from robustdice.importance.divergence import class_removal, jensen_shannon
from robustdice.model.execute import execute
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network
from robustdice.progress import Progress, silent

EVERY_CLASS_UP_TO = 16
"""So many classes are an outcome each; of more, only the ``LIKELIEST`` are."""
LIKELIEST = 3

GRADIENT_ELEMENTS = 16_000_000
"""Numbers that a micro-batch keeps for its backward passes: larger ones cost more in page faults than they save."""

Scores = list[NDArray[np.float64]]


def sensitivities(network: Network, images: torch.Tensor, *, on_progress: Progress = silent) -> Scores:
    """s2: the sum of |dL/dw * w| over every unit's filters and biases, float64 [units] per layer.

    L is the mean cross-entropy over ``images``, float32 [n, channels, height, width], against the network's own answer.
    """
    constants = network.constants(images.device)
    filters = {name for layer in network.layers for name in layer.filters}
    weights = {
        node: value.detach().requires_grad_() for node, value in constants.items() if str(node.target) in filters
    }
    sums = {node: torch.zeros_like(weight) for node, weight in weights.items()}
    done = 0
    for part in torch.split(images, _images_at_once(network)):
        values: dict[fx.Node, Any] = {**constants, **weights, network.input: part}
        execute(network.module, network.nodes, values)
        likeliest = values[network.output].double().log_softmax(1).amax(1).sum()
        for so_far, gradient in zip(sums.values(), _gradients(likeliest, list(weights.values())), strict=True):
            so_far.sub_(gradient)
        done += len(part)
        on_progress(done, len(images))
    products = {
        str(node.target): (weight.detach() * sums[node]).abs().double().cpu() / len(images)
        for node, weight in weights.items()
    }
    return [sum_filters(layer, [products[name] for name in layer.filters]) for layer in network.layers]


def divergences(network: Network, images: torch.Tensor, *, on_progress: Progress = silent) -> Scores:
    """The s3 of every unit from backward passes, mean over ``images``: float64 [units] per layer.

    Class scores that are lost count as minus infinity, whose divergence has a closed form.
    """
    inner = [layer for layer in network.layers if not math.isinf(layer.fill)]
    sums = {layer.layer.name: torch.zeros(units_of(layer), dtype=torch.float64) for layer in network.layers}
    done = 0
    for part in torch.split(images, _images_at_once(network)):
        values: dict[fx.Node, Any] = {
            **network.constants(images.device),
            network.input: part.detach().requires_grad_(),
        }
        execute(network.module, network.nodes, values)
        log_p = values[network.output].double().log_softmax(1)
        activations = [values[layer.value] for layer in inner]
        outcomes = _outcomes(log_p)
        slopes: list[list[torch.Tensor]] = [[] for _ in inner]
        for outcome in outcomes:
            found = _gradients(outcome.sum(), activations)
            with torch.no_grad():
                for of_layer, layer, value, gradient in zip(slopes, inner, activations, found, strict=True):
                    of_layer.append(per_unit(layer, value * gradient).double())
        with torch.no_grad():
            before = torch.stack(outcomes, -1)[:, None]
            for of_layer, layer in zip(slopes, inner, strict=True):
                after = (before - torch.stack(of_layer, -1)).softmax(-1)
                sums[layer.layer.name] += jensen_shannon(before.exp().expand_as(after), after).sum(0).cpu()
            for layer in network.layers:
                if math.isinf(layer.fill):
                    sums[layer.layer.name] += class_removal(per_unit(layer, log_p.exp())).sum(0).cpu()
        done += len(part)
        on_progress(done, len(images))
    return [sums[layer.layer.name].numpy() / len(images) for layer in network.layers]


def _gradients(of: torch.Tensor, by: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Zero where a tensor has no path to the result (through a comparison, say): then nothing depends on it."""
    if not by:
        return ()
    try:
        return torch.autograd.grad(of, by, retain_graph=True, allow_unused=True, materialize_grads=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"torch cannot differentiate the model, as two of the scores need: {first_line(error)}"
        ) from None


def _outcomes(log_p: torch.Tensor) -> list[torch.Tensor]:
    """Logarithms of the probabilities [n] of each outcome, the likeliest class first; log_p is [n, classes]."""
    ranked = log_p.gather(1, log_p.detach().argsort(dim=1, descending=True, stable=True))
    if log_p.shape[1] <= EVERY_CLASS_UP_TO:
        return list(ranked.unbind(1))
    return [*ranked[:, :LIKELIEST].unbind(1), ranked[:, LIKELIEST:].logsumexp(1)]


def per_unit(layer: NetworkLayer, value: torch.Tensor) -> torch.Tensor:
    """The sum of a value [n, *shape] over the entries of each unit, [n, units]."""
    return value.movedim(layer.axis, 1).reshape(len(value), units_of(layer), -1).sum(2)


def sum_filters(layer: NetworkLayer, filters: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """The sum over each unit's share of ``filters``, which have their neurons along axis 0: float64 [units]."""
    total = torch.zeros(units_of(layer), dtype=torch.float64)
    for values in filters:
        total += values.double().cpu().reshape(units_of(layer), -1).sum(1)
    return total.numpy()


def units_of(layer: NetworkLayer) -> int:
    """How many units of a layer are dealt out: neurons, or groups of them."""
    return layer.layer.neurons // layer.layer.group


def _images_at_once(network: Network) -> int:
    kept = sum(int(np.prod(shape[1:])) for node, shape in network.shapes.items() if node.op == "call_function")
    return max(1, GRADIENT_ELEMENTS // max(1, kept))
