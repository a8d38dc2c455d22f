"""How often a plan answers as the intact network does."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.failure.copies import Copies, intact, state_of
from robustdice.failure.evaluate import choose_failure_sets
from robustdice.failure.passes import run_under
from robustdice.model.network import Network, images_at_once, on_best_device
from robustdice.plan import Plan


def answers(network: Network, images: NDArray[np.float32]) -> NDArray[np.int64]:
    """The classes that the intact network answers ``images`` with."""
    at_once, base, copies = images_at_once(network), intact(network), Copies(network, {})
    found = []
    for start in range(0, len(images), at_once):
        (scores,) = run_under(
            network, on_best_device(torch.from_numpy(images[start : start + at_once])), [base], copies
        )
        found.append(scores.argmax(1).cpu().numpy())
    return np.concatenate(found)


def agreement(
    network: Network,
    plan: Plan,
    images: NDArray[np.float32],
    right: NDArray[np.int64],
    survive: int,
    to_beat: float = -1.0,
) -> tuple[tuple[float, ...], int]:
    """The share of ``images`` for which the plan's answer is the ``right`` one: in the worst failure set of 0, 1, ...,
    ``survive`` devices (of a sample of them, as in :func:`robustdice.failure.evaluate.choose_failure_sets`, where there
    are very many); and of how many of them that is: no more than it takes to know that the mean over the sizes
    stays below ``to_beat``."""
    sets = choose_failure_sets(plan.devices, survive)
    states = {failed: state_of(plan, failed) for failed in sets}
    different = list({state.key: state for state in states.values()}.values())
    correct, seen = np.zeros(len(different), dtype=np.int64), 0

    def worst() -> list[int]:
        by_key = dict(zip((state.key for state in different), correct.tolist(), strict=True))
        return [min(by_key[states[f].key] for f in sets if len(f) == size) for size in range(survive + 1)]

    at_once, copies = images_at_once(network), Copies.of(network, plan)
    while seen < len(images) and np.mean(worst()) + len(images) - seen > to_beat * len(images) - 1e-6:
        batch = on_best_device(torch.from_numpy(images[seen : seen + at_once]))
        wanted = on_best_device(torch.from_numpy(right[seen : seen + at_once]))
        for number, scores in enumerate(run_under(network, batch, different, copies)):
            answered = scores.isfinite().any(1)
            correct[number] += int((answered & (scores.argmax(1) == wanted)).sum())
        seen += len(batch)
    return tuple(count / seen for count in worst()), seen
