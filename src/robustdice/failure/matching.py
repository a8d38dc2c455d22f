"""Corrections that match statistics: each neuron's mean and spread behind the affine chain are what they are in the
intact network, layer by layer in the network's order, with the corrections before it in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.failure.copies import Copies, State, intact
from robustdice.failure.handover import as_received, forms
from robustdice.failure.passes import correct, fill
from robustdice.model.execute import execute, readers
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network, together
from robustdice.representation import LOST, Correction

MAX_GAIN = 8.0
"""The largest scale, and the inverse of the smallest: a neuron of which next to nothing is left stays that way."""

Corrections = tuple[Correction | None, ...]
"""Of every layer; None where nothing is to be corrected."""

Statistics = tuple[torch.Tensor, torch.Tensor]
"""Every neuron's mean and standard deviation, [neurons] each."""

Targets = Mapping[int, Statistics]
"""Of every layer, by its position."""


def fit(
    network: Network,
    copies: Copies,
    base: State,
    states: Sequence[State],
    images: NDArray[np.float32],
    targets: Callable[[], Targets] | None = None,
) -> Iterator[tuple[int, Corrections, torch.Tensor]]:
    """For each of ``states``, as they get done: its position, its corrections, and the class scores [n, outputs] that
    it then gives for ``images``. Layers before the first in which a state differs from ``base`` have no correction.
    ``targets`` gives :func:`targets_of` these images, where they are known.
    """
    if states:
        with torch.no_grad():
            known = targets_of(network, copies, images) if targets is None else targets()
            yield from Pass(network, copies, base).branches(together(network, images), states, known)


def targets_of(network: Network, copies: Copies, images: NDArray[np.float32]) -> Targets:
    """What every layer of the intact network gives for ``images``."""
    with torch.no_grad():
        return dict(Pass(network, copies, intact(network)).statistics(together(network, images)))


def _statistics(layer: NetworkLayer, value: torch.Tensor) -> Statistics:
    # Over rows of neurons, in two steps: var_mean takes ten times as long where channels come last in memory.
    rows = value.movedim(layer.affine_axis, -1).reshape(-1, value.shape[layer.affine_axis])
    mean = rows.mean(0)
    return mean, (rows - mean).square_().mean(0).sqrt()


def _matching(now: Statistics, target: Statistics) -> Correction:
    """What brings one neuron's statistics to the other's."""
    (mean, spread), (wanted_mean, wanted_spread) = now, target
    dead = (spread < 1e-6) | (wanted_spread < 1e-6)
    scale = torch.where(dead, 1.0, wanted_spread / spread.clamp_min(1e-6)).clamp(1 / MAX_GAIN, MAX_GAIN)
    kept = Correction.of(scale.cpu().numpy(), np.zeros(len(scale), np.float32)).scale
    shift = wanted_mean.cpu().numpy() - kept * mean.cpu().numpy()
    return Correction.of(kept, shift.clip(-60000, 60000))


class Pass:
    """All images through the network in one state, node by node."""

    def __init__(self, network: Network, copies: Copies, state: State) -> None:
        """Nothing is computed yet."""
        self.network = network
        self.copies = copies
        self.state = state
        self.nodes = network.nodes
        self.starts = {layer.node: index for index, layer in enumerate(network.layers)}
        self.ends = {layer.affine_end: index for index, layer in enumerate(network.layers)}
        self.exchanges = {layer.value: index for index, layer in enumerate(network.layers)}
        self.forms = forms(network, state.handover)

    def statistics(self, images: torch.Tensor) -> Iterator[tuple[int, Statistics]]:
        """Of every layer, behind its affine chain."""
        values = self.start(images)
        left = readers(self.nodes)
        for node in self.nodes:
            self.compute(node, values)
            if node in self.ends:
                index = self.ends[node]
                yield index, _statistics(self.network.layers[index], values[node])
            self.after(node, values, left)

    def branches(
        self, images: torch.Tensor, states: Sequence[State], targets: Targets
    ) -> Iterator[tuple[int, Corrections, torch.Tensor]]:
        """Runs ``states`` from the layers on in which they first differ from the pass's own."""
        firsts: dict[int, list[int]] = {}
        for number, state in enumerate(states):
            differing = [
                i for i, (a, b) in enumerate(zip(state.copies, self.state.copies, strict=True)) if (a != b).any()
            ]
            firsts.setdefault(min(differing, key=lambda i: self.nodes.index(self.network.layers[i].node)), []).append(
                number
            )
        values = self.start(images)
        left = readers(self.nodes)
        for at, node in enumerate(self.nodes):
            for number in firsts.pop(self.starts.get(node, -1), []):
                branch = Pass(self.network, self.copies, states[number])
                corrections, scores = branch._corrected(at, dict(values), left.copy(), self.state, targets)
                yield number, corrections, scores
            if not firsts:
                return
            self.compute(node, values)
            self.after(node, values, left)

    def _corrected(
        self,
        start: int,
        values: dict[fx.Node, Any],
        left: Counter[fx.Node],
        base: State,
        targets: Targets,
    ) -> tuple[Corrections, torch.Tensor]:
        found: list[Correction | None] = [None] * len(self.network.layers)
        for node in self.nodes[start:]:
            self.compute(node, values)
            if node in self.ends:
                index = self.ends[node]
                layer = self.network.layers[index]
                here = self.state.copies[index]
                # The first layer's inputs are as ever; if it has only lost something, the rest is as it was.
                as_before = (here == base.copies[index])[here != LOST].all()
                first = self.nodes[start] is layer.node
                if not (first and as_before):
                    found[index] = _matching(_statistics(layer, values[node]), targets[index])
                    values[node] = correct(layer, values[node], found[index])
            self.after(node, values, left)
        scores = values[self.network.output]
        return tuple(found), scores

    def start(self, images: torch.Tensor) -> dict[fx.Node, Any]:
        """The values that are there before the first node."""
        return {**self.network.constants(images.device), self.network.input: images}

    def compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Add a node's value, of the copies that the state has of its layer."""
        if node in self.starts:
            index = self.starts[node]
            self.copies.compute_in(self.state, index, values)
        else:
            execute(self.network.module, [node], values)

    def after(self, node: fx.Node, values: dict[fx.Node, Any], left: Counter[fx.Node]) -> None:
        """Hand a node's value over, less what is lost, and forget what nobody reads any more."""
        if node in self.forms:
            values[node] = as_received(values[node], self.forms[node])
        if node in self.exchanges:
            index = self.exchanges[node]
            lost = np.flatnonzero(self.state.copies[index] == LOST)
            values[node] = fill(self.network.layers[index], values[node], lost)
        for used in node.all_input_nodes:
            left[used] -= 1
            if not left[used] and used is not self.network.output:
                values.pop(used, None)
