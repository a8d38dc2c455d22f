"""The scores that backward passes give: connection sensitivity (s2) and a second-order removal divergence (s3).

For small removals the Jensen-Shannon divergence of the output distribution is

    1/8 * sum over classes y of p_y * (a_j . d log p_y / d a_j)^2

where a_j is everything that unit j hands over at the exchange (it is half of the divergence's metric, which is the
Fisher information over 4, along the step from a_j to zero). So a backward pass per class gives the divergence
of *all* units. Where there are many classes, the likeliest one of every image is taken exactly, by the pass that s2
needs anyway, and the others are drawn from what probability is left: an unbiased estimate, whose variance is bounded
by the doubt that the model itself has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.model.canonical import execute
from robustdice.model.network import Network, NetworkLayer
from robustdice.progress import Progress, silent

EVERY_CLASS_UP_TO = 16
"""So many classes are all taken; of more, ``DRAWS`` are drawn beside the likeliest."""
DRAWS = 2

GRADIENT_ELEMENTS = 16_000_000
"""Numbers that a micro-batch keeps for its backward passes: larger ones cost more in page faults than they save."""

Scores = list[NDArray[np.float64]]


def gradient_scores(
    network: Network,
    images: torch.Tensor,
    *,
    sensitivity: bool = True,
    divergence: bool = True,
    seed: int = 0,
    on_progress: Progress = silent,
) -> tuple[Scores | None, Scores | None]:
    """s2 and the second-order s3 of every unit, float64 [units] per layer, or None for what is not wanted.

    s2 is the sum of |dL/dw * w| over a unit's filters and biases; L is the mean cross-entropy over all images
    against the network's own top-1 answer. s3 is the mean over the images; class scores that are lost count as
    minus infinity, whose divergence has a closed form. ``images`` is float32 [n, channels, height, width].
    """
    inner = [layer for layer in network.layers if not math.isinf(layer.fill)] if divergence else []
    constants = network.constants(images.device)
    filters = {name for layer in network.layers for name in layer.filters} if sensitivity else set()
    weights = {node: value.requires_grad_() for node, value in constants.items() if str(node.target) in filters}
    sums = {node: torch.zeros_like(weight) for node, weight in weights.items()}
    divergences = {layer.layer.name: torch.zeros(units_of(layer), dtype=torch.float64) for layer in network.layers}
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for part in torch.split(images, _images_at_once(network)):
        values: dict[fx.Node, Any] = {**constants, network.input: part if weights else part.detach().requires_grad_()}
        execute(network.module, network.nodes, values)
        scores = values[network.output]
        log_p = scores.double().log_softmax(1)
        p = log_p.detach().exp()
        activations = [values[layer.value] for layer in inner]
        for turn, (classes, share) in enumerate(_classes(p, generator) if divergence else [(p.argmax(1), p.amax(1))]):
            wanted = [*weights.values(), *activations] if turn == 0 else activations
            target = log_p.gather(1, classes[:, None]).sum()
            # A tensor may have no path to the scores (through a comparison, say): then nothing depends on it.
            found = torch.autograd.grad(target, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
            for so_far, gradient in zip(sums.values() if turn == 0 else (), found, strict=False):
                so_far.sub_(gradient)
            with torch.no_grad():
                gradients = found[len(wanted) - len(activations) :]
                for layer, value, gradient in zip(inner, activations, gradients, strict=True):
                    slopes = per_unit(layer, value * gradient).double()
                    divergences[layer.layer.name] += (slopes.square() * share[:, None]).sum(0).cpu() / 8
        for layer in network.layers:
            if math.isinf(layer.fill):
                divergences[layer.layer.name] += class_removal(per_unit(layer, p)).sum(0).cpu()
        done += len(part)
        on_progress(done, len(images))
    for weight in weights.values():
        weight.requires_grad_(False)
    products = {
        str(node.target): (weight * sums[node]).abs().double().cpu() / len(images) for node, weight in weights.items()
    }
    return (
        [sum_filters(layer, [products[name] for name in layer.filters]) for layer in network.layers]
        if sensitivity
        else None,
        [divergences[layer.layer.name].numpy() / len(images) for layer in network.layers] if divergence else None,
    )


def _classes(p: torch.Tensor, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of classes [n] and what each stands for [n], the likeliest first; p is [n, classes]."""
    ranked, order = p.sort(dim=1, descending=True, stable=True)
    yield order[:, 0], ranked[:, 0]
    if p.shape[1] <= EVERY_CLASS_UP_TO:
        for rank in range(1, p.shape[1]):
            yield order[:, rank], ranked[:, rank]
        return
    rest = ranked[:, 1:].cpu()
    drawn = 1 + torch.multinomial(rest.clamp_min(torch.finfo(rest.dtype).tiny), DRAWS, True, generator=generator)
    for draw in drawn.to(p.device).T:
        yield order.gather(1, draw[:, None])[:, 0], ranked[:, 1:].sum(1) / DRAWS


def class_removal(p: torch.Tensor) -> torch.Tensor:
    """The divergence, elementwise, when what has probability ``p`` is no longer among the answers."""
    rest = 1 - p
    both = 2 - p
    kept = torch.xlogy(rest, 2 * rest / both) + math.log(2) * p
    return ((kept + torch.log(2 / both)) / 2).clamp_min(0)


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
