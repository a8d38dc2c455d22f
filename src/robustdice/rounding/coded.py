"""Levels for entropy-coded filters: as fine as their code has room for.

What a filter's code takes falls as its scale grows; so the scale is what is looked for, and the few bits that are still
too many or too few then are moved one level at a time, where it costs least.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.entropy_code import CODED, STEP, excess, lengths, over, symbols
from robustdice.rounding.scales import as_float16, to_levels

FIRST, THEN = 4, 3
"""How often scales are corrected: for the nearest levels, and then for levels by what the layer sees."""
CLOSE = 0.01
"""Of a filter's bits: so close needs no other scale."""
ROUNDS = 20
"""So often levels are moved until they fit; those that do not fit then are made zero, the smallest first."""
SLOPE = 0.8
"""Bits of a weight that twice its scale saves, about."""

Levels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of some neurons (positions) and their scales [neurons, 1], the levels [neurons, K]."""


def scales_and_levels(
    wanted: torch.Tensor, kind: str, by_inputs: Levels | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the filters that are ``wanted``, float32 [neurons, K], scales [neurons, 1] and levels [neurons, K] that fill
    what their code has room for: the nearest ones, or those ``by_inputs``."""
    weights = wanted.shape[1]
    spread = wanted.square().mean(1, keepdim=True).sqrt()
    usual = spread * 4 / 2 ** CODED[kind].bits
    least = torch.minimum(wanted.abs().amax(1, keepdim=True) / CODED[kind].largest, usual)  # clips little
    scales = as_float16(usual)
    levels = to_levels(wanted, scales, kind)

    def nearest(some: torch.Tensor, of_some: torch.Tensor) -> torch.Tensor:
        return to_levels(wanted[some], of_some, kind)

    for times, find in ((FIRST, nearest), *(() if by_inputs is None else ((THEN, by_inputs),))):
        every = torch.arange(len(wanted))
        levels = find(every, scales)
        for _ in range(times):
            off = over(levels.numpy().astype(np.int8), kind)
            rows = np.flatnonzero(np.abs(off) > max(STEP, CLOSE * CODED[kind].room(weights)))
            if not len(rows):
                break
            some = torch.from_numpy(rows)
            factor = torch.from_numpy(2 ** np.clip(off[rows] / (SLOPE * weights), -1, 1)).to(torch.float32)
            scales[some] = as_float16(torch.maximum(scales[some] * factor[:, None], least[some]))
            levels[some] = find(some, scales[some])
    return scales, fitting(levels, wanted / scales, kind)


def fitting(levels: torch.Tensor, exact: torch.Tensor, kind: str) -> torch.Tensor:
    """The ``levels`` [neurons, K], some of them moved by one, so that every filter's code fills its room; those whose
    squared distance from the ``exact`` ones grows least for a bit."""
    found, goal = levels.numpy().astype(np.int8), exact.numpy()
    off = excess(found, kind)
    for _ in range(ROUNDS):
        if not len(rows := np.flatnonzero(off)):
            break
        found[rows] = _moved(found[rows].astype(np.int64), goal[rows], off[rows], kind)
        off[rows] = excess(found[rows], kind)
    for row in np.flatnonzero(off):
        for weight in np.abs(found[row]).argsort():  # that of zeros alone is filled up with longer symbols for them
            found[row, weight] = 0
            if not excess(found[row : row + 1], kind)[0]:
                break
    return torch.from_numpy(found).to(levels.dtype)


def _moved(
    levels: NDArray[np.int64], exact: NDArray[np.float32], off: NDArray[np.int64], kind: str
) -> NDArray[np.int64]:
    """Levels of which just as many are moved as makes up for what is ``off``, no two of one symbol."""
    code, each = CODED[kind], lengths(kind)
    neurons, weights = levels.shape
    now = symbols(levels, kind).astype(np.int64)
    at = np.arange(weights) // code.together
    best = np.full((neurons, weights), np.inf)
    gains, moves = np.zeros((2, neurons, weights), np.int64)
    for move in (-1, 1):
        allowed = np.abs(levels + move) <= code.largest
        then = now[:, at] + move * code.places[np.arange(weights) % code.together]
        saved = np.where(allowed, each[now[:, at]] - each[np.where(allowed, then, 0)], 0) * np.sign(off)[:, None]
        cost = (levels + move - exact) ** 2 - (levels - exact) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(saved > 0, (cost + 1e-9) / saved, np.inf)
        better = price < best
        best, gains, moves = (np.where(better, new, old) for new, old in ((price, best), (saved, gains), (move, moves)))
    order = np.argsort(best, 1, kind="stable")
    taken = np.zeros_like(levels)
    for row in range(neurons):
        left, used = abs(int(off[row])), set()
        for weight in order[row]:
            if left <= 0 or not np.isfinite(best[row, weight]):
                break
            if at[weight] not in used:
                used.add(at[weight])
                taken[row, weight] = moves[row, weight]
                left -= int(gains[row, weight])
    return levels + taken
