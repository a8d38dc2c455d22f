"""Layers, their shards, and who publishes a shard under a failure set."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from robustdice.errors import PlanError
from robustdice.representation import BITS

MAX_DEVICES = 16
MAX_SETS = 256
"""Of more failure sets than this, some are drawn where each of them takes time."""
FailureSet = frozenset[int]
"""The devices that are down."""


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer with its tail, as far as partitioning needs to know it.

    ``group`` neurons that follow each other cannot be separated (1, except in a grouped convolution).
    ``neuron_weights`` counts the parameters of one neuron: its filter, its bias, and what belongs to
    it in the tail. ``neuron_macs`` are its multiply-adds for one image, ``neuron_outputs`` the
    activations that it hands over at the exchange.

    What of that is the tail's is counted in ``tail_weights`` and ``tail_macs``; before the tail a neuron has
    ``neuron_preactivations``. ``reads_group``: every group reads input channels of its own (grouped and depthwise
    convolutions); otherwise all neurons read the same input.

    For coarse copies: ``filter_weights`` of a neuron are its own filter's, ``affine_weights`` (its bias, batch norm and
    the like) only scale and shift what the filter gives, and ``tail_filter_weights`` are in ``tail_filters`` depthwise
    filters of the tail.

    ``gives_scores``: its neurons are the class scores.
    """

    name: str
    neurons: int
    group: int
    neuron_weights: int
    neuron_macs: int
    neuron_outputs: int
    tail_weights: int = 0
    tail_macs: int = 0
    neuron_preactivations: int = 1
    reads_group: bool = False
    filter_weights: int = 0
    affine_weights: int = 0
    tail_filter_weights: int = 0
    tail_filters: int = 0
    gives_scores: bool = False


@dataclass(frozen=True)
class Holder:
    """A device that has a shard's weights, and the representation that it keeps them in."""

    device: int
    representation: str = "float32"


@dataclass(frozen=True)
class Shard:
    """The neurons of one layer that have the same holders in the same order (the first is the primary).

    A *parity* shard has no neurons of its own: it is the sum of the layer's shards ``parity_of`` (positions), each
    padded with zeros to the longest. It is a spare of all of them: whichever one is missing is it minus the others.

    Only in bundles, where sums are handed over (:func:`robustdice.plan.pairs.added_up`), a shard has one holder and is
    published just while the devices ``after`` which it comes are all down.
    """

    neurons: tuple[int, ...]
    holders: tuple[Holder, ...]
    parity_of: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """The holders' device numbers, in order of preference."""
        return tuple(holder.device for holder in self.holders)

    def representation_on(self, device: int) -> str:
        """What one of the holders keeps the shard in."""
        return next(holder.representation for holder in self.holders if holder.device == device)

    def publisher(self, failed: Iterable[int]) -> int | None:
        """The first holder that is not in ``failed``, or None when nobody is left, or it is not the shard's turn."""
        down = frozenset(failed)
        its_turn = down.issuperset(self.after)
        return next((device for device in self.devices if its_turn and device not in down), None)


def shard_width(shards: Sequence[Shard], number: int) -> int:
    """How many neurons' worth of values shard ``number`` of a layer has: a parity shard as many as its longest."""
    shard = shards[number]
    return max(len(shards[member].neurons) for member in shard.parity_of) if shard.parity_of else len(shard.neurons)


def publishers(shards: Sequence[Shard], failed: Iterable[int]) -> tuple[int | None, ...]:
    """For every shard of one layer: the first holder that is up, or None when nobody is left. A parity shard is
    published only when it is of use: when exactly one of its members has nobody left."""
    down = frozenset(failed)
    found = [None if shard.parity_of else shard.publisher(down) for shard in shards]
    for number, shard in enumerate(shards):
        if shard.parity_of and sum(found[member] is None for member in shard.parity_of) == 1:
            found[number] = shard.publisher(down)
    return tuple(found)


def nearest_calibrated(calibrated: Iterable[FailureSet], failed: FailureSet) -> FailureSet | None:
    """The calibrated failure set whose corrections apply while ``failed`` are down: the one that has most devices in
    common with it and none beside (of several, the first), or None."""
    return max(
        (known for known in calibrated if known <= failed),
        key=lambda known: (len(known), [-device for device in sorted(known)]),
        default=None,
    )


def check_devices(devices: int) -> None:
    """PlanError unless plans can be for so many devices."""
    if not 2 <= devices <= MAX_DEVICES:
        raise PlanError(f"a plan is for 2 to {MAX_DEVICES} devices, not {devices}")


def check_max_failed(devices: int, max_failed: int | None) -> None:
    """PlanError unless so many of the devices can fail at once that one is left, or None is said."""
    if max_failed is not None and not 0 <= max_failed < devices:
        raise PlanError(f"of {devices} devices 0 to {devices - 1} can fail, not {max_failed}")


def failure_sets(devices: int, size: int) -> list[FailureSet]:
    """All failure sets of ``size`` devices, in lexicographic order."""
    return [frozenset(chosen) for chosen in itertools.combinations(range(devices), size)]


def check_layer(layer: Layer) -> None:
    """PlanError unless the layer's numbers make sense."""
    for name, value in asdict(layer).items():
        least = 0 if name.startswith(("tail_", "reads_", "filter_", "affine_", "gives_")) else 1
        if name != "name" and not (isinstance(value, int) and value >= least):
            raise PlanError(f"layer {layer.name}: {name} must be a whole number of at least {least}, got {value!r}")
    if layer.tail_weights >= layer.neuron_weights or layer.tail_macs >= layer.neuron_macs:
        raise PlanError(f"layer {layer.name}: the tail has more than the whole layer")
    if layer.filter_weights + layer.affine_weights + layer.tail_filter_weights > layer.neuron_weights:
        raise PlanError(f"layer {layer.name}: its filters have more weights than a neuron")
    if layer.neurons % layer.group:
        raise PlanError(f"layer {layer.name}: {layer.neurons} neurons are not a multiple of their group, {layer.group}")


def check_shard(devices: int, layer: Layer, shard: Shard) -> None:
    """PlanError unless the shard is one of this layer on that many devices."""
    if bool(shard.neurons) == bool(shard.parity_of) or list(shard.neurons) != sorted(shard.neurons):
        raise PlanError(f"layer {layer.name}: a shard's neurons must be in ascending order, at least one")
    groups = {neuron // layer.group for neuron in shard.neurons}
    if len(groups) * layer.group != len(shard.neurons):
        raise PlanError(f"layer {layer.name}: a shard splits a group of {layer.group} neurons")
    if shard.after:
        raise PlanError(f"layer {layer.name}: a plan's shard is published whoever is down, not after {shard.after}")
    if not shard.holders or len(set(shard.devices)) != len(shard.devices):
        raise PlanError(f"layer {layer.name}: a shard needs different holders, at least one; got {shard.devices}")
    for holder in shard.holders:
        device, kind = holder.device, holder.representation
        if not 0 <= device < devices:
            raise PlanError(f"layer {layer.name}: device {device} does not exist, the plan has {devices} devices")
        if kind not in BITS:
            raise PlanError(f"layer {layer.name}: unknown representation {kind!r}; known: {', '.join(BITS)}")
        if kind != "float32" and shard.parity_of:
            raise PlanError(f"layer {layer.name}: a sum of shards is kept in float32, not in {kind}")


def parity_problem(shards: Sequence[Shard]) -> str | None:
    """What is wrong with the parity shard of a layer, if it has one: it comes last, is the sum of all others, and is
    held by devices that hold none of these."""
    *members, last = shards
    if any(shard.parity_of for shard in members):
        return "only the last shard can be a parity shard"
    if last.parity_of and last.parity_of != tuple(range(len(members))):
        return f"the parity shard must be of all {len(members)} other shards, in order, not of {last.parity_of}"
    if last.parity_of and {d for shard in members for d in shard.devices}.intersection(last.devices):
        return "a device holds both the parity shard and one of those that it is the sum of"
    return None
