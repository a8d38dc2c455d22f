"""What a device takes to unpack weights, by representation: on one thread, as before each run of a model."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.parts import Affine, Coarse, Filter, Part
from robustdice.entropy_code import CODED, lengths, meanings
from robustdice.representation import REPRESENTATIONS, SCALE_BYTES, code_range, pack
from robustdice.runtime.weights import Weights

NEURONS, FILTER_WEIGHTS = 228, 1152
"""Of the filters that are unpacked together: a megabyte of float32, as much as devices unpack at a time."""
ROUNDS = 20


def measure_unpacking() -> dict[str, float]:
    """Seconds for a weight in each representation but float32: medians of some rounds, in each of which all are
    unpacked once, so that none lies in the processor's cache."""
    every = {kind: _filters(kind) for kind in REPRESENTATIONS if kind != "float32"}
    taken: dict[str, list[float]] = {kind: [] for kind in every}
    for number in range(ROUNDS + 1):
        for kind, (weights, part) in every.items():
            before = time.thread_time()
            weights.filters(part)
            if number:  # the first time tables are made
                taken[kind].append(time.thread_time() - before)
    return {kind: median(each) / (NEURONS * FILTER_WEIGHTS) for kind, each in taken.items()}


def _filters(kind: str) -> tuple[Weights, Part]:
    """Filters as a bundle has them, and the part that reads them."""
    content = _packed(kind).tobytes() + bytes(SCALE_BYTES * NEURONS)
    own = Filter("filters", kind, (FILTER_WEIGHTS,), FILTER_WEIGHTS, 0)
    coarse = Coarse((own,), scales=None, factor=1.0, rounded=False, shift=None, at_once=NEURONS, axis=1)
    return Weights(content), Part("", (), (), affine=(Affine("scale", "shift", NEURONS, (), coarse),))


def _packed(kind: str) -> NDArray[Any]:
    """As in the file: bytes [neurons, bytes], or float16 and int8 [neurons, weights]."""
    codes = _codes(kind)
    if kind == "float16":
        return codes.astype("<f2")
    return codes if kind == "int8" else pack(codes, kind)


def _codes(kind: str) -> NDArray[Any]:
    """Of all weights [neurons, weights]: what they are in float16, whole numbers in others."""
    random, size = np.random.default_rng(0), (NEURONS, FILTER_WEIGHTS)
    if kind == "float16":
        return random.standard_normal(size).astype(np.float16)
    if kind in CODED:
        return _levels(kind)
    low, high = code_range(kind)
    return random.integers(low, high + 1, size, dtype=np.int8)


def _levels(kind: str) -> NDArray[np.int8]:
    """Levels [neurons, weights] whose symbols come as often as their code has it, as long as there is room; then
    zeros."""
    code, each = CODED[kind], lengths(kind)
    often = 0.5 ** each[: code.symbols]
    drawn = np.random.default_rng(0).choice(
        code.symbols, (NEURONS, code.symbols_of(FILTER_WEIGHTS)), p=often / often.sum()
    )
    more = np.cumsum(each[drawn] - each[code.zero], 1)
    drawn[more > code.room(FILTER_WEIGHTS) - drawn.shape[1] * each[code.zero]] = code.zero
    return meanings(kind)[drawn].reshape(NEURONS, -1)[:, :FILTER_WEIGHTS]
