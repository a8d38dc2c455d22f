"""The best plans once more, with learned rounding, where rounding is what they lose by and learning takes minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robustdice.auto import LEARNED, Candidate, Table, corrected, tried_out
from robustdice.progress import Progress, part, silent
from robustdice.rounding.learned import LEARNT, learned_network, steps_macs
from robustdice.rounding.network import wanted_of

WORTH_IT = 0.02
"""The share of images for which a plan answers otherwise than the intact network while all devices are up: so much it
loses by rounding (and by what the wire rounds)."""
MOST_MACS = 2 * 10**13
"""Of multiply-adds for one plan, and what takes as long: minutes on two cores."""


def learned(
    table: Table, found: Sequence[Candidate], budgets: Sequence[int], on_progress: Progress = silent
) -> list[Candidate]:
    """The first ``LEARNED`` of the plans that were ``found``, the best first, with learned rounding, where that is
    worth it: which of them is better often changes. Two that only rounding tells apart count as one."""
    different: dict[object, Candidate] = {}
    for each in found:
        how = each.plan.shards, each.plan.strips, tuple(each.plan.pairs.items()), each.plan.owned
        different.setdefault(how, each)
    chosen = [each for each in [*different.values()][:LEARNED] if _is_worth_it(table, each)]
    return [
        _with_learned_rounding(table, each, budgets, part(on_progress, number / LEARNED, (number + 1) / LEARNED))
        for number, each in enumerate(chosen)
    ]


def _is_worth_it(table: Table, candidate: Candidate) -> bool:
    wanted = wanted_of(candidate.plan.shards, candidate.plan.pairs)
    coarse = any(choice.representation in LEARNT for choices in wanted.values() for choice in choices)
    loses = candidate.fits and candidate.agreement[0] <= 1 - WORTH_IT
    return loses and coarse and steps_macs(table.network, wanted) <= MOST_MACS


def _with_learned_rounding(
    table: Table, candidate: Candidate, budgets: Sequence[int], on_progress: Progress
) -> Candidate:
    before = candidate.plan
    wanted = wanted_of(before.shards, before.pairs)
    plan = replace(
        before,
        coarse=learned_network(table.network, wanted, table.images, on_progress=on_progress),
        settings={**before.settings, "rounding": f"learned on {len(table.images)} images"},
        corrections={},
    )
    if before.corrections:
        plan = corrected(table, plan, min(map(len, before.corrections)))
    return tried_out(table, f"{candidate.family}, learned rounding", plan, budgets)
