"""A plan: for every layer its shards, and who holds them in which order.

Everything else (holders matrix, bytes per device, who publishes under a failure set) follows from
the shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import PlanError
from robustdice.files import write_atomically
from robustdice.markup import html_table
from robustdice.plan import file
from robustdice.plan.certificate import Certificate
from robustdice.plan.check import check_plan
from robustdice.plan.pairs import added_up, column_weights, kept_by_all, slices
from robustdice.plan.shards import (
    FailureSet,
    Layer,
    Shard,
    nearest_calibrated,
    publishers,
    shard_width,
)
from robustdice.plan.strips import Strips, strips_from_json
from robustdice.representation import (
    CORRECTION_BYTES,
    LOST,
    REPRESENTATIONS,
    SCALE_BYTES,
    CoarseLayer,
    Correction,
    Steps,
    is_scaled,
    neuron_bytes,
    packed_bytes,
)
from robustdice.wire_format import sent_bytes, suited


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
    which every device needs. ``settings`` says what was asked for (columns, thresholds, ...), ``provenance`` where the
    plan comes from (scores and their data, seed, versions): two plans that differ only there are the same.

    ``coarse`` has the weights of every (layer, representation) that a holder keeps, other than float32.
    ``activations`` are the layers that read their inputs rounded to 8 bits, and how; these have no copies in float32 or
    float16. ``corrections`` are, for each calibrated failure set, what every layer's neurons are scaled and shifted by
    (None: a layer that needs nothing). ``strips`` are runs of layers that every device holds whole, in float32, and
    that are computed in strips of rows. ``pairs`` are layers that are dealt out together with the one layer that reads
    them, first layer to second: the shards are the first one's, and of the second, one shard that all devices hold,
    each has the weights for the neurons that it holds of the first, in the representations that it holds these in.
    Of the pairs whose first layers are ``owned``, sums are added up by owners of slices, otherwise by everybody.
    ``certificate`` is what was measured of the plan; it is no part of what the plan says.

    ``wire`` is what devices hand each other values as; see :attr:`wires`.
    """

    devices: int
    layers: tuple[Layer, ...]
    shards: tuple[tuple[Shard, ...], ...]
    shared_weights: int
    method: str
    model: ModelReference
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    coarse: Mapping[tuple[int, str], CoarseLayer] = field(default_factory=dict)
    activations: Mapping[int, Steps] = field(default_factory=dict)
    corrections: Mapping[FailureSet, tuple[Correction | None, ...]] = field(default_factory=dict)
    strips: tuple[Strips, ...] = ()
    pairs: Mapping[int, int] = field(default_factory=dict)
    owned: frozenset[int] = frozenset()
    certificate: Certificate | None = None
    wire: str = "float32"

    def __post_init__(self) -> None:
        check_plan(self)

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
            by_all = 4 * layer.tail_weights if self.exchanged_before_tail(index) else 0
            held += layer.neurons * by_all
            for number, shard in enumerate(shards):
                # Filters over different inputs cannot be added up: their parity has all of them.
                summed = not (shard.parity_of and layer.reads_group)
                neurons = (
                    shard_width(shards, number) if summed else sum(len(shards[m].neurons) for m in shard.parity_of)
                )
                for holder in shard.holders:
                    held[holder.device] += (self.neuron_bytes(index, holder.representation) - by_all) * neurons
                    corrected = sum(
                        holder.device not in failed and of_layers[index] is not None
                        for failed, of_layers in self.corrections.items()
                    )
                    held[holder.device] += CORRECTION_BYTES * corrected * len(shard.neurons)
        for first, second in self.pairs.items():
            kinds = {(h.device, h.representation) for shard in self.shards[first] for h in shard.holders}
            for device, kind in kinds:
                held[device] += SCALE_BYTES * self.layers[second].neurons * is_scaled(kind)
        return tuple(int(b) for b in held)

    def neuron_bytes(self, layer: int, representation: str) -> int:
        """Bytes of one neuron of a layer in a representation that the plan has it in. In a pair a neuron of the first
        layer has the weights that read it, and one of the second only what all devices have of it."""
        kept, each = self.coarse.get((layer, representation)), self.layers[layer]
        for first, second in self.pairs.items():
            if layer == second:
                return kept_by_all(each, representation, self.is_coarse_pair(first))
        needed = neuron_bytes(each, representation, kept.filter.group if kept else None)
        if layer in self.pairs:
            needed += packed_bytes(column_weights(each, self.layers[self.pairs[layer]]), representation)
        return needed

    def is_coarse_pair(self, first: int) -> bool:
        """Whether any copy of a pair, given by its first layer, is coarse, so that sums stand behind the second one's
        affine chain."""
        of_both = (*self.shards[first], *self.shards[self.pairs[first]])
        return any(holder.representation != "float32" for shard in of_both for holder in shard.holders)

    @property
    def memory_share(self) -> float:
        """The largest device's bytes over the bytes of all parameters in float32."""
        return max(self.bytes_per_device) / self.total_bytes

    def held_by_all(self, layer: int) -> bool:
        """Whether every device holds the whole layer, and the same copy of it: all compute it, without an exchange."""
        return all(
            len(shard.holders) == self.devices and len({holder.representation for holder in shard.holders}) == 1
            for shard in self.shards[layer]
        )

    def exchanged_before_tail(self, layer: int) -> bool:
        """Whether devices hand each other pre-activations, and each computes the whole tail: sums need that."""
        return any(shard.parity_of for shard in self.shards[layer])

    def run_of(self, layer: int) -> Strips | None:
        """The run that a layer is computed in strips with, if it is."""
        return next((run for run in self.strips if layer in run.layers), None)

    def split(self, layer: int) -> str:
        """How a layer is dealt out: ``neurons``, ``hidden`` (both of a pair), ``rows`` (in a run of strips) or, on
        everyone, ``whole``."""
        if self.run_of(layer) is not None:
            return "rows"
        if layer in self.pairs or layer in self.pairs.values():
            return "hidden"
        return "whole" if self.held_by_all(layer) else "neurons"

    def exchanged_shards(self, layer: int) -> tuple[Shard, ...]:
        """What devices hand each other after a layer that is exchanged: its shards, a pair's sums (of owners, every
        slice of the first sum, then of the next), the slices of owners, or the strips of a run."""
        run = self.run_of(layer)
        if layer in self.owned:
            return tuple(part for part in self.sums(layer) for _ in self.slices(layer))
        if layer in self.pairs:
            return self.sums(layer)
        if (first := self.owned_first(layer)) is not None:
            return self.slices(first)
        return self.shards[layer] if run is None else run.shards()

    def sums(self, first: int) -> tuple[Shard, ...]:
        """The partial sums of a pair, in the order in which they are added up."""
        return added_up(self.shards[first])

    def slices(self, first: int) -> tuple[Shard, ...]:
        """The slices in which owners add up a pair's sums, as shards of its second layer."""
        return slices(self.layers[self.pairs[first]], self.devices)

    def owned_first(self, layer: int) -> int | None:
        """The first layer of the pair whose second one a layer is, if owners add up its sums."""
        return next((first for first in self.owned if self.pairs[first] == layer), None)

    def handed_over(self, layer: int) -> tuple[int, int]:
        """How many neurons' values are handed over after a layer while every device is up, each counted once, and how
        many activations of one image these are. Of a pair, after its first layer: the second one's, as sums, one for
        every device that has a part in them; to owners each sum goes only once, while all else goes to everybody, so
        that of these only their share counts. After a run of strips: those of rows in the place of neurons."""
        each, run = self.layers[layer], self.run_of(layer)
        if layer in self.pairs:
            second = self.layers[self.pairs[layer]]
            neurons = len({shard.holders[0] for shard in self.shards[layer]}) * second.neurons
            neurons = -(-neurons // self.devices) if layer in self.owned else neurons
            return neurons, neurons * second.neuron_preactivations
        if self.owned_first(layer) is not None:
            return each.neurons, each.neurons * each.neuron_outputs
        if run is not None and run.layers[-1] == layer:
            return run.bounds[-1], run.activations
        if self.held_by_all(layer):
            return 0, 0
        before_tail = self.exchanged_before_tail(layer)
        return each.neurons, each.neurons * (each.neuron_preactivations if before_tail else each.neuron_outputs)

    def exchanged(self, layer: int) -> int:
        """Activations of one image that are handed over after a layer, as :meth:`handed_over` says."""
        return self.handed_over(layer)[1]

    def exchanged_bytes(self, layer: int) -> int:
        """Their bytes on the wire."""
        return sent_bytes(self.wires[layer], *self.handed_over(layer))

    @cached_property
    def wires(self) -> tuple[str, ...]:
        """What is handed over after each layer travels as: the plan's ``wire``, or ``float16`` for ``uint8`` where
        scales would take more than codes save. Class scores are float32: rounded ones could be equal. So is what does
        not travel."""
        return tuple(map(self._wire_of, range(len(self.layers))))

    def _wire_of(self, layer: int) -> str:
        neurons, values = self.handed_over(layer)
        exact = self.layers[self.pairs.get(layer, layer)].gives_scores or not values
        return "float32" if exact else suited(self.wire, neurons, values)

    @property
    def exchanges(self) -> int:
        """After how many layers devices hand each other anything."""
        return sum(self.exchanged(layer) > 0 for layer in range(len(self.layers)))

    @property
    def exchanged_activations(self) -> int:
        """Activations of one image that are handed over while every device is up, each counted once."""
        return sum(map(self.exchanged, range(len(self.layers))))

    def work(self, layer: int) -> NDArray[np.float64]:
        """A layer's multiply-adds on each device while every device is up and spares stand by, [devices]; of a pair,
        those of the second layer's filters count as the first one's."""
        each, run = self.layers[layer], self.run_of(layer)
        if run is not None:
            return run.shares(layer) * each.neurons * each.neuron_macs
        if layer in self.pairs.values():
            return np.full(self.devices, float(each.neurons * each.tail_macs))
        if self.held_by_all(layer):
            return np.full(self.devices, float(each.neurons * each.neuron_macs))
        by_all = each.tail_macs if self.exchanged_before_tail(layer) else 0
        by_holder = float(each.neuron_macs - by_all)
        if layer in self.pairs:
            second = self.layers[self.pairs[layer]]
            by_holder += second.neurons * (second.neuron_macs - second.tail_macs) / each.neurons
        work = np.full(self.devices, float(each.neurons * by_all))
        for shard in self.shards[layer]:
            work[shard.devices[0]] += len(shard.neurons) * by_holder
        return work

    @property
    def healthy_compute_share(self) -> float:
        """The largest device's share of the model's multiply-adds while every device is up and spares
        stand by."""
        work = np.sum([self.work(layer) for layer in range(len(self.layers))], axis=0)
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

    def copies(self, failed: Iterable[int]) -> tuple[NDArray[np.int8], ...]:
        """For every layer: the representation of what is published of each neuron, int8[neurons], as a position in
        ``REPRESENTATIONS``, or ``LOST``. What follows from a parity shard is float32."""
        found = []
        for layer, shards, publishing, alive in zip(
            self.layers, self.shards, self.publishers(failed), self.surviving_neurons(failed), strict=True
        ):
            kinds = np.where(alive, 0, LOST).astype(np.int8)
            for shard, device in zip(shards, publishing, strict=True):
                if device is not None and shard.neurons:
                    kinds[list(shard.neurons)] = REPRESENTATIONS.index(shard.representation_on(device))
            assert len(kinds) == layer.neurons
            kinds.flags.writeable = False
            found.append(kinds)
        return tuple(found)

    def correction(self, failed: Iterable[int]) -> tuple[Correction | None, ...] | None:
        """What a failure set's survivors apply: the corrections of :func:`nearest_calibrated`, or None."""
        nearest = nearest_calibrated(self.corrections, self.failure_set(failed))
        return None if nearest is None else self.corrections[nearest]

    def failure_set(self, failed: Iterable[int]) -> FailureSet:
        """``failed`` as a failure set of this plan; PlanError when it names a device that does not exist."""
        down = frozenset(failed)
        if unknown := sorted(d for d in down if not 0 <= d < self.devices):
            raise PlanError(f"device {unknown[0]} does not exist: the plan has devices 0 to {self.devices - 1}")
        return down

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything the plan says, without its provenance and without where the model's file lies."""
        return hashlib.sha256(file.canonical(self)).hexdigest()

    def __repr__(self) -> str:
        return (
            f"<Plan {self.method}: {len(self.layers)} layers of {self.model.source} on {self.devices} devices, at most "
            f"{self.memory_share:.1%} of it on each>"
        )

    def _repr_html_(self) -> str:
        """For notebooks: how many neurons of each layer have how many holders."""
        rows = []
        for layer, shards in zip(self.layers, self.shards, strict=True):
            held = [0] * self.devices
            for shard in shards:
                held[len(shard.holders) - 1] += len(shard.neurons)
            rows.append([escape(layer.name), str(layer.neurons), *map(str, held)])
        copies = [f"held by {count + 1}" for count in range(self.devices)]
        return html_table(["layer", "neurons", *copies], rows, repr(self)[1:-1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to one file (docs/formats.md); OutputError when that is not possible."""
        write_atomically(Path(path), file.to_bytes(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan; PlanError when the file is missing, damaged or of another version."""
        return _load(Path(path))


def _load(path: Path) -> Plan:
    document, arrays = file.read_document(path)
    try:
        body = document["plan"]
        plan = Plan(
            devices=int(body["devices"]),
            layers=tuple(Layer(**layer) for layer in body["layers"]),
            shards=tuple(tuple(file.shard_from_json(shard) for shard in shards) for shards in body["shards"]),
            shared_weights=int(body["shared_weights"]),
            method=str(body["method"]),
            model=ModelReference(**body["model"]),
            settings=dict(body["settings"]),
            provenance=dict(body["provenance"]),
            coarse=file.coarse_from(body, arrays),
            activations=file.activations_from(body),
            corrections=file.corrections_from(body, arrays),
            strips=tuple(map(strips_from_json, body.get("strips", ()))),
            pairs={int(first): int(second) for first, second in body.get("pairs", ())},
            owned=frozenset(map(int, body.get("owned", ()))),
            certificate=Certificate.from_json(document.get("certificate")),
            wire=str(body["wire"]),
        )
    except (PlanError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PlanError(f"{path} is a damaged plan ({type(error).__name__}: {error}); {file.REMEDY}") from None
    if plan.digest != document.get("digest"):
        raise PlanError(f"{path} does not have the digest that it states: it was changed by hand; {file.REMEDY}")
    return plan
