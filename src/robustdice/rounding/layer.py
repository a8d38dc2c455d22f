"""One layer's filters in one representation, chosen on what the layer sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from robustdice.entropy_code import CODED
from robustdice.representation import LARGEST_SHIFT, TAIL_REPRESENTATION, CoarseFilter, CoarseLayer, code_offset
from robustdice.rounding.affine import Folded
from robustdice.rounding.coded import scales_and_levels
from robustdice.rounding.curvature import FEW, Curvature
from robustdice.rounding.gptq import gptq
from robustdice.rounding.scales import as_float16, best_scales, to_levels

MAX_BLOCK = 4608
"""A wider filter is rounded in blocks of this many weights, as if these saw nothing in common: second moments of all of
them would not fit into memory. Where few inputs are seen they are not needed, and the filter stays whole."""


@dataclass(frozen=True)
class Choice:
    """How a layer's weights are kept: the representation, and how many weights of a filter share a scale (all; and all
    where it is entropy-coded)."""

    representation: str
    group: int | None = None


@dataclass(frozen=True)
class Intact:
    """What a layer sees in the intact network: the ``mean`` of what its filters are multiplied with, [groups, K], and
    for each of their blocks (:func:`_blocks`) what they give for it, ``answers`` [columns, neurons], float32."""

    mean: torch.Tensor
    answers: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, filters: torch.Tensor, seen: torch.Tensor) -> Intact:
        """Of ``filters`` [neurons, K] that are multiplied with ``seen``, [groups, columns, K]."""
        return cls(
            seen.mean(1),
            tuple(seen[number, :, at] @ filters[rows, at].T for number, rows, at in _blocks(filters, seen)),
        )


@dataclass(frozen=True)
class Seen:
    """What a layer's filters are multiplied with, float32 [groups, columns, K]: really (``own``), behind coarse
    predecessors; and what is to come out, as in the intact network."""

    own: torch.Tensor
    intact: Intact


@dataclass(frozen=True)
class Part:
    """Some weights of the neurons that read the same ``inputs`` [columns, weights]: which ones (``rows``, ``block``),
    what they should be for these inputs (``wanted``), the inputs' mean squares (``importance``), and their
    ``curvature``."""

    rows: slice
    block: slice
    inputs: torch.Tensor
    wanted: torch.Tensor
    importance: torch.Tensor
    curvature: Curvature


@dataclass(frozen=True)
class Target:
    """What a layer's filters are rounded to in any representation: in ``parts`` by what they see, or as they are where
    nothing is known of that; ``own`` and ``intact`` are the means of what each neuron sees, [neurons, K]."""

    filters: torch.Tensor
    parts: tuple[Part, ...] = ()
    own: torch.Tensor | None = None
    intact: torch.Tensor | None = None


def target(filters: torch.Tensor, seen: Seen | None) -> Target:
    """The target of ``filters`` [neurons, K] on what they see."""
    if seen is None:
        return Target(filters)
    parts = [
        _part(filters[rows, block], rows, block, seen.own[number, :, block], answers)
        for (number, rows, block), answers in zip(_blocks(filters, seen.own), seen.intact.answers, strict=True)
    ]
    means = [side.repeat_interleave(len(filters) // len(seen.own), 0) for side in (seen.own.mean(1), seen.intact.mean)]
    return Target(filters, tuple(parts), *means)


def _blocks(filters: torch.Tensor, seen: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
    """The blocks in which ``filters`` [neurons, K] that are multiplied with ``seen`` [groups, columns, K] are rounded:
    the group, and its neurons and weights."""
    groups, columns, weights = seen.shape
    each, at_once = len(filters) // groups, weights if FEW * columns <= weights else MAX_BLOCK
    for number in range(groups):
        for start in range(0, weights, at_once):
            yield number, slice(number * each, (number + 1) * each), slice(start, min(start + at_once, weights))


def _part(filters: torch.Tensor, rows: slice, block: slice, own: torch.Tensor, answers: torch.Tensor) -> Part:
    """``wanted`` are the filters that give on ``own`` inputs [columns, K] the ``answers`` of ``filters`` on the intact
    ones, as nearly as least squares can, drawn a little towards ``filters``: earlier layers' coarseness is made up for
    before rounding adds to it (the objective of GPFQ and of Qronos, arXiv 2505.11695)."""
    curvature = Curvature.of(own)
    wanted = filters + curvature.solve(answers - own @ filters.T)
    return Part(rows, block, own, wanted, own.square().mean(0), curvature)


def coarse_layer(
    folded: Folded, tail: Mapping[str, torch.Tensor], choice: Choice, target: Target, shifts: bool
) -> CoarseLayer:
    """A layer in one representation; ``target`` is that of the folded filters.

    Where it is known what the layer sees the codes are GPTQ's; else each weight is rounded to its nearest level.
    ``tail`` are the tail's depthwise filters [neurons, ...] by name; ``shifts`` says whether the layer can have a shift
    at all.
    """
    return with_filters(rounded_filter(target, choice), folded, tail, target, shifts)


def with_filters(
    own: CoarseFilter, folded: Folded, tail: Mapping[str, torch.Tensor], target: Target, shifts: bool
) -> CoarseLayer:
    """A layer with its ``own`` filters, rounded: the shift makes up for what is left on average (bias correction) where
    it is known what the layer sees; other arguments as for :func:`coarse_layer`."""
    shift = folded.shift
    if target.own is not None and target.intact is not None and shifts:
        values = torch.from_numpy(own.values())
        shift = shift + (folded.filters * target.intact).sum(1) - (values * target.own).sum(1)
    eight = Choice(TAIL_REPRESENTATION)
    return CoarseLayer(
        own,
        # As of float16 filters, what is beyond float16 is cut off; what that costs is measured with the plan.
        shift.clamp(-LARGEST_SHIFT, LARGEST_SHIFT).numpy().astype(np.float16),
        {name: rounded_filter(Target(each.reshape(len(each), -1)), eight) for name, each in tail.items()},
    )


def rounded_filter(target: Target, choice: Choice) -> CoarseFilter:
    """The filters of a target in one representation: by GPTQ where it is known what they see, else to the nearest
    levels."""
    kind = choice.representation
    filters = target.filters
    neurons, weights = filters.shape
    if kind == "float16":
        values = filters.clamp(-65504.0, 65504.0).to(torch.float16)
        return CoarseFilter(kind, values.numpy(), np.empty((neurons, 0), np.float16), weights)
    group = min(choice.group or weights, weights)
    wanted, importance = filters.clone(), torch.ones_like(filters)
    for part in target.parts:
        wanted[part.rows, part.block] = part.wanted
        importance[part.rows, part.block] = part.importance
    groups = torch.arange(weights) // group

    def by_inputs(some: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The levels of some neurons (positions)."""
        levels = torch.empty(len(some), weights)
        for part in target.parts:
            here = (some >= part.rows.start) & (some < part.rows.stop)
            if here.any():
                of_part = part.wanted[some[here] - part.rows.start]
                levels[here, part.block] = gptq(of_part, part.curvature, scales[here], groups[part.block], kind)
        return levels

    if kind in CODED:
        return of_levels(*scales_and_levels(wanted, kind, by_inputs if target.parts else None), kind, weights)
    scales = best_scales(wanted, kind, group, importance)
    every = torch.arange(neurons)
    levels = by_inputs(every, scales) if target.parts else to_levels(filters, scales[:, groups], kind)
    return of_levels(scales, levels, kind, group)


def of_levels(scales: torch.Tensor, levels: torch.Tensor, kind: str, group: int) -> CoarseFilter:
    """The filters whose weights have these ``levels`` [neurons, K], ``scales`` [neurons, groups] apart."""
    codes = (levels - code_offset(kind)).to(torch.int8).numpy()
    return CoarseFilter(kind, codes, as_float16(scales).numpy().astype(np.float16), group)
