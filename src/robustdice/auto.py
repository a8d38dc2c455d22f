"""The best plan for a budget: every layer's spread and representation chosen by what they cost, then tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from robustdice.cost.model import Judge
from robustdice.cost.purpose import TOLERATED
from robustdice.entropy_code import CODED
from robustdice.errors import PlanError
from robustdice.failure.agreement import agreement, answers
from robustdice.failure.calibrate import calibrate
from robustdice.failure.copies import Copies
from robustdice.failure.matching import Targets, targets_of
from robustdice.failure.sensitivity import Sensitivity, measure
from robustdice.importance.likeness import likeness
from robustdice.importance.score import forward_macs, score
from robustdice.importance.values import SCORING_SAMPLES, Importance, normalise
from robustdice.model.network import Network
from robustdice.partitioning.allocation import Kept, Spread, allocate, held_bytes, shards_of
from robustdice.partitioning.budget import share_of
from robustdice.plan import Layer, Plan, Shard, check_devices, check_max_failed
from robustdice.progress import Progress, part, silent
from robustdice.representation import (
    CORRECTION_BYTES,
    REPRESENTATIONS,
    TRIAL_SAMPLES,
    CoarseLayer,
    neuron_bytes,
)
from robustdice.rounding.layer import Choice
from robustdice.rounding.network import Coarse, IntactInputs, round_network, round_together, wanted_of

TABLE_IMAGES = 64
"""Enough to tell what one layer's choices cost."""
ROUNDING_IMAGES = 128
"""Enough to round by for the table, and to see which units are alike; the plan itself is rounded with all images."""
FEWEST_UNSEEN = 64
"""Of images that plans are not made with: on fewer, less could be told than on those that they are made with."""
PASS_MACS = 10**12
"""What a pass over images may cost; large networks make do with fewer images."""
FEWEST_IMAGES = 12
"""But not with less than so many."""
MEASURED = ("int8", *CODED)
"""Of float16 nobody sees a difference, nor how it is rounded; and codes of as many bits each keep less than others."""
COARSEST = 1 / 2
"""Of the bits for a weight that a budget has: with fewer no layer is kept, and these are not measured."""
FINE = ("float32", "float16", "int8")
"""In one of which layers that have next to nothing of the weights are kept, by everybody, as long as whole copies fit
so."""
SMALL = 0.005
"""Of all weights: that is next to nothing. Often these are early layers, where every trial takes longest."""
ALIKE = tuple((kind, kind) for kind in ("float32", "float16", *MEASURED))
"""Representations of primaries and spares that are the same."""
FINE_FIRST = (*ALIKE, *itertools.combinations(("float32", *MEASURED), 2))
"""And those of which spares are coarser."""
LEARNED = 2
"""So many plans, the best ones, are looked at once more (:mod:`robustdice.learning`)."""
TRIES = 8
"""Layers are sized by their largest device, and with corrections where others may make them needed; what the devices
then have left is given out again so often: all of it, and half of it once that was too much."""

CLOSELY = 1.02
"""So closely it is said what devices of different memory would have to have."""

Rooms = tuple[float, ...] | None
"""How much room devices have, where it is not the same for all."""


@dataclass(frozen=True)
class Candidate:
    """A plan, what kind it is of (``family``), and how often it answers as the intact network does with 0, 1, 2, ...
    devices down: in the worst failure set of each size, on so many ``images``. Those are ``unseen`` ones, or some that
    it was made with, on which coarse copies do better than on others. Of a plan that does not fit into the budget no
    ``agreement`` is measured, on no images."""

    family: str
    plan: Plan
    agreement: tuple[float, ...] = ()
    images: int = 0
    unseen: bool = False

    @property
    def fits(self) -> bool:
        """Whether it keeps to the budget."""
        return bool(self.agreement)

    @property
    def merit(self) -> float:
        """What candidates are compared by: the mean over the sizes, less than anything where it does not fit."""
        return float(np.mean(self.agreement)) if self.fits else -1.0


@dataclass(frozen=True, eq=False)
class Table:
    """What plans for any budget are chosen from: the ``network`` on ``devices`` devices, of which up to ``survive`` may
    be down, its neurons' ``importance``, what each choice of each layer costs (``sensitivity``), and the coarse weights
    that this was measured with (``rounded``, by layer and representation); ``wire`` is what values travel as. Plans are
    made with ``images``, and compared on ``others`` where there are enough. Made by :func:`tabulate`."""

    network: Network
    images: NDArray[np.float32]
    devices: int
    survive: int
    importance: Importance
    rounded: Mapping[tuple[int, str], CoarseLayer]
    sensitivity: Sensitivity
    wire: str = "float32"
    others: NDArray[np.float32] | None = None

    def offered(self, budget: int) -> list[set[str]]:
        """Of every layer the representations that are chosen from for ``budget``, bytes on each device."""
        measured = self.sensitivity.coarse
        return [
            {kind for kind in worth if kind not in MEASURED or (index, kind) in measured}
            for index, worth in enumerate(worth_choosing(self.network, budget))
        ]

    @property
    def units(self) -> list[NDArray[np.float64]]:
        """What is decisive within each layer: of every unit, the divergence after its removal, or all there is."""
        known = self.importance.columns
        chosen = self.importance.select(("s3",)) if "s3" in known else self.importance
        return [normalise(scores).mean(1) for scores in chosen.scores]

    @cached_property
    def inputs(self) -> IntactInputs:
        """What plans are rounded by, of all images."""
        return IntactInputs(self.network, range(len(self.network.layers)), self.images)

    @cached_property
    def targets(self) -> Targets:
        """What plans are corrected towards, of all images."""
        return targets_of(self.network, Copies(self.network, {}), self.images)

    @cached_property
    def likeness(self) -> list[NDArray[np.float16] | None]:
        """Of any two units of a layer: :func:`robustdice.importance.likeness.likeness`."""
        return likeness(self.network, affordable(self.network, self.images, ROUNDING_IMAGES))

    @cached_property
    def trial(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The images on which candidates are compared, and how the intact network answers them."""
        images = self.images if self.others is None else self.others
        images = affordable(self.network, images, TRIAL_SAMPLES)
        return images, answers(self.network, images)


def tabulate(
    network: Network,
    images: NDArray[np.float32],
    *,
    devices: int,
    others: NDArray[np.float32] | None = None,
    survive: int | None = None,
    importance: Importance | None = None,
    wire: str = "float32",
    least: int = 0,
    on_progress: Progress = silent,
) -> Table:
    """What :func:`candidates` chooses from, for any number of budgets. ``images`` are unlabelled, [n, channels, height,
    width], a few hundred, and so are the ``others`` that nothing is fitted to: plans are compared on these, or on
    ``images`` where they are fewer than ``FEWEST_UNSEEN``. ``survive`` is the number of devices that may be down at
    once (all but one). Scored with some of the images where ``importance`` is not given. What is worth choosing for
    larger budgets than ``least`` alone (bytes of a device) takes less time. PlanError when there are not so many
    devices."""
    check_max_failed(devices, survive)
    survive = devices - 1 if survive is None else survive
    images = affordable(network, images, len(images))
    if importance is None:
        scored = affordable(network, images, SCORING_SAMPLES)
        importance = score(network, scored, s3="fisher", on_progress=part(on_progress, 0, 0.1))
    offered = worth_choosing(network, least)
    anywhere = [Choice(kind) for kind in MEASURED if any(kind in of_layer for of_layer in offered)]
    every = dict.fromkeys(range(len(network.layers)), anywhere)
    fitted = affordable(network, images, ROUNDING_IMAGES)
    rounded = round_network(network, every, fitted, part(on_progress, 0.1, 0.5))
    unseen = None if others is None or len(others) < FEWEST_UNSEEN else others
    table = Table(network, images, devices, survive, importance, rounded, Sensitivity({}, {}, devices), wire, unseen)
    spreads = [*_spreads(devices), *_thin(devices)]
    seen = affordable(network, images, TABLE_IMAGES)
    coarse = {of: kept for of, kept in rounded.items() if of[1] in offered[of[0]]}
    small = small_layers(network.plan_layers)
    units = {index: of for index, of in enumerate(table.units) if index not in small}
    found = measure(network, coarse, units, spreads, devices, survive, seen, part(on_progress, 0.5, 1))
    return replace(table, sensitivity=found)


def small_layers(layers: Sequence[Layer]) -> frozenset[int]:
    """The smallest layers, as many as have next to nothing of the weights together."""
    weights = [layer.neurons * layer.neuron_weights for layer in layers]
    found: list[int] = []
    for index in sorted(range(len(layers)), key=weights.__getitem__):
        if sum(weights[i] for i in (*found, index)) > SMALL * sum(weights):
            break
        found.append(index)
    return frozenset(found)


def worth_choosing(network: Network, budget: int) -> list[tuple[str, ...]]:
    """Of every layer the representations in which it may be kept, for so many bytes on each device; for less there are
    no fewer. The finest in which whole copies fit is among them, or else all are."""
    layers, small, every = network.plan_layers, small_layers(network.plan_layers), tuple(dict(ALIKE))

    def whole(code: str) -> int:
        kinds = (FINE[-1] if index in small else code for index in range(len(layers)))
        return sum(of.neurons * neuron_bytes(of, kind) for of, kind in zip(layers, kinds, strict=True))

    fitting = [code for code in CODED if 4 * network.shared_weights + whole(code) <= budget]
    fine = FINE if fitting else every
    bits = min(COARSEST * 8 * budget / network.parameters, CODED[fitting[0]].bits) if fitting else 0
    other = tuple(kind for kind in every if kind not in CODED or CODED[kind].bits >= bits)
    return [fine if index in small else other for index in range(len(layers))]


def affordable(network: Network, images: NDArray[np.float32], wanted: int) -> NDArray[np.float32]:
    """``wanted`` of the images, or fewer where one of them takes the network long; the fewer are wanted, the more
    passes there will be. At even distances, as images tend to come class by class."""
    count = PASS_MACS * wanted // (TRIAL_SAMPLES * forward_macs(network))
    chosen = min(len(images), wanted, max(FEWEST_IMAGES, count))
    return images[np.arange(chosen) * len(images) // chosen] if chosen < len(images) else images


def candidates(
    table: Table, budget: int | Sequence[int], on_progress: Progress = silent, to_beat: float | None = None
) -> list[Candidate]:
    """Plans that keep to ``budget`` (bytes on each device: one number for all, or one for each) and are made for the
    table's number of failed devices, the best first.

    *Whole* copies are held by all devices, and coarse as the budget says; *spread* copies are finer, but not
    everywhere, with every number of failures counted the same (``even``) or small ones first (``early``); *fine first*
    are those whose spares may be coarser than their primaries, which is for few failures too. Neurons that one device
    alone has are offered where nothing else fits, and to the *thin*: costs of single layers say too little of what the
    loss of them does to be believed where there is a choice. Corrections for the largest failure sets alone leave more
    bytes for codes: of the best ones of which something can be lost, what that makes is tried too, and of all where
    there is no room for more of them. With something
    ``to_beat``, each is measured only as long as it may be worth more than that and than what :func:`least_to_matter`
    says of those before it (-1: than that alone), without to the end. PlanError when nothing fits.
    """
    budgets = (budget,) * table.devices if isinstance(budget, int) else tuple(budget)
    if len(budgets) != table.devices:
        raise PlanError(f"{len(budgets)} budgets for {table.devices} devices; give one for each")
    check_room(table.network, table.devices, table.survive, budgets)
    offered, thin = _spreads(table.devices), _thin(table.devices)
    whole = offered[:1]
    even, early = ([share**size for size in range(table.survive + 1)] for share in (1.0, 0.5))
    ways = {
        "whole, mixed": _Way(whole, ALIKE, even),
        "spread, even": _Way(offered, ALIKE, even),
        "spread, early": _Way(offered, ALIKE, early),
        "fine first, everywhere": _Way(whole, FINE_FIRST, early),
        "fine first, spread": _Way(offered, FINE_FIRST, early),
        "spread thin": _Way([*offered, *thin], ALIKE, even),
    }
    chosen: dict[str, _Chosen] = {}
    for family, way in ways.items():
        found_for = _first_that_fits(table, way, thin if way.spreads is offered else [], budgets)
        if found_for is None or (family == "spread thin" and not any(of.spread in thin for of in found_for.kept)):
            continue
        if all(found_for.kept != other.kept for other in chosen.values()):
            chosen[found_for.way.named(family)] = found_for
    if not chosen:
        raise PlanError("nothing fits of what the table has measured, which was made for larger budgets")
    found = _tried(table, chosen, budgets, to_beat, [], part(on_progress, 0, 0.8))
    fewer: dict[str, _Chosen] = {}
    for each in best_first(found)[:LEARNED]:
        if min(map(len, each.plan.corrections), default=table.survive) < table.survive:
            way = replace(chosen[each.family].way, least_down=table.survive)
            answer = _chosen(table, way, budgets)
            if answer is not None and all(answer.kept != other.kept for other in (*chosen.values(), *fewer.values())):
                fewer[way.named(each.family)] = answer
    found += _tried(table, fewer, budgets, to_beat, found, part(on_progress, 0.8, 1))
    return best_first(found)


@dataclass(frozen=True)
class _Way:
    """What a family of plans is chosen from (:func:`choose`)."""

    spreads: Sequence[Spread]
    kinds: Sequence[tuple[str, str]]
    weights: Sequence[float]
    least_down: int = 1

    def named(self, family: str) -> str:
        """The family, and whether it has corrections for the largest failure sets alone."""
        return f"{family}, corrected for {self.least_down} down alone" if self.least_down > 1 else family


@dataclass(frozen=True)
class _Chosen:
    """How layers are kept, and how much room devices have for what is not on all of them."""

    way: _Way
    kept: list[Kept]
    rooms: Rooms


def _chosen(table: Table, way: _Way, budgets: Sequence[int]) -> _Chosen | None:
    answer = choose(table, way.spreads, way.kinds, way.weights, budgets, way.least_down)
    return None if answer is None else _Chosen(way, *answer)


def _first_that_fits(table: Table, way: _Way, thin: Sequence[Spread], budgets: Sequence[int]) -> _Chosen | None:
    """As the way says, or with neurons on one device alone, or also with fewer corrections."""
    ways = [way, replace(way, spreads=[*way.spreads, *thin])] if thin else [way]
    if table.survive > 1:
        ways += [replace(each, least_down=table.survive) for each in ways]
    answers = (_chosen(table, each, budgets) for each in ways)
    return next((each for each in answers if each is not None), None)


def _tried(
    table: Table,
    chosen: Mapping[str, _Chosen],
    budgets: Sequence[int],
    to_beat: float | None,
    before: Sequence[Candidate],
    on_progress: Progress,
) -> list[Candidate]:
    """What was ``chosen``, of each family, made into plans and measured, as :func:`candidates` says, after those
    ``before``."""
    if not chosen:
        return []
    shards = {family: _shards(table, of.kept, of.rooms) for family, of in chosen.items()}
    coarse = round_together(
        table.network,
        [wanted_of(of_family, {}) for of_family in shards.values()],
        table.images,
        table.inputs,
        part(on_progress, 0, 0.5),
    )
    found: list[Candidate] = []
    for (family, of), rounded in zip(chosen.items(), coarse, strict=True):
        on_progress(len(chosen) + len(found), 2 * len(chosen))
        least = -1.0 if to_beat is None else max(to_beat, least_to_matter([*before, *found]))
        plan = _made(table, of.kept, shards[family], rounded, of.way.least_down)
        found.append(tried_out(table, family, plan, budgets, least))
    return found


def best_first(found: Sequence[Candidate]) -> list[Candidate]:
    """In the order in which they would be taken; of those that keep as much, the one with the least to exchange, and of
    these the one that is modelled to be the fastest, by typical figures."""
    judge = Judge()
    return sorted(found, key=lambda of: (-of.merit, of.plan.exchanged_activations, judge.seconds(of.plan)))


def least_to_matter(found: Sequence[Candidate]) -> float:
    """What a plan has to be worth to be among the first ``LEARNED`` of them, or to keep nearly as much as the best."""
    best = sorted((of.merit for of in found), reverse=True)
    return min(best[LEARNED - 1], best[0] - TOLERATED) if len(best) >= LEARNED else -1.0


def tried_out(table: Table, family: str, plan: Plan, budgets: Sequence[int], to_beat: float = -1.0) -> Candidate:
    """The plan with what it keeps, where it fits; on fewer images if it is sure to be worth less than ``to_beat``."""
    if any(held > allowed for held, allowed in zip(plan.bytes_per_device, budgets, strict=True)):
        return Candidate(family, plan)
    images, right = table.trial
    kept, seen = agreement(table.network, plan, images, right, table.survive, to_beat)
    return Candidate(family, plan, kept, seen, unseen=table.others is not None)


def choose(
    table: Table,
    spreads: Sequence[Spread],
    kinds: Sequence[tuple[str, str]],
    weights: Sequence[float],
    budgets: Sequence[int],
    least_down: int = 1,
) -> tuple[list[Kept], Rooms] | None:
    """Of every layer how it is kept, with primaries and spares in which of the ``kinds``, so that the table's costs add
    up to the least, and by how much room the devices share what is not on all of them (None: evenly). ``weights`` are
    those of 0, 1, ... failed devices; there are corrections for ``least_down`` of them and more.

    Bytes are counted as parts of what a device has room for, and the device of which most is taken counts. None when
    even the least does not fit.
    """
    network, devices = table.network, table.devices
    layers = list(enumerate(zip(network.plan_layers, (tuple(of.tolist()) for of in table.units), strict=True)))
    choices = _choices(network, devices, spreads, kinds, table.offered(min(budgets)))
    corrections = CORRECTION_BYTES * _corrected_sets(spreads, devices, table.survive, least_down)
    costs = [np.array([table.sensitivity.cost(i, kept, weights) for kept in choices[i]]) for i, _ in layers]
    allowed, scale, rooms = _room(network, budgets)
    uneven = rooms is not None
    room = fits = int(allowed.min())
    too_much: int | None = None
    best: tuple[list[Kept], Rooms] | None = None
    least = math.inf
    for _ in range(TRIES):
        sizes = _sizes(layers, choices, devices, corrections, rooms, scale)
        if sum(int(of_layer.min()) for of_layer in sizes) > room:
            break
        numbers = allocate(costs, sizes, room)
        chosen = [choices[i][number] for i, number in enumerate(numbers)]
        everywhere, rest = _held(layers, chosen, devices, corrections, rooms)
        unused = math.floor(((allowed - everywhere - rest) * scale).min())
        cost = sum(float(costs[i][number]) for i, number in enumerate(numbers))
        if unused < 0:
            too_much = room
        else:
            fits = room
            if cost <= least:
                best, least = (chosen, rooms), cost
            if uneven:
                rooms = tuple((allowed - everywhere).tolist())
        before, room = room, fits + unused if too_much is None else (fits + too_much) // 2
        if room == before and not uneven:
            break
    return best


def check_room(network: Network, devices: int, survive: int | None, budgets: Sequence[int]) -> None:
    """PlanError, naming what is needed, when :func:`candidates` would find nothing that keeps to the budgets, or when
    there cannot be so many devices, or so many down. It takes no table."""
    check_devices(devices)
    check_max_failed(devices, survive)
    survive = devices - 1 if survive is None else survive
    needed = _least_needed(network, devices, survive, budgets)
    if needed <= min(budgets):
        return
    if len(set(budgets)) > 1:
        more = [max(1, budget) for budget in budgets]
        while (needed := _least_needed(network, devices, survive, more)) > min(more):
            factor, enough = max(needed / min(more), CLOSELY), 4 * network.parameters
            more = [max(budget, min(math.ceil(factor * budget), enough)) for budget in more]
        amounts = ",".join(f"{budget}B" for budget in more)
        raise PlanError(f"the smallest copies do not fit; they would if devices had more, as in --memory {amounts}")
    share = share_of(needed, 4 * network.parameters)
    raise PlanError(
        f"the smallest copies need {needed:,} bytes on each device, {min(budgets):,} are allowed: --memory {share}"
    )


def _least_needed(network: Network, devices: int, survive: int, budgets: Sequence[int]) -> int:
    """What the smallest copies that are offered for the budgets take of the least of these."""
    offered = worth_choosing(network, min(budgets))
    # Which units are important decides who holds which of them, not how many each device holds.
    layers = [(i, (of, (0.0,) * (of.neurons // of.group))) for i, of in enumerate(network.plan_layers)]
    _, scale, rooms = _room(network, budgets)
    spreads, thin = _spreads(devices), _thin(devices)
    needed = []
    for some in (spreads[:1], spreads, [*spreads, *thin]):  # the fewer holders, the more corrections
        corrections = CORRECTION_BYTES * _corrected_sets(some, devices, survive, least_down=survive)
        choices = _choices(network, devices, some, ALIKE, offered)
        sizes = _sizes(layers, choices, devices, corrections, rooms, scale)
        needed.append(sum(int(of_layer.min()) for of_layer in sizes))
    return 4 * network.shared_weights + min(needed)


def _choices(
    network: Network,
    devices: int,
    spreads: Sequence[Spread],
    kinds: Sequence[tuple[str, str]],
    offered: Sequence[Collection[str]],
) -> list[list[Kept]]:
    """Of every layer how it may be kept, in those of the ``kinds`` that are ``offered``: small layers by all."""
    small, by_all = small_layers(network.plan_layers), Spread(devices)
    return [
        [Kept(by_all, kind) for kind in REPRESENTATIONS if kind in of_layer]
        if i in small
        else [Kept(s, *of) for s in spreads for of in kinds if set(of) <= set(of_layer)]
        for i, of_layer in enumerate(offered)
    ]


def _room(network: Network, budgets: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float64], Rooms]:
    """What devices have for layers, in bytes; by what to scale it so that all have the same; and how much room that is
    where they have not."""
    allowed = np.maximum(np.array(budgets, dtype=np.int64) - 4 * network.shared_weights, 1)  # 1 fits nothing either
    return allowed, allowed.min() / allowed, tuple(allowed.tolist()) if len(set(budgets)) > 1 else None


def _sizes(
    layers: Sequence[tuple[int, tuple[Layer, tuple[float, ...]]]],
    choices: Sequence[Sequence[Kept]],
    devices: int,
    corrections: int,
    rooms: Rooms,
    scale: NDArray[np.float64],
) -> list[NDArray[np.int64]]:
    """What each choice of every layer takes on the device where that is most, bytes in which each has the same room."""

    def of_choice(index: int, layer: tuple[Layer, tuple[float, ...]], kept: Kept) -> int:
        # In front of the first layer nothing is lost that its neurons could be corrected for.
        corrected = index > 0 or len(set(kept.kinds)) > 1
        held = held_bytes(*layer, kept, devices, index, corrections if corrected else 0, rooms)
        return int(np.ceil((held * scale).max()))

    return [np.array([of_choice(index, layer, kept) for kept in choices[index]]) for index, layer in layers]


def _spreads(devices: int) -> list[Spread]:
    """What is worth considering: neurons on all devices, on three quarters or half of them, or the decisive on all;
    the one that takes most bytes first, that which takes least last."""
    half = math.ceil(devices / 2)
    wide = [Spread(devices)] + [Spread(h) for h in sorted({math.ceil(0.75 * devices)} - {devices})]
    return [*wide, *(Spread(half, share) for share in (0.5, 0.25, 0.0) if half < devices)]


def _thin(devices: int) -> list[Spread]:
    """Neurons on one device alone."""
    return [Spread(1, 0.5), Spread(1, 0.25), Spread(1)] if devices > 2 else []


def _corrected_sets(spreads: Sequence[Spread], devices: int, survive: int, least_down: int = 1) -> int:
    """For how many failure sets of ``least_down`` devices and more a device that is up keeps corrections: all in which
    neurons can be lost."""
    fewest = max(least_down, min(spread.holders for spread in spreads))
    return sum(math.comb(devices - 1, size) for size in range(fewest, survive + 1))


def _held(
    layers: Sequence[tuple[int, tuple[Layer, tuple[float, ...]]]],
    kept: Sequence[Kept],
    devices: int,
    corrections: int,
    rooms: Rooms,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bytes on every device: of layers that all devices hold, and of the others. Layers up to the first of which
    something can be lost need no ``corrections``, unless that may come from coarser spares."""
    everywhere, rest = np.zeros(devices, dtype=np.int64), np.zeros(devices, dtype=np.int64)
    corrected = False
    for (index, layer), of_layer in zip(layers, kept, strict=True):
        corrected |= len(set(of_layer.kinds)) > 1
        held = held_bytes(*layer, of_layer, devices, index, corrections if corrected else 0, rooms)
        if of_layer.held_by_all(devices):
            everywhere += held
        else:
            rest += held
            corrected = True
    return everywhere, rest


def _shards(table: Table, kept: Sequence[Kept], rooms: Rooms) -> tuple[tuple[Shard, ...], ...]:
    layers, devices = zip(table.network.plan_layers, table.units, kept, strict=True), table.devices
    return tuple(
        shards_of(
            *(layer, of_layer.tolist(), of, devices, index, rooms),
            likeness=None if of.spread.holders == devices else table.likeness[index],
        )
        for index, (layer, of_layer, of) in enumerate(layers)
    )


def _made(
    table: Table, kept: Sequence[Kept], shards: tuple[tuple[Shard, ...], ...], coarse: Coarse, least_down: int
) -> Plan:
    """The plan with its ``coarse`` weights, and corrections for ``least_down`` failed devices and more."""
    network, devices, images, survive = table.network, table.devices, table.images, table.survive
    plan = Plan(
        devices=devices,
        layers=network.plan_layers,
        shards=shards,
        shared_weights=network.shared_weights,
        method="auto",
        model=network.reference,
        settings={
            "survive": survive,
            "holders": [of.spread.holders for of in kept],
            "decisive": [of.spread.decisive for of in kept],
            "precision": [of.representation for of in kept],
            "spare_precision": [of.kinds[1] for of in kept],
            "images": len(images),
        },
        coarse=coarse,
        wire=table.wire,
    )
    return corrected(table, plan, least_down)


def corrected(table: Table, plan: Plan, least_down: int = 1) -> Plan:
    """The plan with corrections for all failure sets of ``least_down`` devices and more in which something is lost."""
    found = calibrate(
        table.network,
        plan,
        table.images,
        min_failed=least_down,
        max_failed=table.survive,
        lost_only=True,
        targets=lambda: table.targets,
    )
    return replace(plan, corrections=found)
