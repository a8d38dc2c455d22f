"""Whether a measured accuracy says anything about the network, or rather about how it was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustdice.failure.evaluate import Evaluation

LITTLE, MUCH = 0.1, 0.5
"""Shares of the way from chance to perfection: so little is suspicious however many images there are, and from so
much on few images are no reason for doubt."""
DEVIATIONS = 3.0
"""Standard errors that an accuracy is above chance, to be told from it."""


def doubt_about(evaluation: Evaluation, outputs: int, random_weights: bool = False) -> str | None:
    """A warning with the likely causes when the unpartitioned network is hardly better than chance; else None.

    Chance is a right answer in ``outputs``, with the standard error that it has for so many images.
    """
    chance = 1 / outputs
    gained = (evaluation.clean - chance) / (1 - chance)
    error = math.sqrt(chance / (1 - chance) / evaluation.samples)
    if gained >= min(MUCH, max(LITTLE, DEVIATIONS * error)):
        return None
    causes = (
        "its weights are random"
        if random_weights
        else "most likely the classes are in another order than the model's outputs (--classes FILE), or images are "
        "prepared otherwise than in training (mean, std, resize, channels)"
    )
    return (
        f"the unpartitioned network answers {evaluation.clean:.1%} of {evaluation.samples} images rightly, chance "
        f"{chance:.1%}: {causes}; what failures leave of that says little"
    )
