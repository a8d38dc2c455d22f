"""The best plan once more, with learned rounding, where rounding is what it loses by and learning takes minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robustdice.auto import Candidate, Table, tried_out
from robustdice.failure.calibrate import calibrate
from robustdice.progress import Progress, silent
from robustdice.rounding.learned import LEARNT, learned_network, steps_macs
from robustdice.rounding.network import wanted_of

WORTH_IT = 0.02
"""The share of images for which a plan answers otherwise than the intact network while all devices are up: so much it
loses by rounding alone."""
MOST_MACS = 2 * 10**13
"""Of multiply-adds in all, forwards and back: minutes on two cores."""


def learned(table: Table, best: Candidate, budgets: Sequence[int], on_progress: Progress = silent) -> Candidate | None:
    """The ``best`` plan with learned rounding; None where that is not worth it."""
    wanted = wanted_of(best.plan.shards, best.plan.pairs)
    coarse = any(choice.representation in LEARNT for choices in wanted.values() for choice in choices)
    loses = best.fits and best.agreement[0] <= 1 - WORTH_IT
    if not (loses and coarse and steps_macs(table.network, wanted) <= MOST_MACS):
        return None
    plan = replace(
        best.plan,
        coarse=learned_network(table.network, wanted, table.images, on_progress=on_progress),
        settings={**best.plan.settings, "rounding": f"learned on {len(table.images)} images"},
        corrections={},
    )
    if best.plan.corrections:
        fitted = calibrate(
            table.network,
            plan,
            table.images,
            max_failed=table.survive,
            lost_only=True,
            targets=lambda: table.targets,
        )
        plan = replace(plan, corrections=fitted)
    return tried_out(table, f"{best.family}, learned rounding", plan, budgets)
