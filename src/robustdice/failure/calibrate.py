"""Corrections: what the survivors of a failure set scale and shift each neuron by, to make up for what is lost.

No labels, and no weight is trained: statistics are matched (:mod:`robustdice.failure.matching`), and from there on,
where it is asked for, the answers themselves (:mod:`robustdice.failure.refine`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from robustdice.failure.copies import Copies, state_of
from robustdice.failure.matching import Corrections, Targets, fit
from robustdice.failure.refine import Refiner
from robustdice.model.fits import check_plan_fits
from robustdice.model.network import Network
from robustdice.plan import FailureSet, Plan, check_max_failed, failure_sets
from robustdice.progress import Progress, silent
from robustdice.representation import LOST


def calibrate(
    network: Network,
    plan: Plan,
    images: NDArray[np.float32],
    *,
    min_failed: int = 1,
    max_failed: int | None = None,
    lost_only: bool = False,
    passes: int = 0,
    seed: int = 0,
    targets: Callable[[], Targets] | None = None,
    on_progress: Progress = silent,
) -> dict[FailureSet, Corrections]:
    """Corrections of ``plan`` for every failure set of ``min_failed`` to ``max_failed`` devices (all but one) under
    which it computes something else than while all are up, fitted to ``images`` (unlabelled, [n, channels, height,
    width], a few hundred). With ``lost_only`` not for sets in which all neurons are there, if only from coarser spares.
    What the plan's own corrections are does not matter. Gradient descent goes over the images ``passes`` times for each
    of them, in an order drawn with ``seed``. ``targets`` as for :func:`robustdice.failure.matching.fit`. PlanError when
    the plan is of another model.
    """
    check_plan_fits(network, plan)
    check_max_failed(plan.devices, max_failed)
    largest = plan.devices - 1 if max_failed is None else max_failed
    holders = min(len(shard.holders) for of_layer in plan.shards for shard in of_layer)
    least = max(min_failed, holders) if lost_only else min_failed
    sets = [failed for size in range(least, largest + 1) for failed in failure_sets(plan.devices, size)]
    base = replace(state_of(plan, frozenset()), corrections=None)
    states = {failed: replace(state_of(plan, failed), corrections=None) for failed in sets}
    wanted: dict[bytes, list[FailureSet]] = {}
    for failed, state in states.items():
        lost = any((copies == LOST).any() for copies in state.copies)
        if lost or (state.key != base.key and not lost_only):
            wanted.setdefault(state.key, []).append(failed)
    found: dict[FailureSet, Corrections] = {}
    copies, different = Copies.of(network, plan), [states[same[0]] for same in wanted.values()]
    refiner = Refiner.of(network, copies, images) if passes and different else None
    groups = list(wanted.values())
    fitted = fit(network, copies, base, different, images, targets)
    for done, (number, corrections, _) in enumerate(fitted, start=1):
        if refiner is not None:
            corrections = refiner.refined(replace(different[number], corrections=corrections), passes, seed)  # noqa: PLW2901
        found |= dict.fromkeys(groups[number], corrections)
        on_progress(done, len(wanted))
    return {failed: found[failed] for failed in sets if failed in found}
