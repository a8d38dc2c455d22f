"""Plans for a budget: every layer's spread and representation chosen by what they cost, then tried."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from robustdice.auto.choice import Rooms, check_room, choose
from robustdice.auto.table import ALIKE, MEASURED, Table, spreads_of, thin_spreads
from robustdice.cost.model import Judge
from robustdice.cost.purpose import TOLERATED
from robustdice.errors import PlanError
from robustdice.failure.agreement import agreement
from robustdice.failure.calibrate import calibrate
from robustdice.partitioning.allocation import Kept, Spread, shards_of
from robustdice.plan import Plan, Shard
from robustdice.progress import Progress, part, silent
from robustdice.rounding.network import Coarse, round_together, wanted_of

FINE_FIRST = (*ALIKE, *itertools.combinations(("float32", *MEASURED), 2))
"""Representations of primaries and spares that are the same, and those of which spares are coarser."""
LEARNED = 2
"""So many plans, the best ones, are looked at once more (:mod:`robustdice.learning`)."""


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
    offered, thin = spreads_of(table.devices), thin_spreads(table.devices)
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
