"""Scales: how far apart the levels of a representation lie, for every neuron and group of its weights."""

from __future__ import annotations

from functools import partial

import torch

from robustdice.representation import code_offset, code_range

SHRINKS = 32
"""How many scales are tried, from the one that clips nothing down to a fifth of it."""
NORM = 2.4
"""The power of a weight's error that is summed up: between squares and the largest (BRECQ's choice)."""
ENOUGH = 4096
"""Weights of a group that say what scale is best; of more, some are looked at, at even distances."""
AT_ONCE = 2**18
"""Weights that are looked at together: what is worked out of them stays in a processor's cache."""
_SMALLEST = 2.0**-24
"""The least positive float16."""


def grouped(weights: torch.Tensor, group: int) -> torch.Tensor:
    """Weights [neurons, K] as [neurons, groups, group], the last group filled up with zeros."""
    neurons, k = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -k % group))
    return padded.reshape(neurons, -1, group)


def best_scales(weights: torch.Tensor, kind: str, group: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The scales that leave the least error of ``weights`` [neurons, K] when each is rounded to the nearest level.

    float16 values, as float32 [neurons, groups]; ``importance`` [K] or [neurons, K] weighs the errors of the weights.
    """
    _, high = code_range(kind)
    parts = grouped(weights, group)
    # What the last group is filled up with weighs nothing: of 2 bits no level is zero.
    weigh = grouped(torch.ones_like(weights) if importance is None else importance.expand_as(weights), group)
    widest = parts.abs().amax(2, keepdim=True) / (high + code_offset(kind))
    every = max(1, parts.shape[2] // ENOUGH)
    parts, weigh = parts[:, :, ::every].contiguous(), weigh[:, :, ::every]
    neurons = max(1, AT_ONCE // max(1, parts[0].numel())) if len(parts) else 1
    found = map(partial(_best, kind), *(torch.split(each, neurons) for each in (parts, weigh, widest)))
    return as_float16(torch.cat(list(found)))[:, :, 0]


def _best(kind: str, parts: torch.Tensor, weigh: torch.Tensor, widest: torch.Tensor) -> torch.Tensor:
    best = torch.full(widest.shape, torch.inf)
    scales = widest.clone()
    for shrink in torch.linspace(1.0, 0.2, SHRINKS).tolist():
        tried = as_float16(widest * shrink)
        away = to_levels(parts, tried, kind).mul_(tried).sub_(parts).abs_()
        away = away.log2_().mul_(NORM).exp2_()  # the power, in a quarter of the time
        error = away.mul_(weigh).sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, tried, scales)
    return scales


def as_float16(scales: torch.Tensor) -> torch.Tensor:
    """The nearest positive float16, as float32: what the copies will be scaled by."""
    return scales.clamp(_SMALLEST, 65504.0).to(torch.float16).to(torch.float32)


def to_levels(values: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """The level (code plus offset) nearest to each of ``values``, which ``scales`` broadcast with."""
    low, high = code_range(kind)
    offset = code_offset(kind)
    return (values / scales - offset).round_().clamp_(low, high).add_(offset)
