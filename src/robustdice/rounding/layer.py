"""One layer's filters in one representation, chosen on what the layer sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from robustdice.rounding.gptq import gptq
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

    With ``seen`` the codes are GPTQ's and the shift makes up for what is left on average (bias correction); without,
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
    for rows, inputs in _by_inputs(neurons, seen):
        moments = None if inputs is None else inputs.T @ inputs / len(inputs)
        importance = None if moments is None else moments.diagonal()
        scales[rows] = best_scales(filters[rows], kind, group, importance)
        steps = scales[rows].repeat_interleave(group, 1)[:, :weights]
        for start in range(0, weights, MAX_BLOCK):
            block = slice(start, start + MAX_BLOCK)
            some, step = filters[rows, block], steps[:, block]
            levels[rows, block] = (
                to_levels(some, step, kind) if moments is None else gptq(some, moments[block, block], step, kind)
            )
    codes = (levels - code_offset(kind)).to(torch.int8).numpy()
    found = CoarseFilter(kind, codes, as_float16(scales).numpy().astype(np.float16), group)
    return found, torch.from_numpy(found.values())


def _by_inputs(neurons: int, seen: Seen | None) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """The neurons that read the same inputs, and these."""
    if seen is None:
        yield slice(0, neurons), None
        return
    each = neurons // len(seen.own)
    for group, inputs in enumerate(seen.own):
        yield slice(group * each, (group + 1) * each), inputs


def _lost_on_average(exact: torch.Tensor, values: torch.Tensor, seen: Seen) -> torch.Tensor:
    """By how much the exact filters give more on what the intact layer sees than the coarse ones on what is seen."""
    means = seen.own.mean(1), seen.intact.mean(1)
    each = len(exact) // len(seen.own)
    own, intact = (mean.repeat_interleave(each, 0) for mean in means)
    return (exact * intact).sum(1) - (values * own).sum(1)
