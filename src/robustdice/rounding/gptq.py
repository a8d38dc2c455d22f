"""Rounding column by column, later columns making up for earlier ones (GPTQ, arXiv 2210.17323; OBQ's greedy step)."""

from __future__ import annotations

import torch

from robustdice.rounding.curvature import Curvature
from robustdice.rounding.scales import to_levels

BLOCK = 64
"""Columns whose effect on all later ones is added up before it is applied."""


def gptq(
    weights: torch.Tensor, curvature: Curvature, scales: torch.Tensor, groups: torch.Tensor, kind: str
) -> torch.Tensor:
    """Levels [neurons, K] for ``weights`` (float32 [neurons, K]) with little error in what they give for inputs of this
    ``curvature``. ``scales`` [neurons, groups] are those of groups of weights, ``groups`` [K] which one each is in."""
    order = curvature.order
    # Weights of one column follow each other in memory: columns are what is worked on.
    left, scales = weights[:, order].T.contiguous(), scales.T.contiguous()
    steps = [scales[group] for group in groups[order].tolist()]
    levels = torch.empty_like(left)
    carried = curvature.nothing(len(weights))
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        block, inside = left[start:stop], curvature.inside(start, stop)
        block -= curvature.take(carried, start, stop)
        errors = torch.empty_like(block)
        for at in range(stop - start):
            levels[start + at] = to_levels(block[at], steps[start + at], kind)
            torch.sub(block[at], levels[start + at] * steps[start + at], out=errors[at])
            block[at:].addr_(inside[at, at:], errors[at], alpha=-1)
        curvature.give(carried, errors, start, stop)
    restored = torch.empty_like(levels)
    restored[order] = levels
    return restored.T.contiguous()
