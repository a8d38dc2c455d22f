"""How far an answer moves: Jensen-Shannon divergences, with the natural logarithm (0 to ln 2)."""

from __future__ import annotations

import math

import torch


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The divergence of distributions over the last axis."""
    middle = (p + q) / 2
    divergence = torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)
    return divergence.nan_to_num(0.0).sum(-1).clamp_min(0) / 2


def class_removal(p: torch.Tensor) -> torch.Tensor:
    """The divergence, elementwise, when what has probability ``p`` is no longer among the answers."""
    rest = 1 - p
    both = 2 - p
    kept = torch.xlogy(rest, 2 * rest / both) + math.log(2) * p
    return ((kept + torch.log(2 / both)) / 2).clamp_min(0)
