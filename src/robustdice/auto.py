"""The best plan for a budget: every layer's spread and representation chosen by what they cost, then tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.errors import PlanError
from robustdice.failure.calibrate import calibrate
from robustdice.failure.copies import Copies, intact, state_of
from robustdice.failure.evaluate import images_at_once
from robustdice.failure.passes import run_under
from robustdice.failure.sensitivity import Sensitivity, measure
from robustdice.importance.score import score
from robustdice.importance.values import SCORING_SAMPLES, Importance, normalise
from robustdice.model.network import Network, on_best_device
from robustdice.partitioning.allocation import Kept, Spread, allocate, held_bytes, shards_of
from robustdice.plan import FailureSet, Plan, check_max_failed, failure_sets
from robustdice.progress import Progress, silent
from robustdice.representation import CORRECTION_BYTES, REPRESENTATIONS, CoarseLayer, neuron_bytes
from robustdice.rounding.layer import Choice
from robustdice.rounding.network import round_network

TABLE_IMAGES = 64
"""Enough to tell what one layer's choices cost."""
ROUNDING_IMAGES = 128
"""Enough to round by for the table; the plan itself is rounded with all images."""
TRIAL_IMAGES = 128
"""On which candidates are compared."""
MEASURED = ("int8", "int4", "int3", "int2")
"""Of float16 nobody sees a difference."""
TRIES = 3
"""Layers are sized by their largest device; what the devices then have left is given out again so often."""


@dataclass(frozen=True)
class Candidate:
    """A plan, what kind it is of (``family``), and how often it answers as the intact network does with 0, 1, 2, ...
    devices down: in the worst failure set of each size, on the images that it was made with."""

    family: str
    plan: Plan
    agreement: tuple[float, ...]

    @property
    def merit(self) -> float:
        """What candidates are compared by: the mean over the sizes."""
        return float(np.mean(self.agreement))


@dataclass(frozen=True, eq=False)
class Table:
    """What plans for any budget are chosen from: the ``network`` on ``devices`` devices, of which up to ``survive`` may
    be down, its neurons' ``importance``, what each choice of each layer costs (``sensitivity``), and the coarse weights
    that this was measured with (``rounded``, by layer and representation). Made by :func:`tabulate`."""

    network: Network
    images: NDArray[np.float32]
    devices: int
    survive: int
    importance: Importance
    rounded: Mapping[tuple[int, str], CoarseLayer]
    sensitivity: Sensitivity

    @property
    def units(self) -> list[NDArray[np.float64]]:
        """What is decisive within each layer: of every unit, the divergence after its removal, or all there is."""
        known = self.importance.columns
        chosen = self.importance.select(("s3",)) if "s3" in known else self.importance
        return [normalise(scores).mean(1) for scores in chosen.scores]


def tabulate(
    network: Network,
    images: NDArray[np.float32],
    *,
    devices: int,
    survive: int | None = None,
    importance: Importance | None = None,
    on_progress: Progress = silent,
) -> Table:
    """What :func:`candidates` chooses from, for any number of budgets. ``images`` are unlabelled, [n, channels, height,
    width], a few hundred. ``survive`` is the number of devices that may be down at once (all but one). Scored with some
    of the images where ``importance`` is not given. PlanError when there are not so many devices."""
    check_max_failed(devices, survive)
    survive = devices - 1 if survive is None else survive
    if importance is None:
        importance = score(network, images[:SCORING_SAMPLES], s3="fisher")
    every = {index: [Choice(kind) for kind in MEASURED] for index in range(len(network.layers))}
    rounded = round_network(network, every, images[:ROUNDING_IMAGES])
    table = Table(network, images, devices, survive, importance, rounded, Sensitivity({}, {}))
    spreads = [*_spreads(devices), *_thin(devices)]
    found = measure(network, rounded, table.units, spreads, devices, survive, images[:TABLE_IMAGES], on_progress)
    return replace(table, sensitivity=found)


def candidates(table: Table, budget: int) -> list[Candidate]:
    """Plans that keep to ``budget`` (bytes on each device) and are made for the table's number of failed devices, the
    best first.

    *Whole* copies are held by all devices, and coarse as the budget says; *spread* copies are finer, but not
    everywhere, either with every number of failures counted the same (``even``) or small ones first (``early``).
    PlanError when nothing fits.
    """
    network, devices, survive = table.network, table.devices, table.survive
    offered = _spreads(devices)
    if not _fits(network, offered[-1], devices, survive, budget):
        offered += _thin(devices)
    whole = offered[:1]
    families = {
        "whole": (whole, [1.0] * (survive + 1)),
        "spread, even": (offered, [1.0] * (survive + 1)),
        "spread, early": (offered, [0.5**size for size in range(survive + 1)]),
    }
    found: list[Candidate] = []
    tried: list[list[Kept]] = []
    for family, (spreads, weights) in families.items():
        try:
            kept = choose(network, table.sensitivity, spreads, weights, devices, budget, survive)
        except PlanError:
            if family == "whole":
                continue
            raise
        if kept in tried:
            continue
        tried.append(kept)
        plan = _made(table, kept)
        found.append(Candidate(family, plan, agreement(network, plan, table.images[:TRIAL_IMAGES], survive)))
    return sorted(found, key=lambda candidate: -candidate.merit)


def choose(
    network: Network,
    table: Sensitivity,
    spreads: Sequence[Spread],
    weights: Sequence[float],
    devices: int,
    budget: int,
    survive: int,
) -> list[Kept]:
    """Of every layer how it is kept, so that the table's costs add up to the least; ``weights`` are those of 0, 1, ...
    failed devices. PlanError when even the least does not fit."""
    layers = network.plan_layers
    choices = [Kept(spread, kind) for spread in spreads for kind in REPRESENTATIONS]
    corrections = CORRECTION_BYTES * _corrected_sets(spreads, devices, survive)
    costs = [np.array([table.cost(i, kept, weights) for kept in choices]) for i in range(len(layers))]
    sizes = [
        np.array([held_bytes(layer, kept, devices, i, corrections) for kept in choices])
        for i, layer in enumerate(layers)
    ]
    allowed = room = budget - 4 * network.shared_weights
    best: list[Kept] = []
    for _ in range(TRIES):
        chosen = [choices[number] for number in allocate(costs, sizes, room)]
        unused = allowed - max(_held(network, chosen, devices, corrections))
        if unused < 0:
            break
        best = chosen
        room += unused
    return best


def agreement(network: Network, plan: Plan, images: NDArray[np.float32], survive: int) -> tuple[float, ...]:
    """The share of ``images`` that the plan answers as the intact network does: in the worst failure set of 0, 1, ...,
    ``survive`` devices."""
    sets: list[FailureSet] = [f for size in range(survive + 1) for f in failure_sets(plan.devices, size)]
    states = {failed: state_of(plan, failed) for failed in sets}
    different = list({state.key: state for state in states.values()}.values())
    right = np.zeros(len(different))
    at_once = images_at_once(network)
    for start in range(0, len(images), at_once):
        batch = on_best_device(torch.from_numpy(images[start : start + at_once]))
        (exact,) = run_under(network, batch, [intact(network)], Copies(network, {}))
        for number, scores in enumerate(run_under(network, batch, different, Copies.of(network, plan))):
            right[number] += int((scores.argmax(1) == exact.argmax(1)).sum())
    by_key = {state.key: count / len(images) for state, count in zip(different, right, strict=True)}
    return tuple(
        min(by_key[states[failed].key] for failed in sets if len(failed) == size) for size in range(survive + 1)
    )


def _spreads(devices: int) -> list[Spread]:
    """What is worth considering: neurons on all devices, on three quarters or half of them, or the decisive on all;
    the one that takes most bytes first, that which takes least last."""
    half = math.ceil(devices / 2)
    wide = [Spread(devices)] + [Spread(h) for h in sorted({math.ceil(0.75 * devices)} - {devices})]
    return [*wide, *(Spread(half, share) for share in (0.5, 0.25, 0.0) if half < devices)]


def _thin(devices: int) -> list[Spread]:
    """What is for budgets in which nothing else fits: neurons on one device alone."""
    return [Spread(1, 0.5), Spread(1, 0.25), Spread(1)] if devices > 2 else []


def _fits(network: Network, smallest: Spread, devices: int, survive: int, budget: int) -> bool:
    kept = [Kept(smallest, REPRESENTATIONS[-1])] * len(network.layers)
    corrections = CORRECTION_BYTES * _corrected_sets([smallest], devices, survive)
    return max(_held(network, kept, devices, corrections)) + 4 * network.shared_weights <= budget


def _corrected_sets(spreads: Sequence[Spread], devices: int, survive: int) -> int:
    """For how many failure sets a device that is up keeps corrections: all in which neurons can be lost."""
    fewest = min(spread.holders for spread in spreads)
    return sum(math.comb(devices - 1, size) for size in range(fewest, survive + 1))


def _held(network: Network, kept: Sequence[Kept], devices: int, corrections: int) -> list[int]:
    """Bytes on every device; layers up to the first of which something can be lost need no ``corrections``."""
    held = [0] * devices
    corrected = False
    for index, (layer, of_layer) in enumerate(zip(network.plan_layers, kept, strict=True)):
        each = neuron_bytes(layer, of_layer.representation) + (corrections if corrected else 0)
        corrected = corrected or of_layer.spread.holders < devices
        for shard in shards_of(layer, [0.0] * (layer.neurons // layer.group), of_layer, devices, index):
            for device in shard.devices:
                held[device] += len(shard.neurons) * each
    return held


def _made(table: Table, kept: Sequence[Kept]) -> Plan:
    """The plan with its coarse weights and corrections."""
    network, devices, images, survive = table.network, table.devices, table.images, table.survive
    wanted = {i: [Choice(of.representation)] for i, of in enumerate(kept) if of.representation != "float32"}
    plan = Plan(
        devices=devices,
        layers=network.plan_layers,
        shards=tuple(
            shards_of(layer, of_layer.tolist(), of, devices, index)
            for index, (layer, of_layer, of) in enumerate(zip(network.plan_layers, table.units, kept, strict=True))
        ),
        shared_weights=network.shared_weights,
        method="auto",
        model=network.reference,
        settings={
            "survive": survive,
            "holders": [of.spread.holders for of in kept],
            "decisive": [of.spread.decisive for of in kept],
            "precision": [of.representation for of in kept],
            "images": len(images),
        },
        coarse=round_network(network, wanted, images),
    )
    return replace(plan, corrections=calibrate(network, plan, images, max_failed=survive))
