"""What a layer computes with when some of its neurons come from coarse copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.failure.handover import Handover, Sums, as_received, handover
from robustdice.model.execute import execute
from robustdice.model.network import Network
from robustdice.plan import FailureSet, Plan
from robustdice.representation import LOST, REPRESENTATIONS, CoarseLayer, Correction, Steps
from robustdice.rounding.affine import coarse_parameters, folded_parameters


@dataclass(frozen=True, eq=False)
class State:
    """What is computed under one failure set: of every layer's neurons the copy, int8[neurons] (a position in
    ``REPRESENTATIONS``, or ``LOST``), the layers' corrections, if any, and what arrives of it elsewhere, where that is
    rounded."""

    copies: tuple[NDArray[np.int8], ...]
    corrections: tuple[Correction | None, ...] | None = None
    handover: Handover | None = None

    def correction(self, layer: int) -> Correction | None:
        """A layer's correction, if it has one."""
        return None if self.corrections is None else self.corrections[layer]

    def sums(self, layer: int) -> Sums | None:
        """What a layer is added up from, where that is rounded."""
        return None if self.handover is None else self.handover.sums_of(layer)

    @cached_property
    def key(self) -> bytes:
        """Equal for states that compute the same."""
        parts = [copies.tobytes() for copies in self.copies]
        parts += [
            b"none" if each is None else each.scale.tobytes() + each.shift.tobytes() for each in self.corrections or ()
        ]
        return b"|".join([*parts, repr(self.handover).encode()])


def state_of(plan: Plan, failed: FailureSet) -> State:
    """What a plan's devices compute while those of ``failed`` are down."""
    return State(plan.copies(failed), plan.correction(failed), handover(plan, failed))


def intact(network: Network) -> State:
    """The unpartitioned network."""
    return State(tuple(np.zeros(layer.layer.neurons, np.int8) for layer in network.layers))


class Copies:
    """What a network's layers compute, as copies in several representations have them."""

    def __init__(
        self,
        network: Network,
        coarse: Mapping[tuple[int, str], CoarseLayer],
        activations: Mapping[int, Steps] = MappingProxyType({}),
        pairs: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """``coarse`` are a plan's coarse weights, ``activations`` the layers that read rounded inputs, ``pairs`` those
        with coarse copies, first layer to second."""
        self._network = network
        self._coarse = coarse
        self._activations = activations
        self._firsts = {second: first for first, second in pairs.items()}
        self._nodes = {str(node.target): node for node in network.nodes if node.op == "get_attr"}
        self._known: dict[tuple[int, str, torch.device], dict[fx.Node, torch.Tensor]] = {}

    @classmethod
    def of(cls, network: Network, plan: Plan) -> Copies:
        """A plan's."""
        pairs = {first: second for first, second in plan.pairs.items() if plan.is_coarse_pair(first)}
        return cls(network, plan.coarse, plan.activations, pairs)

    def compute(self, layer: int, copies: NDArray[np.int8], values: dict[fx.Node, Any]) -> None:
        """Add to ``values`` what a layer's node gives, from these copies of its neurons, and their parameters."""
        values.update(self.parameters(layer, copies, values))
        self._run(layer, copies, values)

    def _run(self, layer: int, copies: NDArray[np.int8], values: dict[fx.Node, Any]) -> None:
        node = self._network.layers[layer].node
        seen = dict(values)
        if layer in self._activations and not (copies == 0).any():  # the intact network rounds nothing
            source = node.all_input_nodes[0]
            seen[source] = rounded(values[source], self._activations[layer])
        execute(self._network.module, [node], seen)
        values[node] = seen[node]

    def compute_in(self, state: State, layer: int, values: dict[fx.Node, Any]) -> None:
        """As :meth:`compute`, in a state: a layer that is added up, from its partial sums as they arrive."""
        sums, copies = state.sums(layer), state.copies[layer]
        if (of_first := self._firsts.get(layer)) is None:
            values.update(self.parameters(layer, copies, values))
        else:
            values.update(self.parameters_of_second(layer, copies, state.copies[of_first], values))
        if sums is None or state.handover is None:
            self._run(layer, copies, values)
            return
        first, second = self._network.layers[sums.first], self._network.layers[layer].without_tail
        form = state.handover.form_of(sums, self._network)
        whole, bias = values[first.value], None if second.own_bias is None else self._nodes[second.own_bias]
        total = whole.new_zeros((len(whole), *second.shape))
        for neurons in sums.parts:
            mine = torch.zeros(first.layer.neurons, dtype=torch.bool, device=whole.device)
            mine[list(neurons)] = True
            seen = {**values, first.value: torch.where(first.broadcast(mine), whole, 0.0)}
            if bias is not None:
                seen[bias] = torch.zeros_like(values[bias])
            self._run(layer, copies, seen)
            total += as_received(seen[second.node], form)
        values[second.node] = total if bias is None else total + second.broadcast(values[bias])

    def parameters(
        self, layer: int, copies: NDArray[np.int8], values: Mapping[fx.Node, torch.Tensor]
    ) -> dict[fx.Node, torch.Tensor]:
        """The parameters of a layer that are not those of the network (in ``values``), by their nodes.

        A lost neuron's are those of any copy.
        """
        kinds = [REPRESENTATIONS[kind] for kind in np.unique(copies[copies != LOST])]
        if not kinds or kinds == ["float32"]:
            return {}
        of_layer = self._network.layers[layer]
        device = values[self._nodes[of_layer.own_filter]].device
        sources = {kind: self._of_kind(layer, kind, device) for kind in kinds if kind != "float32"}
        if len(kinds) == 1:
            return sources[kinds[0]]
        mixed = {}
        slices = {parameter.name: parameter for parameter in of_layer.parameters}
        for node in next(iter(sources.values())):
            parameter = slices[str(node.target)]
            tensor = values[node].clone()
            for kind, of_kind in sources.items():
                neurons = np.flatnonzero(copies == REPRESENTATIONS.index(kind))
                rows = (neurons[:, None] * parameter.features + np.arange(parameter.features)).ravel()
                index = torch.from_numpy(rows).to(device)
                tensor.index_copy_(parameter.axis, index, of_kind[node].index_select(parameter.axis, index))
            mixed[node] = tensor
        return mixed

    def parameters_of_second(
        self, layer: int, copies: NDArray[np.int8], of_first: NDArray[np.int8], values: Mapping[fx.Node, Any]
    ) -> dict[fx.Node, torch.Tensor]:
        """As :meth:`parameters` of the second layer of a pair with coarse copies: its weights for each neuron of the
        first as the copy ``of_first`` has them, and all else as everybody has it."""
        second, first = self._network.layers[layer], self._network.layers[self._firsts[layer]]
        node = self._nodes[second.own_filter]
        device = values[node].device
        found = dict(self._of_kind(layer, REPRESENTATIONS[copies[0]], device))
        kinds = np.unique(of_first[of_first != LOST])
        sources = [self._of_kind(layer, REPRESENTATIONS[kind], device)[node] for kind in kinds]
        if sources:
            found[node] = sources[0] if len(sources) == 1 else sources[0].clone()
        for kind, source in zip(kinds[1:], sources[1:], strict=True):
            neurons = np.flatnonzero(of_first == kind)
            columns = (neurons[:, None] * first.features + np.arange(first.features)).ravel()
            index = torch.from_numpy(columns).to(device)
            found[node].index_copy_(1, index, source.index_select(1, index))
        return found

    def _of_kind(self, layer: int, kind: str, device: torch.device) -> dict[fx.Node, torch.Tensor]:
        """The parameters of copies of one representation; ``float32`` in pairs alone, where they are folded."""
        key = (layer, kind, device)
        if key not in self._known:
            of_layer = self._network.layers[layer]
            if kind == "float32":
                arrays = folded_parameters(self._network, of_layer)
            else:
                arrays = coarse_parameters(self._network, of_layer, self._coarse[layer, kind])
            self._known[key] = {self._nodes[name]: tensor.to(device) for name, tensor in arrays.items()}
        return self._known[key]


def rounded(value: torch.Tensor, steps: Steps) -> torch.Tensor:
    """What a layer reads of ``value``: the very numbers that ONNX's QuantizeLinear and DequantizeLinear give."""
    codes = (value.detach() / steps.scale).round_().add_(steps.zero).clamp_(0, 255)
    found = codes.sub_(steps.zero).mul_(steps.scale)
    if value.requires_grad:  # gradients pass as if nothing was rounded
        return value + (found - value).detach()
    return found
