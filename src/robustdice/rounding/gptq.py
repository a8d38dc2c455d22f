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
    those that carry most first, and how an error in one is best made up for by the later ones (``upper``, float64)."""

    order: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, moments: torch.Tensor) -> Curvature:
        """Of second moments that have not been damped yet."""
        order = moments.diagonal().argsort(descending=True)
        back = order.flip(0)
        # The inverse is upper.T @ upper: so it is enough to invert the triangle of the columns in opposite order.
        triangle = torch.linalg.cholesky(damped(moments)[back][:, back])
        inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(order), dtype=torch.float64), upper=False)
        return cls(order, inverse.flip(0, 1))

    def solve(self, products: torch.Tensor) -> torch.Tensor:
        """The filters [neurons, K] whose products with the damped moments are ``products``, float64."""
        found = torch.empty_like(products)
        found[:, self.order] = products[:, self.order] @ self.upper.T @ self.upper
        return found


def gptq(weights: torch.Tensor, curvature: Curvature, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Levels [neurons, K] for ``weights`` (float32 [neurons, K]) with little error in what they give for inputs of this
    ``curvature``. ``scales`` [neurons, K] are each weight's."""
    order, upper = curvature.order, curvature.upper.to(torch.float32)
    # Weights of one column follow each other in memory: columns are what is worked on.
    left, steps = weights.T[order].contiguous(), scales.T[order].contiguous()
    levels = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop):
            levels[at] = to_levels(left[at], steps[at], kind)
            torch.sub(left[at], levels[at] * steps[at], out=errors[at - start]).div_(upper[at, at])
            left[at:stop].addr_(upper[at, at:stop], errors[at - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(levels)
    restored[order] = levels
    return restored.T.contiguous()
