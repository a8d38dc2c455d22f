"""All layers of a network in the representations that somebody holds them in, one after the other."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.model.execute import attribute, execute, forget, readers
from robustdice.model.network import Network, together
from robustdice.plan import Shard
from robustdice.progress import Progress, silent
from robustdice.representation import CoarseLayer
from robustdice.rounding.affine import can_shift, coarse_parameters, fold
from robustdice.rounding.inputs import columns
from robustdice.rounding.layer import Choice, Intact, Seen, coarse_layer, target

Wanted = Mapping[int, Sequence[Choice]]
"""Of layers (by position), the representations in which their weights are asked for; the first is what later layers
are fitted behind."""
Coarse = dict[tuple[int, str], CoarseLayer]
"""By layer and representation."""


def wanted_of(shards: Sequence[Sequence[Shard]], pairs: Mapping[int, int]) -> Wanted:
    """The coarse weights that the holders of all layers' ``shards`` have, the primaries' first. Of the second layer of
    one of the ``pairs`` there are weights for whatever is held of the first."""
    found: dict[int, list[Choice]] = {}
    firsts = {second: first for first, second in pairs.items()}
    for index in range(len(shards)):
        held = [shard.holders for shard in (*shards[index], *shards[firsts.get(index, index)])]
        by_turn = itertools.zip_longest(*held)
        used = dict.fromkeys(holder.representation for turn in by_turn for holder in turn if holder is not None)
        if choices := [Choice(kind) for kind in used if kind != "float32"]:
            found[index] = choices
    return found


def round_network(
    network: Network,
    wanted: Wanted,
    images: NDArray[np.float32] | None = None,
    on_progress: Progress = silent,
) -> Coarse:
    """Coarse weights of the layers in ``wanted``, in all the representations asked for.

    With ``images`` (unlabelled, [n, channels, height, width], a few hundred) every layer is fitted to what it sees when
    the layers before it are coarse already, each in the first of its representations; without, weights are rounded to
    their nearest levels.
    """
    if images is not None:
        (fitted,) = round_together(network, [wanted], images, on_progress=on_progress)
        return fitted
    found: Coarse = {}
    for done, (index, choices) in enumerate(wanted.items(), start=1):
        for choice, layer in _coarse(network, index, choices, None).items():
            found[index, choice.representation] = layer
        on_progress(done, len(wanted))
    return found


def round_together(
    network: Network,
    wanted: Sequence[Wanted],
    images: NDArray[np.float32],
    intact: IntactInputs | None = None,
    on_progress: Progress = silent,
) -> list[Coarse]:
    """For each of ``wanted`` the same as :func:`round_network`; what they have in common up to a layer is worked out
    once. ``intact`` has what layers see of these images, where that is known."""
    layers = {index for each in wanted for index, choices in each.items() if choices}
    if intact is None:
        intact = IntactInputs(network, layers, images, kept=len(wanted) > 1)
    walk, first = _Walk(network, wanted, intact, on_progress), together(network, images)
    own: dict[fx.Node, Any] = {**network.constants(first.device), network.input: first}
    if layers:
        with torch.no_grad():
            walk.run(0, own, readers(network.nodes), range(len(wanted)))
    return walk.found


class IntactInputs:
    """What the filters of some of the intact network's layers see of images: worked out in the layers' order, when it
    is first asked for."""

    def __init__(
        self, network: Network, layers: Collection[int], images: NDArray[np.float32], kept: bool = True
    ) -> None:
        """``kept``: it will be asked for again."""
        self._network, self._layers, self._images, self._kept = network, layers, images, kept
        self._source = self._in_order()
        self._known: dict[int, Intact | None] = {}

    def of(self, layer: int) -> Intact | None:
        """Of one layer; None where what it sees cannot be said."""
        while layer not in self._known:
            number, found = next(self._source)
            if self._kept or number == layer:
                self._known[number] = found
        return self._known[layer] if self._kept else self._known.pop(layer)

    def _in_order(self) -> Iterator[tuple[int, Intact | None]]:
        network, first = self._network, together(self._network, self._images)
        values: dict[fx.Node, Any] = {**network.constants(first.device), network.input: first}
        layers = {network.layers[index].node: index for index in self._layers}
        left = readers(network.nodes)
        for node in network.nodes:
            if (index := layers.get(node)) is not None:
                seen = filter_inputs(network, index, values)
                yield index, None if seen is None else Intact.of(fold(network, network.layers[index]).filters, seen)
            with torch.no_grad():
                execute(network.module, [node], values)
            forget(node, values, left)


class _Walk:
    """Through the network for several that are wanted: together as long as what they publish is alike."""

    def __init__(self, network: Network, wanted: Sequence[Wanted], intact: IntactInputs, on_progress: Progress) -> None:
        self._network, self._wanted, self._intact, self._on_progress = network, wanted, intact, on_progress
        self._layers = {layer.node: index for index, layer in enumerate(network.layers)}
        self._parameters = {str(node.target): node for node in network.nodes if node.op == "get_attr"}
        self._last = max((index for each in wanted for index, choices in each.items() if choices), default=-1)
        self._asked = sum(bool(choices) for each in wanted for choices in each.values())
        self._done = 0
        self.found: list[Coarse] = [{} for _ in wanted]

    def run(
        self, position: int, own: dict[fx.Node, Any], left: Counter[fx.Node], members: Sequence[int], told: bool = False
    ) -> None:
        """From the node at ``position`` on, for the ``members``; takes ``own`` values over. ``told``: the layer there
        is rounded, and they publish it alike."""
        for at in range(position, len(self._network.nodes)):
            node = self._network.nodes[at]
            index = self._layers.get(node)
            if index is not None and not (told and at == position):
                self._round(index, own, members)
                *others, members = self._alike(index, members)
                for part in others:
                    self.run(at, dict(own), left.copy(), part, told=True)
            if index is not None:
                if index == self._last:
                    return
                self._publish(index, own, members[0])
            execute(self._network.module, [node], own)
            forget(node, own, left)

    def _round(self, index: int, own: Mapping[fx.Node, Any], members: Sequence[int]) -> None:
        choices = list(dict.fromkeys(choice for member in members for choice in self._wanted[member].get(index, ())))
        if not choices:
            return
        intact, seen = self._intact.of(index), filter_inputs(self._network, index, own)
        both = None if intact is None or seen is None else Seen(seen, intact)
        coarse = _coarse(self._network, index, choices, both)
        for member in members:
            mine = self._wanted[member].get(index, ())
            self.found[member] |= {(index, choice.representation): coarse[choice] for choice in mine}
            self._done += bool(mine)
        self._on_progress(self._done, self._asked)

    def _alike(self, index: int, members: Sequence[int]) -> list[list[int]]:
        """The members that publish a layer in the same representation."""
        parts: dict[tuple[Choice, ...], list[int]] = {}
        for member in members:
            parts.setdefault(tuple(self._wanted[member].get(index, ())[:1]), []).append(member)
        return list(parts.values())

    def _publish(self, index: int, own: dict[fx.Node, Any], member: int) -> None:
        """Put a layer's parameters as one member publishes them in the place of the network's."""
        layer = self._network.layers[index]
        device = own[layer.node.all_input_nodes[0]].device
        for choice in self._wanted[member].get(index, ())[:1]:
            coarse = self.found[member][index, choice.representation]
            for name, tensor in coarse_parameters(self._network, layer, coarse).items():
                own[self._parameters[name]] = tensor.to(device)


def filter_inputs(network: Network, index: int, values: Mapping[fx.Node, Any]) -> torch.Tensor | None:
    """What a layer's filters are multiplied with: :func:`robustdice.rounding.inputs.columns`."""
    layer = network.layers[index]
    size = tuple(attribute(network.module, layer.own_filter).shape)
    return columns(layer, values[layer.node.all_input_nodes[0]].cpu(), size)


def _coarse(network: Network, index: int, choices: Sequence[Choice], seen: Seen | None) -> dict[Choice, CoarseLayer]:
    layer = network.layers[index]
    tail = {name: attribute(network.module, name).detach().cpu() for name in layer.tail_filters}
    folded = fold(network, layer)
    for_all = target(folded.filters, seen)
    return {choice: coarse_layer(folded, tail, choice, for_all, can_shift(layer)) for choice in choices}
