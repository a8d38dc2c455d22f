"""What arrives of what devices hand over in one state, where it is rounded on its way: values, strips, partial sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from robustdice.model.network import Network
from robustdice.model.strips import ROWS, region_of
from robustdice.plan import FailureSet, Plan, publishers
from robustdice.wire_format import WireForm


@dataclass(frozen=True)
class Sums:
    """A pair of layers (their positions): the neurons of the first that are in each partial sum, in the order in which
    these are added up."""

    first: int
    second: int
    parts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Handover:
    """What is handed over after each layer travels as (``wires``), which ``runs`` of layers are computed in strips, and
    which layers are added up from ``sums``."""

    wires: tuple[str, ...]
    runs: tuple[tuple[int, ...], ...] = ()
    sums: tuple[Sums, ...] = ()

    def sums_of(self, layer: int) -> Sums | None:
        """What a layer is added up from, if it is."""
        return next((each for each in self.sums if each.second == layer), None)

    def form_of(self, sums: Sums, network: Network) -> WireForm:
        """How partial sums travel."""
        second = network.layers[sums.second].without_tail
        return WireForm(self.wires[sums.first], second.shape, second.axis)


def handover(plan: Plan, failed: FailureSet) -> Handover | None:
    """What a plan's devices hand over while those of ``failed`` are down; None where nothing is rounded."""
    if plan.wire == "float32":
        return None
    sums = []
    for first, second in plan.pairs.items():
        shards = plan.sums(first)
        found = zip(shards, publishers(shards, failed), strict=True)
        sums.append(Sums(first, second, tuple(shard.neurons for shard, device in found if device is not None)))
    return Handover(plan.wires, tuple(run.layers for run in plan.strips), tuple(sums))


def forms(network: Network, of: Handover | None) -> dict[fx.Node, WireForm]:
    """How the values travel that are gathered, where they are rounded."""
    if of is None:
        return {}
    ends = {run[-1]: region_of(network, run).end for run in of.runs}
    firsts = {each.first for each in of.sums}
    found = {}
    for index, layer in enumerate(network.layers):
        if of.wires[index] == "float32" or index in firsts:
            continue
        if (end := ends.get(index)) is not None:
            found[end] = WireForm(of.wires[index], tuple(network.shapes[end][1:]), ROWS)
        else:
            found[layer.value] = WireForm(of.wires[index], layer.shape, layer.axis, layer.features)
    return found


def as_received(value: torch.Tensor, form: WireForm | None) -> torch.Tensor:
    """What everybody has of a value that travels in some form (None: as it is), whoever has computed it included."""
    if form is None or form.wire == "float32":
        return value
    return torch.from_numpy(form.widen(form.narrow(value.cpu().contiguous().numpy()))).to(value.device)
