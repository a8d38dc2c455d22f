"""Rounding that is learned: each weight up or down, by what the layer gives behind its tail.

AdaRound (arXiv 2004.10568): GPTQ's errors are those of the pre-activations, of which an activation forgets many; here
gradients come from behind it, and through the tail's pooling and depthwise filters. Layer by layer: behind coarse ones,
towards what the intact network has there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.entropy_code import CODED
from robustdice.model.execute import attribute, execute, forget, readers
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network, images_at_once, together
from robustdice.progress import Progress, silent
from robustdice.representation import CoarseFilter, CoarseLayer, code_offset, code_range
from robustdice.rounding.affine import Folded, can_shift, coarse_parameters, fold
from robustdice.rounding.coded import fitting
from robustdice.rounding.layer import (
    Choice,
    Intact,
    Seen,
    Target,
    coarse_layer,
    of_levels,
    rounded_filter,
    target,
    with_filters,
)
from robustdice.rounding.network import Coarse, Wanted, filter_inputs
from robustdice.rounding.scales import to_levels

LEARNT = ("int4", "int3", "int2", "ec4", "ec3", "ec2")
"""In these it matters which way a weight is rounded; others are rounded as by GPTQ."""
STEPS = 150
"""Of gradient descent, for a layer in one representation. More fit the images better, and others no better."""
MOST_IMAGES = 32
FEWEST_IMAGES = 4
PLACES = 4096
"""How many values of a neuron a step looks at, where that takes between ``FEWEST_IMAGES`` and ``MOST_IMAGES``."""
WEIGHT_MACS = 2000
"""So many multiply-adds take about as long as all that a step does with one weight besides: dozens of passes over
memory (24 to 80 ns against 0.02)."""
RATE = 0.1
"""Of Adam."""
FREE = 0.2
"""The share of the steps in which nothing draws weights towards levels."""
PULL = 100.0
"""How strongly they are drawn there afterwards, beside an error that is one when all are rounded to the nearest."""
SHARPNESS = (20.0, 2.0)
"""From the first step with a pull to the last: at first only weights that are almost at a level are drawn to it."""


def learned_network(
    network: Network, wanted: Wanted, images: NDArray[np.float32], on_progress: Progress = silent
) -> Coarse:
    """As :func:`robustdice.rounding.network.round_network`, with learned rounding where that matters."""
    every = together(network, images, [layer.value for layer in network.layers])
    own, intact = _Stream(network, every), _Stream(network, every)
    generator = torch.Generator().manual_seed(0)
    found: Coarse = {}
    asked = [(index, layer) for index, layer in enumerate(network.layers) if wanted.get(index)]
    for done, (index, layer) in enumerate(asked):
        on_progress(done, len(asked))
        for stream in (own, intact):
            stream.run_before(layer.node)
        task = _Task.of(network, index, own, intact)
        for choice in wanted[index]:
            found[index, choice.representation] = task.rounded(choice, generator)
        own.parameters |= task.parameters(found[index, wanted[index][0].representation])
    return found


def steps_macs(network: Network, wanted: Wanted) -> int:
    """Multiply-adds that learning takes, forwards and back, and what takes as long as others."""
    return sum(
        STEPS
        * layer.neurons
        * (3 * _images_a_step(network.layers[index]) * layer.neuron_macs + WEIGHT_MACS * layer.filter_weights)
        for index, layer in enumerate(network.plan_layers)
        for choice in wanted.get(index, ())
        if choice.representation in LEARNT
    )


def _images_a_step(layer: NetworkLayer) -> int:
    return int(np.clip(PLACES // max(1, layer.layer.neuron_outputs), FEWEST_IMAGES, MOST_IMAGES))


class _Stream:
    """The values of a network for some images, as far as it has been run and they are still read, with ``parameters``
    that others may stand in for. A few images at a time, as within a layer values may be many times those at its ends;
    always as many, for some graphs work with their number: of the images up to a part less one are left out."""

    def __init__(self, network: Network, images: torch.Tensor) -> None:
        self.parameters: dict[fx.Node, torch.Tensor] = network.constants(images.device)
        parts = -(-len(images) // images_at_once(network))
        self._size = -(-len(images) // parts)
        self.values: dict[fx.Node, Any] = {network.input: images[: len(images) // self._size * self._size]}
        self._network, self._done = network, 0
        self._left = readers(network.nodes)

    def run_before(self, node: fx.Node) -> None:
        """All nodes that are before this one in the graph."""
        nodes = self._network.nodes
        part, self._done = nodes[self._done : nodes.index(node)], nodes.index(node)
        within = readers(part)
        kept = [each for each in part if self._left[each] > within[each]]
        self.values |= self.run(part, self.values, kept)
        for each in part:
            forget(each, self.values, self._left)

    def run(
        self, part: Sequence[fx.Node], values: Mapping[fx.Node, Any], kept: Sequence[fx.Node]
    ) -> dict[fx.Node, Any]:
        """What the nodes ``kept`` of a ``part`` of the graph are worth, from the ``values`` that the part reads."""
        per_image = self._network.per_image
        computed = [node for node in part if node.op == "call_function"]
        read = {used for node in computed for used in node.all_input_nodes if used in values}
        count = len(next(values[node] for node in values if node in per_image))
        found: dict[fx.Node, list[Any]] = {node: [] for node in kept if node in set(computed)}
        for start in range(0, count, self._size) if computed else ():
            some = {n: values[n][start : start + self._size] if n in per_image else values[n] for n in read}
            with torch.no_grad():
                execute(self._network.module, computed, some := {**self.parameters, **some})
            for node, parts in found.items():
                parts.append(some[node])
        return {node: torch.cat(parts) if node in per_image else parts[0] for node, parts in found.items()}


@dataclass(frozen=True)
class _Task:
    """A layer that is to be rounded: what it reads behind coarse predecessors (``reads``), what it is to give at the
    end of its tail (``goal``), and how to compute that (``tail``, from the layer's node on, with the ``given``
    parameters). ``for_all`` is what its ``folded`` filters are rounded to without learning, and what it sees."""

    network: Network
    layer: NetworkLayer
    tail: Sequence[fx.Node]
    given: Mapping[fx.Node, torch.Tensor]
    reads: torch.Tensor
    goal: torch.Tensor
    folded: Folded
    for_all: Target

    @classmethod
    def of(cls, network: Network, index: int, own: _Stream, intact: _Stream) -> _Task:
        layer, folded = network.layers[index], fold(network, network.layers[index])
        source, tail = layer.node.all_input_nodes[0], [layer.node]
        while tail[-1] is not layer.value:
            tail.append(next(iter(tail[-1].users)))
        seen, should = (filter_inputs(network, index, stream.values) for stream in (own, intact))
        return cls(
            network,
            layer,
            tail,
            dict(own.parameters),
            own.values[source],
            intact.run(tail, intact.values, [layer.value])[layer.value],
            folded,
            target(
                folded.filters,
                None if seen is None or should is None else Seen(seen, Intact.of(folded.filters, should)),
            ),
        )

    def rounded(self, choice: Choice, generator: torch.Generator) -> CoarseLayer:
        """The layer in one representation."""
        tail = {name: attribute(self.network.module, name).detach().cpu() for name in self.layer.tail_filters}
        known = self.folded, tail, self.for_all, can_shift(self.layer)
        if choice.representation not in LEARNT:
            return coarse_layer(self.folded, tail, choice, *known[2:])
        # In as many bits the levels next to the filters have other steps than GPTQ's; these are what is learned from.
        start = Target(self.folded.filters) if choice.representation in CODED else self.for_all
        first = with_filters(rounded_filter(start, choice), *known)
        return with_filters(self._learned(first, generator), *known)

    def parameters(self, coarse: CoarseLayer) -> dict[fx.Node, torch.Tensor]:
        """The parameters of the network that make it compute a coarse layer."""
        nodes = {str(node.target): node for node in self.network.nodes if node.op == "get_attr"}
        named = coarse_parameters(self.network, self.layer, coarse)
        return {nodes[name]: tensor.to(self.reads.device) for name, tensor in named.items()}

    def _learned(self, first: CoarseLayer, generator: torch.Generator) -> CoarseFilter:
        """Each weight at the level below or above it, so that all together give what is nearest to the goal, with the
        scales, the shift and the tail of the ``first`` layer. (The shift is made to fit the levels afterwards.)"""
        kind, group, parameters = first.representation, first.filter.group, self.parameters(first)
        (low, high), offset = code_range(kind), code_offset(kind)
        own = next(node for node in parameters if str(node.target) == self.layer.own_filter)
        filters = self.folded.filters.to(self.reads.device)
        scales = torch.from_numpy(first.filter.scales.astype(np.float32))
        steps = scales[:, torch.arange(filters.shape[1]) // group].to(filters.device)
        exact = filters / steps - offset
        below = exact.floor().clamp(low, high - 1)
        up = _Up((exact - below).clamp(0.01, 0.99))

        def at(levels: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
            return {**parameters, own: (levels * steps).reshape(parameters[own].shape)}

        with torch.no_grad():
            sample = torch.arange(len(self.reads), device=filters.device)[:: -(-len(self.reads) // MOST_IMAGES)]
            unit = self._error(at(to_levels(filters, steps, kind)), sample).clamp_min(1e-12)
        optimizer = torch.optim.Adam([up.free], lr=RATE)
        with torch.enable_grad():
            for step in range(STEPS):
                images = torch.randint(len(self.reads), (_images_a_step(self.layer),), generator=generator)
                error = self._error(at(below + up.share + offset), images.to(filters.device)) / unit
                settled = (step / STEPS - FREE) / (1 - FREE)
                if settled > 0:
                    error = error + PULL * up.unsettled(SHARPNESS[0] + settled * (SHARPNESS[1] - SHARPNESS[0]))
                optimizer.zero_grad()
                torch.autograd.backward(error)
                optimizer.step()
        levels = (below + (up.share > 0.5) + offset).detach().cpu()
        if kind in CODED:
            levels = fitting(levels, self.folded.filters / scales, kind)
        return of_levels(scales, levels, kind, group)

    def _error(self, parameters: Mapping[fx.Node, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """The mean square of what is off the goal for some images (positions) with these parameters."""
        values = {**self.given, **parameters, self.layer.node.all_input_nodes[0]: self.reads[images]}
        execute(self.network.module, self.tail, values)
        given: torch.Tensor = values[self.layer.value]
        return (given - self.goal[images]).square().mean()


class _Up:
    """How far each weight is rounded up, from 0 to 1: a sigmoid of what is learned (``free``), stretched a little, so
    that it gets to its ends."""

    def __init__(self, share: torch.Tensor) -> None:
        self.free = torch.logit((share + 0.1) / 1.2).requires_grad_()

    @property
    def share(self) -> torch.Tensor:
        """Of every weight."""
        return (1.2 * torch.sigmoid(self.free) - 0.1).clamp(0, 1)

    def unsettled(self, sharpness: float) -> torch.Tensor:
        """The mean over all weights of what is 0 at a level and 1 half way between two."""
        return (1 - (2 * self.share - 1).abs().pow(sharpness)).mean()
