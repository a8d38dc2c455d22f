"""A plan: for every layer its shards, and who holds them in which order.

Everything else (holders matrix, bytes per device, who publishes under a failure set) follows from
the shards. NumPy only: the workshop writes plans, the device side reasons with the same functions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import PlanError
from robustdice.files import write_atomically

FORMAT_VERSION = 2
MAX_DEVICES = 16
BYTES_PER_WEIGHT = {"float32": 4}
"""Representations a copy can be kept in, and the bytes of one weight."""

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
    """

    neurons: tuple[int, ...]
    holders: tuple[Holder, ...]
    parity_of: tuple[int, ...] = ()

    @property
    def devices(self) -> tuple[int, ...]:
        """The holders' device numbers, in order of preference."""
        return tuple(holder.device for holder in self.holders)

    def publisher(self, failed: Iterable[int]) -> int | None:
        """The first holder that is not in ``failed``, or None when nobody is left."""
        down = frozenset(failed)
        return next((device for device in self.devices if device not in down), None)


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


@dataclass(frozen=True)
class ModelReference:
    """Where a model comes from: enough to load it again and to notice when it has changed."""

    source: str
    digest: str
    random_weights_seed: int | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The shards of every layer. ``shared_weights`` counts the parameters outside of all layers,
    which every device needs. ``settings`` records how the plan was made (thresholds, seeds, ...)."""

    devices: int
    layers: tuple[Layer, ...]
    shards: tuple[tuple[Shard, ...], ...]
    shared_weights: int
    method: str
    model: ModelReference
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters of the model in float32."""
        weights = sum(layer.neurons * layer.neuron_weights for layer in self.layers)
        return 4 * (weights + self.shared_weights)

    @property
    def bytes_per_device(self) -> tuple[int, ...]:
        """Bytes of parameters that each device holds."""
        held = np.full(self.devices, 4 * self.shared_weights, dtype=np.int64)
        for index, (layer, shards) in enumerate(zip(self.layers, self.shards, strict=True)):
            by_all = layer.tail_weights if self.exchanged_before_tail(index) else 0
            held += 4 * layer.neurons * by_all
            for number, shard in enumerate(shards):
                # Filters over different inputs cannot be added up: their parity has all of them.
                summed = not (shard.parity_of and layer.reads_group)
                neurons = (
                    shard_width(shards, number) if summed else sum(len(shards[m].neurons) for m in shard.parity_of)
                )
                for holder in shard.holders:
                    width = BYTES_PER_WEIGHT[holder.representation]
                    held[holder.device] += width * (layer.neuron_weights - by_all) * neurons
        return tuple(int(b) for b in held)

    @property
    def memory_share(self) -> float:
        """The largest device's bytes over the bytes of all parameters in float32."""
        return max(self.bytes_per_device) / self.total_bytes

    def held_by_all(self, layer: int) -> bool:
        """Whether every device holds the whole layer: all compute it, and it has no exchange."""
        return all(len(shard.holders) == self.devices for shard in self.shards[layer])

    def exchanged_before_tail(self, layer: int) -> bool:
        """Whether devices hand each other pre-activations, and each computes the whole tail: sums need that."""
        return any(shard.parity_of for shard in self.shards[layer])

    @property
    def exchanged_activations(self) -> int:
        """Activations of one image that are handed over while every device is up, each counted once."""
        return sum(
            layer.neurons * (layer.neuron_preactivations if self.exchanged_before_tail(index) else layer.neuron_outputs)
            for index, layer in enumerate(self.layers)
            if not self.held_by_all(index)
        )

    @property
    def healthy_compute_share(self) -> float:
        """The largest device's share of the model's multiply-adds while every device is up and spares
        stand by."""
        work = np.zeros(self.devices)
        for index, (layer, shards) in enumerate(zip(self.layers, self.shards, strict=True)):
            if self.held_by_all(index):
                work += layer.neurons * layer.neuron_macs
            else:
                by_all = layer.tail_macs if self.exchanged_before_tail(index) else 0
                work += layer.neurons * by_all
                for shard in shards:
                    work[shard.devices[0]] += len(shard.neurons) * (layer.neuron_macs - by_all)
        return float(work.max() / sum(layer.neurons * layer.neuron_macs for layer in self.layers))

    def publishers(self, failed: Iterable[int]) -> tuple[tuple[int | None, ...], ...]:
        """For every layer and shard: the first holder that is up, or None, as :func:`publishers` says."""
        down = self.failure_set(failed)
        return tuple(publishers(shards, down) for shards in self.shards)

    def surviving_neurons(self, failed: Iterable[int]) -> tuple[NDArray[np.bool_], ...]:
        """For every layer: which neurons still have a publisher or follow from a parity shard, bool[neurons]."""
        masks = []
        for layer, shards, found in zip(self.layers, self.shards, self.publishers(failed), strict=True):
            mask = np.zeros(layer.neurons, dtype=np.bool_)
            repaired = any(shard.parity_of and device is not None for shard, device in zip(shards, found, strict=True))
            for shard, device in zip(shards, found, strict=True):
                mask[list(shard.neurons)] = repaired or device is not None
            mask.flags.writeable = False
            masks.append(mask)
        return tuple(masks)

    def failure_set(self, failed: Iterable[int]) -> FailureSet:
        """``failed`` as a failure set of this plan; PlanError when it names a device that does not exist."""
        down = frozenset(failed)
        if unknown := sorted(d for d in down if not 0 <= d < self.devices):
            raise PlanError(f"device {unknown[0]} does not exist: the plan has devices 0 to {self.devices - 1}")
        return down

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything the plan says."""
        return hashlib.sha256(_canonical(self)).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to one file (docs/formats.md); OutputError when that is not possible."""
        write_atomically(Path(path), _to_bytes(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan; PlanError when the file is missing, damaged or of another version."""
        return _load(Path(path))


def check_max_failed(devices: int, max_failed: int | None) -> None:
    """PlanError unless so many of the devices can fail at once that one is left, or None is said."""
    if max_failed is not None and not 0 <= max_failed < devices:
        raise PlanError(f"of {devices} devices 0 to {devices - 1} can fail, not {max_failed}")


def failure_sets(devices: int, size: int) -> list[FailureSet]:
    """All failure sets of ``size`` devices, in lexicographic order."""
    return [frozenset(chosen) for chosen in itertools.combinations(range(devices), size)]


def _canonical(plan: Plan) -> bytes:
    return json.dumps(_to_json(plan), sort_keys=True, separators=(",", ":")).encode()


def _to_bytes(plan: Plan) -> bytes:
    document = {"format": "robustdice-plan", "version": FORMAT_VERSION, "digest": plan.digest, "plan": _to_json(plan)}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _to_json(plan: Plan) -> dict[str, Any]:
    return {
        "devices": plan.devices,
        "layers": [asdict(layer) for layer in plan.layers],
        "shards": [[shard_to_json(shard) for shard in shards] for shards in plan.shards],
        "shared_weights": plan.shared_weights,
        "method": plan.method,
        "model": asdict(plan.model),
        "settings": dict(plan.settings),
    }


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """A shard as plans and bundle manifests store it."""
    return {
        "neurons": list(shard.neurons),
        "holders": [[holder.device, holder.representation] for holder in shard.holders],
        **({"parity_of": list(shard.parity_of)} if shard.parity_of else {}),
    }


def shard_from_json(document: Mapping[str, Any]) -> Shard:
    """The inverse of :func:`shard_to_json`; KeyError, TypeError or ValueError when it is not a shard."""
    return Shard(
        neurons=tuple(int(neuron) for neuron in document["neurons"]),
        holders=tuple(Holder(int(device), str(kind)) for device, kind in document["holders"]),
        parity_of=tuple(int(number) for number in document.get("parity_of", ())),
    )


def _load(path: Path) -> Plan:
    remedy = "make a new one with 'robustdice plan'"
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise PlanError(f"{path} is not a plan (it is not JSON); {remedy}") from None
    if not isinstance(document, dict) or document.get("format") != "robustdice-plan":
        raise PlanError(f"{path} is not a plan (no robustdice-plan header); {remedy}")
    if document.get("version") != FORMAT_VERSION:
        raise PlanError(
            f"{path} has plan format version {document.get('version')}, this version reads {FORMAT_VERSION}; {remedy}"
        )
    try:
        body = document["plan"]
        plan = Plan(
            devices=int(body["devices"]),
            layers=tuple(Layer(**layer) for layer in body["layers"]),
            shards=tuple(tuple(shard_from_json(shard) for shard in shards) for shards in body["shards"]),
            shared_weights=int(body["shared_weights"]),
            method=str(body["method"]),
            model=ModelReference(**body["model"]),
            settings=dict(body["settings"]),
        )
    except (PlanError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PlanError(f"{path} is a damaged plan ({type(error).__name__}: {error}); {remedy}") from None
    if plan.digest != document.get("digest"):
        raise PlanError(f"{path} does not have the digest that it states: it was changed by hand; {remedy}")
    return plan


def _check(plan: Plan) -> None:
    if not 2 <= plan.devices <= MAX_DEVICES:
        raise PlanError(f"a plan is for 2 to {MAX_DEVICES} devices, not {plan.devices}")
    if not plan.layers or len(plan.layers) != len(plan.shards):
        raise PlanError(f"{len(plan.layers)} layers (at least one), but shards for {len(plan.shards)}")
    if len({layer.name for layer in plan.layers}) != len(plan.layers):
        raise PlanError("two layers have the same name")
    if plan.shared_weights < 0:
        raise PlanError(f"the number of shared weights must be 0 or more, got {plan.shared_weights}")
    for layer, shards in zip(plan.layers, plan.shards, strict=True):
        _check_layer(layer)
        dealt = sorted(neuron for shard in shards for neuron in shard.neurons)
        if len(dealt) != layer.neurons or dealt != list(range(layer.neurons)):
            raise PlanError(f"layer {layer.name}: the shards do not hold each of its {layer.neurons} neurons once")
        for shard in shards:
            _check_shard(plan, layer, shard)
        if problem := parity_problem(shards):
            raise PlanError(f"layer {layer.name}: {problem}")


def _check_layer(layer: Layer) -> None:
    for name, value in asdict(layer).items():
        least = 0 if name.startswith(("tail_", "reads_")) else 1
        if name != "name" and not (isinstance(value, int) and value >= least):
            raise PlanError(f"layer {layer.name}: {name} must be a whole number of at least {least}, got {value!r}")
    if layer.tail_weights >= layer.neuron_weights or layer.tail_macs >= layer.neuron_macs:
        raise PlanError(f"layer {layer.name}: the tail has more than the whole layer")
    if layer.neurons % layer.group:
        raise PlanError(f"layer {layer.name}: {layer.neurons} neurons are not a multiple of their group, {layer.group}")


def _check_shard(plan: Plan, layer: Layer, shard: Shard) -> None:
    if bool(shard.neurons) == bool(shard.parity_of) or list(shard.neurons) != sorted(shard.neurons):
        raise PlanError(f"layer {layer.name}: a shard's neurons must be in ascending order, at least one")
    groups = {neuron // layer.group for neuron in shard.neurons}
    if len(groups) * layer.group != len(shard.neurons):
        raise PlanError(f"layer {layer.name}: a shard splits a group of {layer.group} neurons")
    if not shard.holders or len(set(shard.devices)) != len(shard.devices):
        raise PlanError(f"layer {layer.name}: a shard needs different holders, at least one; got {shard.devices}")
    for holder in shard.holders:
        device, kind = holder.device, holder.representation
        if not 0 <= device < plan.devices:
            raise PlanError(f"layer {layer.name}: device {device} does not exist, the plan has {plan.devices} devices")
        if kind not in BYTES_PER_WEIGHT:
            raise PlanError(
                f"layer {layer.name}: unknown representation {kind!r}; known: {', '.join(BYTES_PER_WEIGHT)}"
            )


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
