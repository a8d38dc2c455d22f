"""Levels for entropy-coded filters: as fine as their code has room for.

What a filter's code takes falls as its scale grows; so the scale is what is looked for, and the few bits that are still
too many or too few then are moved one level at a time, where it costs least.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.entropy_code import AT_ONCE, CODED, STEP, excess, lengths, over, symbols
from robustdice.rounding.scales import as_float16, to_levels

TIMES = 4
"""How often scales are corrected, each time only those of filters that are still off."""
CLOSE = 0.01
"""Of a filter's bits: so close needs no other scale."""
SOME = 64
"""Filters that say by how much scales differ for levels by what the layer sees, as these take long to find."""
NARROW, OTHERS = 64, (0.5, 0.65, 0.8, 0.9, 1.1, 1.3)
"""Of filters of so few weights the bits jump as scales grow, and so these are tried too."""
ROUNDS = 20
"""So often levels are moved until they fit; those that do not fit then are made zero, the smallest first."""
CANDIDATES = 2048
"""Symbols of a filter that are looked at for that, at most about twice as many."""
SLOPE = 0.8
"""Bits of a weight that twice its scale saves, about."""

Levels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of some neurons (positions) and their scales [neurons, 1], the levels [neurons, K]."""


def scales_and_levels(
    wanted: torch.Tensor, kind: str, by_inputs: Levels | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the filters that are ``wanted``, float32 [neurons, K], scales [neurons, 1] and levels [neurons, K] that fill
    what their code has room for: the nearest ones, or those ``by_inputs``."""
    usual = wanted.square().mean(1, keepdim=True).sqrt() * 4 / 2 ** CODED[kind].bits
    scales = as_float16(usual)
    least = torch.minimum(wanted.abs().amax(1, keepdim=True) / CODED[kind].largest, usual)  # clips little
    every = torch.arange(len(wanted))

    def nearest(some: torch.Tensor, of_some: torch.Tensor) -> torch.Tensor:
        return to_levels(wanted[some], of_some, kind)

    scales, levels = _corrected(every, scales, least, kind, nearest)
    if by_inputs is not None:
        some = every[:: -(-len(every) // SOME)] if len(every) else every
        of_some, _ = _corrected(some, scales[some], least[some], kind, by_inputs)
        scales = as_float16(torch.maximum(scales * (of_some / scales[some]).median(), least)) if len(some) else scales
        scales, levels = _corrected(every, scales, least, kind, by_inputs)
    levels = fitting(levels, wanted / scales, kind)
    narrow = wanted.shape[1] <= NARROW
    rows = every if narrow else torch.nonzero((levels == 0).all(1) & (wanted != 0).any(1))[:, 0]
    for factor in OTHERS if len(rows) else ():
        tried = as_float16(scales[rows] * factor)
        found = fitting((by_inputs or nearest)(rows, tried), wanted[rows] / tried, kind)
        better = _away(found, tried, wanted[rows]) < _away(levels[rows], scales[rows], wanted[rows])
        levels[rows[better]], scales[rows[better]] = found[better], tried[better]
    return scales, levels


def _away(levels: torch.Tensor, scales: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (levels * scales - wanted).square().sum(1)


def _corrected(
    neurons: torch.Tensor, scales: torch.Tensor, least: torch.Tensor, kind: str, find: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, not below the ``least``, and levels of some neurons that take about as many bits as there is room for."""
    scales, levels = scales.clone(), find(neurons, scales)
    weights = levels.shape[1]
    for _ in range(TIMES):
        off = over(levels.numpy().astype(np.int8), kind)
        factor = torch.from_numpy(2 ** np.clip(off / (SLOPE * weights), -1, 1)).to(torch.float32)[:, None]
        better = as_float16(torch.maximum(scales * factor, least))
        close = torch.from_numpy(np.abs(off) <= max(STEP, CLOSE * CODED[kind].room(weights)))
        rows = torch.nonzero(~close & (better != scales)[:, 0])[:, 0]
        if not len(rows):
            break
        scales[rows] = better[rows]
        levels[rows] = find(neurons[rows], better[rows])
    return scales, levels


def fitting(levels: torch.Tensor, exact: torch.Tensor, kind: str) -> torch.Tensor:
    """The ``levels`` [neurons, K], some of them moved, so that every filter's code fills its room; those whose squared
    distance from the ``exact`` ones grows least for a bit."""
    found, goal = levels.numpy().astype(np.int8), exact.numpy()
    off = excess(found, kind)
    at_once = max(1, AT_ONCE // max(1, found.shape[1]))
    for number in range(ROUNDS):
        rows = np.flatnonzero(off)
        for some in (rows[start : start + at_once] for start in range(0, len(rows), at_once)):
            found[some] = _moved(found[some], goal[some], off[some], kind, number)
            off[some] = excess(found[some], kind)
    for row in np.flatnonzero(off):
        found[row] = _with_zeros(found[row], kind)
    return torch.from_numpy(found).to(levels.dtype)


def _with_zeros(levels: NDArray[np.int8], kind: str) -> NDArray[np.int8]:
    """Levels [K] of which the smallest ones are made zero, as few as it takes: these take fewest bits, and as many as
    there is room for."""
    order = np.abs(levels).argsort(kind="stable")

    def without(count: int) -> NDArray[np.int8]:
        found = levels.copy()
        found[order[:count]] = 0
        return found

    return without(bisect_left(range(len(levels)), True, key=lambda n: not excess(without(n)[None], kind)[0]))


def _moved(
    levels: NDArray[np.int8], exact: NDArray[np.float32], off: NDArray[np.int64], kind: str, number: int
) -> NDArray[np.int8]:
    """Levels of which just as many are moved as makes up for what is ``off``, no two of one symbol; of very many
    symbols, some are looked at, others in each round of this ``number``."""
    code, each = CODED[kind], lengths(kind)
    weights = levels.shape[1]
    step = max(1, code.symbols_of(weights) // CANDIDATES)
    every = np.arange(number % step, code.symbols_of(weights), step)
    now = symbols(levels, kind)[:, every].astype(np.int64)
    best = np.full(now.shape, np.inf)
    gains, columns, moves = np.zeros((3, *now.shape), np.int64)
    for place, by in product(range(code.together), (-2, -1, 1, 2, None)):
        at = np.minimum(code.together * every + place, weights - 1)
        old, wanted = levels[:, at].astype(np.int64), exact[:, at]
        move = -old if by is None else np.full(old.shape, by)  # None: to zero
        allowed = (np.abs(old + move) <= code.largest) & (code.together * every + place < weights)
        then = np.where(allowed, now + move * code.places[place], 0)
        gain = np.where(allowed, each[now] - each[then], 0) * np.sign(off)[:, None]
        cost = (old + move - wanted) ** 2 - (old - wanted) ** 2 + 1e-9
        price = np.divide(cost, gain, out=np.full(now.shape, np.inf), where=gain > 0)
        better = price < best
        best[better], gains[better], moves[better] = price[better], gain[better], move[better]
        columns[better] = np.broadcast_to(at, now.shape)[better]
    order = np.argsort(best, 1, kind="stable")
    sorted_gains = np.take_along_axis(gains, order, 1)
    before = np.cumsum(sorted_gains, 1) - sorted_gains
    rows, places = np.nonzero((before < np.abs(off)[:, None]) & (sorted_gains > 0))
    chosen = order[rows, places]
    found = levels.copy()
    found[rows, columns[rows, chosen]] += moves[rows, chosen].astype(np.int8)
    return found
