"""From the accuracy under every failure set to what to expect, given how often each device is up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import PlanError
from robustdice.plan import FailureSet

if TYPE_CHECKING:
    from robustdice.failure.evaluate import Evaluation


@dataclass(frozen=True)
class Expectation:
    """Accuracy as a random quantity, each device being up with its probability in ``up``, independently.

    ``distribution`` has pairs (accuracy, probability), ascending; everybody down counts as accuracy 0, and its
    probability is ``no_answer_probability`` too. ``estimated``: some sizes were only sampled, and their
    measured sets stand for the others.
    """

    up: tuple[float, ...]
    expected_accuracy: float
    no_answer_probability: float
    distribution: tuple[tuple[float, float], ...]
    estimated: bool

    def at_least(self, probability: float) -> float:
        """The accuracy that is reached or exceeded with at least this probability."""
        reached = 0.0
        for accuracy, share in reversed(self.distribution):
            reached += share
            if reached >= probability - 1e-12:
                return accuracy
        return 0.0


def expect(evaluation: Evaluation, up: float | Sequence[float]) -> Expectation:
    """What accuracy to expect when the devices are up with probability ``up`` (one for all, or one each).

    PlanError when that is no probability, their number is not that of the devices, or sizes were not measured.
    """
    devices = evaluation.devices
    probabilities = for_each(devices, up)
    if missing := [size for size in range(devices) if size not in evaluation.by_size]:
        raise PlanError(
            f"with {missing[0]} devices down nothing was measured: availability needs every number of them; "
            "evaluate without a largest one"
        )
    of_size = _down_counts(probabilities)
    shares: dict[float, float] = {0.0: of_size[devices]}
    for size, summary in evaluation.by_size.items():
        sets = {failed: a for failed, a in evaluation.accuracy.items() if len(failed) == size}
        weights = {failed: _probability(failed, probabilities) for failed in sets}
        measured = sum(weights.values())
        for failed, accuracy in sets.items():
            # A sample stands for its whole size; where none of it can happen, each of its sets counts the same.
            weight = weights[failed] / measured if measured > 0 else 1 / len(sets)
            share = of_size[size] * weight if summary.sampled else weights[failed]
            shares[accuracy] = shares.get(accuracy, 0.0) + share
    return Expectation(
        up=tuple(probabilities),
        expected_accuracy=math.fsum(accuracy * share for accuracy, share in shares.items()),
        no_answer_probability=of_size[devices],
        distribution=tuple(sorted((a, share) for a, share in shares.items() if share > 0)),
        estimated=any(summary.sampled for summary in evaluation.by_size.values()),
    )


def for_each(devices: int, up: float | Sequence[float]) -> list[float]:
    """The probability that each device is up; PlanError when what is given is none, or for another number of them."""
    given = [float(value) for value in np.atleast_1d(up)]
    if len(given) not in (1, devices):
        raise PlanError(f"{len(given)} availabilities for {devices} devices; give one for all, or one for each")
    if wrong := [value for value in given if not 0 <= value <= 1]:
        raise PlanError(f"an availability is a probability between 0 and 1, not {wrong[0]}")
    return given * devices if len(given) == 1 else given


def _probability(failed: FailureSet, up: Sequence[float]) -> float:
    return math.prod(1 - p if device in failed else p for device, p in enumerate(up))


def _down_counts(up: Sequence[float]) -> list[float]:
    """The probability that exactly 0, 1, ... devices are down (Poisson binomial, one device after the other)."""
    counts: NDArray[np.float64] = np.ones(1)
    for p in up:
        counts = np.convolve(counts, [p, 1 - p])
    return [float(count) for count in counts]
