"""One batch of images under many failure sets, with everything computed once that they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch._ops import OpOverload

from robustdice.failure.copies import Copies, State
from robustdice.failure.handover import Handover, as_received, forms
from robustdice.model.execute import execute, readers
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network
from robustdice.representation import LOST, Correction
from robustdice.wire_format import WireForm


def run_under(network: Network, images: torch.Tensor, states: Sequence[State], copies: Copies) -> list[torch.Tensor]:
    """Class scores [batch, outputs] of ``images`` for each of ``states``.

    The network is computed once up to the first layer at which the states differ; from there on those that still agree
    stay together, down to the class scores. Depth first, so that at most one intermediate state for each layer is kept.
    """
    walk = _Walk(network, states, copies)
    values: dict[fx.Node, Any] = {**network.constants(images.device), network.input: images}
    with torch.no_grad():
        walk.run(0, values, Counter(walk.uses), list(range(len(states))))
    return walk.results


class _Walk:
    def __init__(self, network: Network, states: Sequence[State], copies: Copies) -> None:
        self.network = network
        self.states = states
        self.copies = copies
        self.nodes = network.nodes
        self.layers = {layer.node: index for index, layer in enumerate(network.layers)}
        self.corrected = {layer.affine_end: index for index, layer in enumerate(network.layers)}
        self.exchanges = {layer.value: index for index, layer in enumerate(network.layers)}
        of_handovers = {each: forms(network, each) for each in {state.handover for state in states}}
        self.forms = [of_handovers[state.handover] for state in states]
        """For each state, how values travel that are rounded on their way."""
        self.travelling = {node for each in self.forms for node in each}
        self.uses = readers(self.nodes)
        self.results: list[torch.Tensor] = [torch.empty(0)] * len(states)

    def run(
        self,
        position: int,
        values: dict[fx.Node, Any],
        remaining: Counter[fx.Node],
        members: list[int],
        together: bool = False,
    ) -> None:
        """From the node at ``position`` to the end, for the ``members`` of the states; takes ``values`` over.

        ``together``: at the node at ``position`` they have been told apart already.
        """
        for at in range(position, len(self.nodes)):
            node = self.nodes[at]
            if node in self.layers and not (together and at == position):
                *others, members = self._by_copies(self.layers[node], members)
                for part in others:
                    self.run(at, dict(values), remaining.copy(), part, together=True)
            if node in self.layers:
                index = self.layers[node]
                self.copies.compute_in(self.states[members[0]], index, values)
            else:
                execute(self.network.module, [node], values)
            for used in node.all_input_nodes:
                remaining[used] -= 1
                if not remaining[used] and used is not self.network.output:
                    del values[used]
            if node in self.corrected:
                index = self.corrected[node]
                correction = self.states[members[0]].correction(index)
                values[node] = correct(self.network.layers[index], values[node], correction)
            if node in self.exchanges or node in self.travelling:
                whole, parts = values[node], self._parts(node, members)
                received = {form: as_received(whole, form) for _, form, _ in parts}
                own = not _may_be_view(node)
                for part, form, lost in parts[:-1]:
                    copy = {**values, node: self._filled(node, received[form], lost)}
                    self.run(at + 1, copy, remaining.copy(), part)
                members, form, lost = parts[-1]
                # The parts before it have copies, or are done. Unless it shows another tensor, nobody else reads it any
                # more.
                values[node] = self._filled(node, received[form], lost, in_place=own)
        for member in members:
            self.results[member] = values[self.network.output]

    def _by_copies(self, index: int, members: list[int]) -> list[list[int]]:
        """The members whose neurons of layer ``index`` come from the same copies, with the same correction, and of the
        same partial sums. A lost neuron may come from any, so that what is only lost does not tell them apart."""
        parts: dict[tuple[bytes, int, Handover | None], list[int]] = {}
        kinds = {int(kind) for member in members for kind in np.unique(self.states[member].copies[index])} - {LOST}
        for member in members:
            state = self.states[member]
            copies = state.copies[index] if len(kinds) > 1 else np.empty(0)
            key = (copies.tobytes(), id(state.correction(index)), state.handover if state.sums(index) else None)
            parts.setdefault(key, []).append(member)
        return list(parts.values())

    def _parts(self, node: fx.Node, members: list[int]) -> list[tuple[list[int], WireForm | None, NDArray[np.intp]]]:
        """The members that receive a value in the same form and lose the same neurons, the form, and which neurons
        these are; none only in the last part of a form, which so does not share its tensor with others that are to be
        filled."""
        parts: dict[tuple[WireForm | None, bytes], tuple[list[int], NDArray[np.intp]]] = {}
        for member in members:
            index = self.exchanges.get(node)
            kept = np.empty(0, np.int8) if index is None else self.states[member].copies[index]
            lost = np.flatnonzero(kept == LOST)
            parts.setdefault((self.forms[member].get(node), lost.tobytes()), ([], lost))[0].append(member)
        found = [(part, form, lost) for (form, _), (part, lost) in parts.items()]
        return sorted(found, key=lambda part: (repr(part[1]), not part[2].size))

    def _filled(
        self, node: fx.Node, value: torch.Tensor, lost: NDArray[np.intp], in_place: bool = False
    ) -> torch.Tensor:
        """The value at a node without the neurons ``lost`` of the layer that it is of."""
        return fill(self.network.layers[self.exchanges[node]], value, lost, in_place) if lost.size else value


def correct(layer: NetworkLayer, value: torch.Tensor, correction: Correction | None) -> torch.Tensor:
    """What a layer gives behind its affine chain, with its neurons scaled and shifted."""
    if correction is None:
        return value
    scale, shift = (torch.from_numpy(each.copy()).to(value.device) for each in (correction.scale, correction.shift))
    return scaled(layer, value, scale, shift)


def scaled(layer: NetworkLayer, value: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """What a layer gives behind its affine chain, times ``scale`` and plus ``shift``, [neurons] each."""
    shape = [-1 if position == layer.affine_axis else 1 for position in range(value.ndim)]
    return value * scale.reshape(shape) + shift.reshape(shape)


def fill(layer: NetworkLayer, value: torch.Tensor, lost: NDArray[np.intp], in_place: bool = False) -> torch.Tensor:
    """A layer's exchanged value without its neurons ``lost``."""
    if not lost.size:
        return value
    if layer.fill == 0 and not value.requires_grad:  # bits have no gradient
        # All bits of what is lost are cleared, whatever it is: several times as fast as filling in zeros.
        bits = torch.full((layer.layer.neurons,), -1, dtype=torch.int32, device=value.device)
        bits[torch.from_numpy(lost)] = 0
        both, kept = value.view(torch.int32), layer.broadcast(bits)
        return (both.bitwise_and_(kept) if in_place else both.bitwise_and(kept)).view(torch.float32)
    entries = torch.from_numpy((lost[:, None] * layer.features + np.arange(layer.features)).ravel())
    filled = value.index_fill_ if in_place else value.index_fill
    return filled(layer.axis, entries.to(value.device), layer.fill)


def _may_be_view(node: fx.Node) -> bool:
    """Whether what a node gives may show the memory of what it is given, which other members may still read."""
    return not isinstance(node.target, OpOverload) or any(r.alias_info for r in node.target._schema.returns)
