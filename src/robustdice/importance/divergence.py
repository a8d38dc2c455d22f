"""How far an answer moves: divergences of class probabilities, with the natural logarithm."""

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


def kullback_leibler(exact: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the class probabilities of ``scores`` [n, classes] from the exact ones': a
    number, float64. A lost class counts as one that is next to impossible."""
    probable = torch.log_softmax(exact.double(), 1)
    found = torch.log_softmax(scores.double(), 1).nan_to_num(nan=-30.0).clamp_min(-30.0)  # NaN where all are lost
    return (probable.exp() * (probable - found)).sum(1).mean()
