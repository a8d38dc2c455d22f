"""Network, images -> importance: the paper's three scores of every neuron (section III-A), settled as in the docs.

What is scored is what is dealt out: a neuron, or in a grouped convolution a whole group of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.errors import DataError, PlanError
from robustdice.importance.values import COLUMNS, Importance
from robustdice.model.canonical import attribute, execute
from robustdice.model.network import Network, NetworkLayer
from robustdice.progress import Progress, silent

BATCH_ELEMENTS = 1_000_000
"""Largest temporary, in numbers: larger ones cost more in page faults than they save in calls."""


def score(
    network: Network,
    images: NDArray[np.float32],
    *,
    columns: Sequence[str] = COLUMNS,
    on_progress: Progress = silent,
) -> Importance:
    """Score every unit of every layer with ``images``, float32 [n, channels, height, width]; no labels are needed.

    s1 is the L1 norm of filter and bias, s2 the connection sensitivity against the model's own answers, s3 the
    exact Jensen-Shannon divergence (natural logarithm) after removal of the unit at the exchange. DataError when the
    images do not fit the model; PlanError when ``columns`` names another score.
    """
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise PlanError(f"unknown score {unknown[0]!r}; known: {', '.join(COLUMNS)}")
    if images.shape[1:] != network.input_shape or not len(images):
        raise DataError(
            f"images of shape {list(images.shape)}, the model takes [n, {', '.join(map(str, network.input_shape))}]"
        )
    batch = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    scorers = {
        "s1": lambda: filter_norms(network),
        "s2": lambda: connection_sensitivities(network, batch),
        "s3": lambda: removal_divergences(network, batch, on_progress=on_progress),
    }
    found = {name: scorers[name]() for name in columns}
    return Importance(
        names=tuple(layer.layer.name for layer in network.layers),
        scores=tuple(
            np.stack([found[name][index] for name in columns], axis=1) for index in range(len(network.layers))
        ),
        columns=tuple(columns),
        model=network.reference,
        settings={"samples": len(images), **({"s3": "exact"} if "s3" in columns else {})},
    )


def filter_norms(network: Network) -> list[NDArray[np.float64]]:
    """s1: sum of |weights| and |bias| of every unit's filters, float64 [units] per layer."""
    return [
        _per_unit(layer, [attribute(network.module, name).detach().abs() for name in layer.filters])
        for layer in network.layers
    ]


def connection_sensitivities(network: Network, images: torch.Tensor) -> list[NDArray[np.float64]]:
    """s2: sum of |dL/dw * w| over every unit's filters and biases, float64 [units] per layer.

    L is the mean cross-entropy over all images against the model's own top-1 answer.
    """
    names = sorted({name for layer in network.layers for name in layer.filters})
    weights = [attribute(network.module, name) for name in names]
    before = [weight.requires_grad for weight in weights]
    gradients = [torch.zeros_like(weight) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for part in torch.split(images, _images_at_once(network, network.nodes, gradients=True)):
            scores = network.run(part)
            loss = torch.nn.functional.cross_entropy(scores, scores.detach().argmax(1), reduction="sum") / len(images)
            # A weight may have no path to the scores (through a comparison, say): then nothing depends on it.
            found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            for so_far, gradient in zip(gradients, found, strict=True):
                so_far.add_(gradient)
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)
    products = {
        name: (weight.detach() * gradient).abs()
        for name, weight, gradient in zip(names, weights, gradients, strict=True)
    }
    return [_per_unit(layer, [products[name] for name in layer.filters]) for layer in network.layers]


def removal_divergences(
    network: Network, images: torch.Tensor, *, on_progress: Progress = silent
) -> list[NDArray[np.float64]]:
    """s3: divergence of the output distribution when a unit is lost, mean over the images, float64 [units] per layer.

    The network runs once up to every exchange; from there on many removals share a batch.
    """
    sums = [torch.zeros(_units(layer), dtype=torch.float64) for layer in network.layers]
    suffixes = [_suffix(network, layer.value) for layer in network.layers]
    total = len(images) * sum(len(units) for units in sums)
    done = 0
    with torch.no_grad():
        for part in torch.split(images, _images_at_once(network, network.nodes)):
            values: dict[fx.Node, Any] = {network.input: part}
            execute(network.module, network.nodes, values)
            intact = values[network.output].double().softmax(1)
            for layer, suffix, units in zip(network.layers, suffixes, sums, strict=True):
                at_once = max(1, _images_at_once(network, [layer.value, *suffix]) // len(part))
                for chosen in torch.split(torch.arange(len(units)), at_once):
                    removed = _run_without(network, layer, suffix, values, chosen)
                    units[chosen] += jensen_shannon(intact, removed.double().softmax(2)).sum(1)
                    done += len(chosen) * len(part)
                    on_progress(done, total)
    return [(units / len(images)).numpy() for units in sums]


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence (natural logarithm) of distributions over the last axis."""
    middle = (p + q) / 2
    divergence = torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)
    return divergence.nan_to_num(0.0).sum(-1).clamp_min(0) / 2


def _run_without(
    network: Network,
    layer: NetworkLayer,
    suffix: Sequence[fx.Node],
    values: dict[fx.Node, Any],
    units: torch.Tensor,
) -> torch.Tensor:
    """Class scores [removals, images, outputs] when one unit after the other is lost."""
    lost = torch.zeros(len(units), layer.layer.neurons, dtype=torch.bool)
    group = layer.layer.group
    for row, unit in enumerate(units.tolist()):
        lost[row, unit * group : (unit + 1) * group] = True
    intact = values[layer.value]
    altered = intact.unsqueeze(0).masked_fill(layer.broadcast(lost), layer.fill).flatten(0, 1)
    changed = _Overlay(network, values, {layer.value: altered}, len(units))
    remaining = Counter(used for node in suffix for used in node.all_input_nodes)
    for node in suffix:
        execute(network.module, [node], changed)
        for used in node.all_input_nodes:
            remaining[used] -= 1
            if not remaining[used] and used is not network.output:
                changed.pop(used, None)
    result = changed[network.output]
    return result.reshape(len(units), len(intact), -1)  # type: ignore[no-any-return]


class _Overlay(dict[fx.Node, Any]):
    """Values of a batch of removals; what does not depend on them is repeated from the intact run when it is read."""

    def __init__(self, network: Network, intact: dict[fx.Node, Any], changed: dict[fx.Node, Any], repeats: int) -> None:
        super().__init__(changed)
        self._per_image = network.per_image
        self._intact = intact
        self._repeats = repeats

    def __missing__(self, node: fx.Node) -> Any:
        value = self._intact[node]
        if node in self._per_image:
            value = value.repeat(self._repeats, *(1,) * (value.ndim - 1))
        self[node] = value
        return value


def _suffix(network: Network, value: fx.Node) -> list[fx.Node]:
    """The nodes to run again when ``value`` changes, in order: those that depend on it, and whatever else they
    read that depends on the batch but cannot be repeated along it (sizes, tensors with the batch on another axis)."""
    dependent, of_input = {value}, {network.input}
    for node in network.nodes:
        if node.op == "call_function":
            if not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
            if not of_input.isdisjoint(node.all_input_nodes):
                of_input.add(node)
    chosen: set[fx.Node] = set()
    pending = list(dependent - {value})
    while pending:
        node = pending.pop()
        chosen.add(node)
        pending.extend(
            used
            for used in node.all_input_nodes
            if used in of_input and used not in chosen and used not in dependent and used not in network.per_image
        )
    return [node for node in network.nodes if node in chosen]


def _images_at_once(network: Network, nodes: Sequence[fx.Node], *, gradients: bool = False) -> int:
    """How many images (or copies of one) keep every temporary below the limit."""
    sizes = [
        int(np.prod(network.shapes[node][1:])) for node in nodes if node in network.shapes and node.op != "get_attr"
    ]
    largest = sum(sizes) // 8 if gradients else max(sizes)
    return max(1, BATCH_ELEMENTS // max(1, largest))


def _units(layer: NetworkLayer) -> int:
    return layer.layer.neurons // layer.layer.group


def _per_unit(layer: NetworkLayer, filters: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    total = torch.zeros(_units(layer), dtype=torch.float64)
    for values in filters:
        total += values.double().reshape(_units(layer), -1).sum(1)
    return total.numpy()
