"""All that can be made of a budget for a purpose: by every split, and within less."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from robustdice.auto import MEASURED, ROUNDING_IMAGES, Candidate, Table, affordable, candidates, corrected
from robustdice.cost.model import Judge
from robustdice.cost.purpose import Purpose, nearly_best, ordered_for
from robustdice.errors import PlanError
from robustdice.partitioning import JUDGED, SPLITS
from robustdice.partitioning.paired import kinds_with_pairs
from robustdice.plan import Holder, Plan, Shard
from robustdice.progress import Progress, part, silent
from robustdice.rivals import dealt_out, rivals, try_all
from robustdice.rounding.layer import Choice
from robustdice.rounding.network import Coarse, round_network
from robustdice.splits import NO_SPLITS, Splits, even_plan, splits_of

LEAST = 1 / 32
"""Of what is allowed: less is not tried for the smallest plan."""
HALVINGS = 5
"""Of the range of budgets in which the smallest plan is looked for: to a tenth."""


def considered_for(
    purpose: Purpose, table: Table, budgets: Sequence[int], on_progress: Progress = silent
) -> list[Candidate]:
    """All that there is within the budgets (bytes of each device) by every split, and for ``memory`` within smaller
    ones, as long as these keep enough; in the order of :func:`robustdice.cost.purpose.ordered_for`."""
    smaller = purpose.name == "memory"
    first = part(on_progress, 0, 0.4 if smaller else 1)
    found = [*candidates(table, budgets, part(first, 0, 0.3)), *rivals(table, budgets, part(first, 0.3, 0.4))]
    found += divided(table, budgets, purpose.judge, part(first, 0.4, 1))
    if smaller:
        found += _smaller(table, budgets, found, part(on_progress, 0.4, 1))
    return ordered_for(purpose, found)


def _smaller(
    table: Table, budgets: Sequence[int], found: Sequence[Candidate], on_progress: Progress
) -> list[Candidate]:
    """What fits into less, where the range of budgets is halved again and again: towards less where that keeps
    enough, towards more where it does not."""
    more: list[Candidate] = []
    low, high = LEAST, 1.0
    for number in range(HALVINGS):
        on_progress(number, HALVINGS)
        share = (low * high) ** 0.5
        within = [int(share * budget) for budget in budgets]
        try:
            tried = [each for each in (*candidates(table, within), *rivals(table, within)) if each.fits]
        except PlanError:  # not even the coarsest copies fit
            tried = []
        more += tried
        enough = nearly_best([*found, *more])
        low, high = (low, share) if any(each in enough for each in tried) else (share, high)
    return more


def divided(table: Table, budgets: Sequence[int], judge: Judge, on_progress: Progress = silent) -> list[Candidate]:
    """What :func:`robustdice.auto.candidates` and :func:`robustdice.rivals.rivals` make by neurons, by every other
    split; and float32 slices whose spares, coarse as the budget says, are on all other devices, by neurons too."""
    made: dict[object, tuple[str, Plan]] = {}
    for family, plan in _by_every_split(table, budgets, judge, part(on_progress, 0, 0.8)):
        if plan.exchanges:
            how = plan.shards, plan.strips, tuple(plan.pairs.items()), plan.owned
            made.setdefault(how, (family, plan))
    return try_all(table, [*made.values()], budgets, part(on_progress, 0.8, 1))


def _by_every_split(
    table: Table, budgets: Sequence[int], judge: Judge, on_progress: Progress
) -> Iterator[tuple[str, Plan]]:
    yield from _with_spares(table, budgets, NO_SPLITS, "neurons")
    for split in SPLITS[1:]:
        splits = _splits(table, split, judge, pairs_too=True)
        if splits != NO_SPLITS:
            for kind in ("float32", "int8"):
                for family, plan in dealt_out(table, kind, budgets, splits):
                    yield f"{family}, {split}", replace(plan, settings={**plan.settings, "split": split})
            yield from _with_spares(table, budgets, splits, split)
    for number, split in enumerate(JUDGED):
        on_progress(number, len(JUDGED))
        splits = _splits(table, split, judge, pairs_too=False)
        if splits != NO_SPLITS:
            yield from _spread(table, budgets, splits, split)


def _splits(table: Table, split: str, judge: Judge, pairs_too: bool) -> Splits:
    """The splits that a word asks for, if there are any."""
    try:
        return splits_of(table.network, table.devices, split, judge, table.wire, pairs_too)
    except PlanError:  # there are no rows to be had
        return NO_SPLITS


def _with_spares(table: Table, budgets: Sequence[int], splits: Splits, split: str) -> Iterator[tuple[str, Plan]]:
    """Slices in float32, of which all other devices have spares, the finest that fit: nothing is lost."""
    plan, devices = even_plan(table.network, table.devices, splits, table.wire), table.devices
    offered = ("int8", "int4", "int3", "int2") if plan.pairs else MEASURED  # what is entropy-coded cannot be a pair's
    for kind in offered:
        kinds = kinds_with_pairs(plan.layers, plan.pairs, "float32", kind)
        spares = {index: kinds[index].spare for index in range(len(plan.layers)) if not plan.held_by_all(index)}
        shards = list(plan.shards)
        for index, spare in spares.items():
            shards[index] = tuple(_spared(shard, spare, devices) for shard in plan.shards[index])
        spares |= {second: spares[first] for first, second in plan.pairs.items()}
        plan = replace(
            plan,
            shards=tuple(shards),
            coarse=_rounded(table, spares),
            method="auto",
            settings={"split": split, "spare_precision": kind},
        )
        if kind == offered[-1] or all(h <= b for h, b in zip(plan.bytes_per_device, budgets, strict=True)):
            yield f"float32 slices, {kind} everywhere, {split}", plan
            return


def _rounded(table: Table, spares: Mapping[int, str]) -> Coarse:
    """The coarse weights of ``spares``, by layer: the table's, or such as the table's would be."""
    missing = {index: [Choice(kind)] for index, kind in spares.items() if (index, kind) not in table.rounded}
    images = affordable(table.network, table.images, ROUNDING_IMAGES)
    more = round_network(table.network, missing, images) if missing else {}
    return {of: more[of] if of in more else table.rounded[of] for of in spares.items()}


def _spared(shard: Shard, kind: str, devices: int) -> Shard:
    first = shard.devices[0]
    spares = (Holder((first + step) % devices, kind) for step in range(1, devices))
    return replace(shard, holders=(shard.holders[0], *spares))


def _spread(table: Table, budgets: Sequence[int], splits: Splits, split: str) -> Iterator[tuple[str, Plan]]:
    """Spread copies, with the layers of strips and those that are whole in float32 on every device."""
    network = table.network
    by_all = even_plan(network, table.devices, splits, table.wire)
    front = {*splits.whole, *(() if splits.run is None else splits.run.layers)}
    taken = 4 * sum(of.neurons * of.neuron_weights for of in (network.plan_layers[index] for index in front))
    try:
        found = candidates(table, [max(1, budget - taken) for budget in budgets])
    except PlanError:  # there is no room for them
        return
    for family, plan in ((each.family, each.plan) for each in found if each.plan.exchanges):
        shards = tuple(by_all.shards[i] if i in front else of for i, of in enumerate(plan.shards))
        divided = replace(
            plan,
            shards=shards,
            strips=by_all.strips,
            coarse={of: kept for of, kept in plan.coarse.items() if of[0] not in front},
            corrections={},
            settings={**plan.settings, "split": split, **_settings_of(plan, front)},
        )
        yield f"{family}, {split}", corrected(table, divided, min(map(len, plan.corrections), default=1))


def _settings_of(plan: Plan, front: Collection[int]) -> dict[str, list[object]]:
    """What :mod:`robustdice.auto` says of each layer, where those in ``front`` are in float32 on all devices."""
    whole = {"holders": plan.devices, "decisive": 0.0, "precision": "float32", "spare_precision": "float32"}
    return {
        name: [there if index in front else said for index, said in enumerate(plan.settings[name])]
        for name, there in whole.items()
    }
