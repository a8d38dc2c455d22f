"""One batch of images under many sets of survivors, with everything computed once that they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch._ops import OpOverload

from robustdice.model.canonical import execute
from robustdice.model.network import Network, NetworkLayer

Masks = Sequence[NDArray[np.bool_]]
"""For every layer, which neurons are there: bool[neurons]."""


def run_under(network: Network, images: torch.Tensor, survivors: Sequence[Masks]) -> list[torch.Tensor]:
    """Class scores [batch, outputs] of ``images`` for each of ``survivors``, as ``Network.run`` gives them.

    The network is computed once up to the first layer at which the sets differ; from there on those that still agree
    stay together, down to the class scores. Depth first, so that at most one intermediate state for each layer is kept.
    """
    walk = _Walk(network, survivors)
    values: dict[fx.Node, Any] = {**network.constants(images.device), network.input: images}
    with torch.no_grad():
        walk.run(0, values, Counter(walk.uses), list(range(len(survivors))))
    return walk.results


class _Walk:
    def __init__(self, network: Network, survivors: Sequence[Masks]) -> None:
        self.network = network
        self.survivors = survivors
        self.nodes = network.nodes
        self.exchanges = {layer.value: index for index, layer in enumerate(network.layers)}
        self.uses = Counter(used for node in self.nodes for used in node.all_input_nodes)
        self.results: list[torch.Tensor] = [torch.empty(0)] * len(survivors)

    def run(self, position: int, values: dict[fx.Node, Any], remaining: Counter[fx.Node], members: list[int]) -> None:
        """From the node at ``position`` to the end, for the ``members`` of survivors; takes ``values`` over."""
        for at in range(position, len(self.nodes)):
            node = self.nodes[at]
            execute(self.network.module, [node], values)
            for used in node.all_input_nodes:
                remaining[used] -= 1
                if not remaining[used] and used is not self.network.output:
                    del values[used]
            if node in self.exchanges:
                parts = self._parts(self.exchanges[node], members)
                whole = values[node]
                own = not _may_be_view(node)
                for part, lost in parts[:-1]:
                    copy = {**values, node: self._fill(node, whole, lost)}
                    self.run(at + 1, copy, remaining.copy(), part)
                members, lost = parts[-1]
                # The parts before it have copies. Unless it shows another tensor, nobody else reads it any more.
                values[node] = self._fill(node, whole, lost, in_place=own)
        for member in members:
            self.results[member] = values[self.network.output]

    def _parts(self, index: int, members: list[int]) -> list[tuple[list[int], NDArray[np.intp]]]:
        """The members that agree about layer ``index``, and the neurons that each part has lost; nothing only in the
        last part, which so does not share its tensor with others that are to be filled."""
        parts: dict[bytes, list[int]] = {}
        for member in members:
            parts.setdefault(self.survivors[member][index].tobytes(), []).append(member)
        found = [(part, np.flatnonzero(~self.survivors[part[0]][index])) for part in parts.values()]
        return sorted(found, key=lambda part: not part[1].size)

    def _fill(self, node: fx.Node, value: torch.Tensor, lost: NDArray[np.intp], in_place: bool = False) -> torch.Tensor:
        if not lost.size:
            return value
        layer: NetworkLayer = self.network.layers[self.exchanges[node]]
        if layer.fill == 0:
            # All bits of what is lost are cleared, whatever it is: several times as fast as filling in zeros.
            bits = torch.full((layer.layer.neurons,), -1, dtype=torch.int32, device=value.device)
            bits[torch.from_numpy(lost)] = 0
            both, kept = value.view(torch.int32), layer.broadcast(bits)
            return (both.bitwise_and_(kept) if in_place else both.bitwise_and(kept)).view(torch.float32)
        entries = torch.from_numpy((lost[:, None] * layer.features + np.arange(layer.features)).ravel())
        fill = value.index_fill_ if in_place else value.index_fill
        return fill(layer.axis, entries.to(value.device), layer.fill)


def _may_be_view(node: fx.Node) -> bool:
    """Whether what a node gives may show the memory of what it is given, which other members may still read."""
    return not isinstance(node.target, OpOverload) or any(r.alias_info for r in node.target._schema.returns)
