"""One layer's filters in one representation, chosen on what the layer sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from robustdice.representation import (
    TAIL_REPRESENTATION,
    CoarseFilter,
    CoarseLayer,
    code_offset,
)
from robustdice.rounding.affine import Folded
from robustdice.rounding.gptq import damped, gptq
from robustdice.rounding.scales import as_float16, best_scales, to_levels

MAX_BLOCK = 4608
"""A wider filter is rounded in blocks of this many weights, as if these saw nothing in common: second moments of all of
them would not fit into memory."""


@dataclass(frozen=True)
class Choice:
    """How a layer's weights are kept: the representation, and how many weights of a filter share a scale (all)."""

    representation: str
    group: int | None = None


@dataclass(frozen=True)
class Seen:
    """What a layer's filters are multiplied with, float32 [groups, columns, K]: really (``own``), behind coarse
    predecessors, and in the intact network (``intact``)."""

    own: torch.Tensor
    intact: torch.Tensor


def coarse_layer(
    folded: Folded, tail: Mapping[str, torch.Tensor], choice: Choice, seen: Seen | None, shifts: bool
) -> CoarseLayer:
    """A layer in one representation.

    With ``seen`` the codes are GPTQ's, and the shift makes up for what is left on average (bias correction); without,
    each weight is rounded to its nearest level. ``tail`` are the tail's depthwise filters [neurons, ...] by name;
    ``shifts`` says whether the layer can have a shift at all.
    """
    own, values = _rounded(folded.filters, choice, seen)
    shift = folded.shift
    if seen is not None and shifts:
        shift = shift + _lost_on_average(folded.filters, values, seen)
    eight = Choice(TAIL_REPRESENTATION)
    return CoarseLayer(
        own,
        shift.numpy().astype(np.float32),
        {name: _rounded(each.reshape(len(each), -1), eight, None)[0] for name, each in tail.items()},
    )


def _rounded(filters: torch.Tensor, choice: Choice, seen: Seen | None) -> tuple[CoarseFilter, torch.Tensor]:
    """The filters in a representation, and what they are worth."""
    kind = choice.representation
    neurons, weights = filters.shape
    if kind == "float16":
        values = filters.clamp(-65504.0, 65504.0).to(torch.float16)
        return CoarseFilter(kind, values.numpy(), np.empty((neurons, 0), np.float16), weights), values.float()
    group = min(choice.group or weights, weights)
    levels = torch.empty_like(filters)
    scales = torch.empty(neurons, -(-weights // group))
    if seen is None:
        scales = best_scales(filters, kind, group)
        levels = to_levels(filters, scales.repeat_interleave(group, 1)[:, :weights], kind)
    else:
        each = neurons // len(seen.own)
        for number, (own, intact) in enumerate(zip(seen.own, seen.intact, strict=True)):
            rows = slice(number * each, (number + 1) * each)
            blocks = [slice(start, start + MAX_BLOCK) for start in range(0, weights, MAX_BLOCK)]
            moments = [own[:, block].T @ own[:, block] / len(own) for block in blocks]
            wanted = [
                _matched(filters[rows, block], own[:, block], intact[:, block], moment)
                for block, moment in zip(blocks, moments, strict=True)
            ]
            importance = torch.cat([moment.diagonal() for moment in moments])
            scales[rows] = best_scales(torch.cat(wanted, 1), kind, group, importance)
            steps = scales[rows].repeat_interleave(group, 1)[:, :weights]
            for block, target, moment in zip(blocks, wanted, moments, strict=True):
                levels[rows, block] = gptq(target, moment, steps[:, block], kind)
    codes = (levels - code_offset(kind)).to(torch.int8).numpy()
    found = CoarseFilter(kind, codes, as_float16(scales).numpy().astype(np.float16), group)
    return found, torch.from_numpy(found.values())


def _matched(filters: torch.Tensor, own: torch.Tensor, intact: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The filters that give on ``own`` inputs [columns, K] what ``filters`` give on the intact ones, as nearly as least
    squares can, drawn a little towards ``filters``: earlier layers' coarseness is made up for before rounding adds to
    it (the objective of GPFQ and of Qronos, arXiv 2505.11695)."""
    matrix = damped(moments)
    mixed = (intact.T @ own / len(own)).to(torch.float64)
    mixed += matrix - moments
    solved: torch.Tensor = torch.linalg.solve(matrix, (filters.to(torch.float64) @ mixed).T)
    return solved.T.to(torch.float32)


def _lost_on_average(exact: torch.Tensor, values: torch.Tensor, seen: Seen) -> torch.Tensor:
    """By how much the exact filters give more on what the intact layer sees than the coarse ones on what is seen."""
    means = seen.own.mean(1), seen.intact.mean(1)
    each = len(exact) // len(seen.own)
    own, intact = (mean.repeat_interleave(each, 0) for mean in means)
    return (exact * intact).sum(1) - (values * own).sum(1)
