"""Vector quantisation: so many weights of a filter at once become the vector of the codebook that costs least, and
later ones make up for it (GPTVQ, arXiv 2402.15319).

A filter has one scale: the root mean square of its weights, and then what fits the vectors that were found best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from robustdice.representation import VECTORS, CoarseFilter, codebook, packed_bytes
from robustdice.rounding.curvature import DAMPING, Curvature
from robustdice.rounding.scales import as_float16

AT_ONCE = 8
"""Vectors whose effect on all later ones is added up before it is applied."""


def round_vectors(wanted: torch.Tensor, parts: Sequence[tuple[slice, slice, torch.Tensor]], kind: str) -> CoarseFilter:
    """The filters that are ``wanted``, float32 [neurons, K], in vectors. ``parts`` are the inputs [n, columns] that
    some neurons (rows) see with some of their weights (columns, which begin with a vector): without, each vector is
    rounded to the nearest."""
    neurons, weights = wanted.shape
    size = VECTORS[kind]
    scales = as_float16(wanted.square().mean(1, keepdim=True).sqrt())
    codes = torch.zeros(neurons, packed_bytes(weights, kind), dtype=torch.int64)
    if not parts:
        codes = _nearest(wanted, scales, kind)
    for rows, columns, inputs in parts:
        of_part = _with_less_error(wanted[rows, columns], Curvature.of(inputs, size), scales[rows], kind)
        codes[rows, columns.start // size : columns.start // size + of_part.shape[1]] = of_part
    found = _vectors(codes, kind)[:, :weights]
    scales = as_float16(_fitting(wanted, found, parts))
    return CoarseFilter(kind, codes.to(torch.uint8).numpy(), scales.numpy().astype(np.float16), weights)


def _nearest(wanted: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """The rows of the codebook [neurons, vectors] that are nearest to the weights; what the last vector has beyond them
    does not count."""
    table = torch.from_numpy(codebook(kind).copy())
    found = [
        _cheapest(part / scales, table[:, : part.shape[1]], torch.ones(part.shape[1]))
        for part in torch.split(wanted, VECTORS[kind], 1)
    ]
    return torch.stack(found, 1)


def _with_less_error(weights: torch.Tensor, curvature: Curvature, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows of the codebook [neurons, vectors] with little error in what they give for inputs of this curvature."""
    size, table = VECTORS[kind], torch.from_numpy(codebook(kind).copy())
    left = weights[:, curvature.order].T.contiguous()
    codes = torch.empty(len(weights), packed_bytes(len(left), kind), dtype=torch.int64)
    carried = curvature.nothing(len(weights))
    for start in range(0, len(left), AT_ONCE * size):
        stop = min(start + AT_ONCE * size, len(left))
        block, inside = left[start:stop], curvature.inside(start, stop)
        block -= curvature.take(carried, start, stop)
        errors = torch.empty_like(block)
        for at in range(0, stop - start, size):
            end = min(at + size, stop - start)
            # What the columns of a vector are off by when each makes up for those before it.
            alone = torch.linalg.solve_triangular(inside[at:end, at:end], torch.eye(end - at), upper=True)
            entries = table[:, : end - at]
            best = _cheapest(
                block[at:end].T @ alone / scales, entries @ alone, curvature.weight(start + at, start + end)
            )
            errors[at:end] = alone.T @ (block[at:end] - (entries[best] * scales).T)
            block[end:].addmm_(inside[at:end, end:].T, errors[at:end], alpha=-1)
            codes[:, int(curvature.order[start + at]) // size] = best
        curvature.give(carried, errors, start, stop)
    return codes


def _cheapest(wanted: torch.Tensor, entries: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """For every neuron the number of the entry [entries, weights] that is nearest to what is wanted [neurons, weights]
    where squares of errors cost ``weight`` [weights]."""
    root = weight.sqrt()
    wide = entries * root
    return (wide.square().sum(1) - 2 * (wanted * root) @ wide.T).argmin(1)


def _vectors(codes: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(codebook(kind).copy())[codes].reshape(len(codes), -1)


def _fitting(
    wanted: torch.Tensor, found: torch.Tensor, parts: Sequence[tuple[slice, slice, torch.Tensor]]
) -> torch.Tensor:
    """The scales [neurons, 1] with which the vectors ``found`` [neurons, K] come nearest to what is wanted, for the
    inputs of the ``parts`` where there are any."""
    if not parts:
        return ((wanted * found).sum(1) / found.square().sum(1).clamp_min(1e-30))[:, None]
    both, squares = torch.zeros(len(wanted)), torch.zeros(len(wanted))
    for rows, columns, inputs in parts:
        filters, vectors = wanted[rows, columns].T, found[rows, columns].T
        should, have = inputs @ filters, inputs @ vectors
        ridge = len(inputs) * (DAMPING * inputs.square().mean() + 1e-12)  # where nothing was seen, the filters count
        both[rows] += ridge * (filters * vectors).sum(0)
        squares[rows] += ridge * vectors.square().sum(0)
        both[rows] += (should * have).sum(0)
        squares[rows] += have.square().sum(0)
    return (both / squares.clamp_min(1e-30))[:, None]
