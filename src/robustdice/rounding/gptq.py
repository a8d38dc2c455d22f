"""Rounding column by column, later columns making up for earlier ones (GPTQ, arXiv 2210.17323; OBQ's greedy step)."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Curvature:
    """What second moments [K, K] say about rounding, worked out once for all representations: the ``order`` of columns,
    those that carry most first, and how an error in one is best made up for by the later ones (``upper``, float32)."""

    order: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, moments: torch.Tensor) -> Curvature:
        """Of second moments that have not been damped yet."""
        order = moments.diagonal().argsort(descending=True)
        lower = torch.linalg.cholesky(damped(moments)[order][:, order])
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return cls(order, lower, upper.to(torch.float32))

    def solve(self, products: torch.Tensor) -> torch.Tensor:
        """The filters [neurons, K] whose products with the damped moments are ``products``, float64."""
        found = torch.empty_like(products)
        found[:, self.order] = torch.cholesky_solve(products[:, self.order].T, self.lower).T
        return found


def gptq(weights: torch.Tensor, curvature: Curvature, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Levels [neurons, K] for ``weights`` (float32 [neurons, K]) with little error in what they give for inputs of this
    ``curvature``. ``scales`` [neurons, K] are each weight's."""
    order, upper = curvature.order, curvature.upper
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
