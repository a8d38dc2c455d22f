"""Rounding column by column, later columns making up for earlier ones (GPTQ, arXiv 2210.17323; OBQ's greedy step)."""

from __future__ import annotations

import torch

from robustdice.rounding.scales import to_levels

BLOCK = 64
"""Columns whose effect on all later ones is added up before it is applied."""
DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean."""


def damped(moments: torch.Tensor) -> torch.Tensor:
    """Second moments [K, K] in float64, with something on the diagonal where nothing was seen."""
    matrix = moments.to(torch.float64).clone()
    diagonal = matrix.diagonal()
    diagonal += DAMPING * diagonal.mean() + 1e-12
    return matrix


def gptq(weights: torch.Tensor, moments: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Levels [neurons, K] for ``weights`` (float32 [neurons, K]) with little error in what they give for inputs of
    second ``moments`` [K, K]. ``scales`` [neurons, K] are each weight's. Columns that carry most go first."""
    order = moments.diagonal().argsort(descending=True)
    matrix = damped(moments)[order][:, order]
    inverse = torch.linalg.inv(matrix)
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True).to(torch.float32)
    left = weights[:, order].clone()
    steps = scales[:, order]
    levels = torch.empty_like(left)
    columns = left.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(left.shape[0], stop - start)
        for at in range(start, stop):
            levels[:, at] = to_levels(left[:, at], steps[:, at], kind)
            error = (left[:, at] - levels[:, at] * steps[:, at]) / upper[at, at]
            left[:, at:stop] -= error[:, None] * upper[None, at, at:stop]
            errors[:, at - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    restored = torch.empty_like(levels)
    restored[:, order] = levels
    return restored
