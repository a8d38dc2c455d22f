"""Make the codes of entropy-coded copies (:mod:`robustdice.entropy_code`).

    python scripts/huffman_codes.py

Those that are there are part of the format of plans and bundles: what this writes on another machine may differ, and is
to be thrown away.
"""

from __future__ import annotations

from math import gamma
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustdice.entropy_code import CODED, END, PADS, STEP, Code

SHAPE = 1.5
"""Weights of a filter are taken to have a generalised normal distribution, between Laplace's (1) and Gauss's (2)."""
REST = 7
"""What fills up a byte and the end of a block together take what one symbol of this length would."""


def probabilities(step: float, code: Code) -> NDArray[np.float64]:
    """Of all levels, ``step`` apart, for weights with a root mean square of one."""
    width = (gamma(1 / SHAPE) / gamma(3 / SHAPE)) ** 0.5
    weights = np.linspace(-40, 40, 80_001)
    density = np.exp(-((np.abs(weights) / width) ** SHAPE))
    levels = np.rint(weights / step).clip(-code.largest, code.largest)
    found = np.bincount(levels.astype(int) + code.largest, density / density.sum(), minlength=2 * code.largest + 1)
    return found.astype(np.float64)


def lengths_for(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """The lengths, up to ``END``, of a good code that leaves room for what fills up and for other symbols for zeros,
    which together take what one symbol would that is ``STEP`` - 1 longer than that for zeros, the one in the middle."""
    ideal = -np.log2(np.maximum(weights / weights.sum(), 1e-12))

    def left(found: NDArray[np.int64]) -> int:
        taken = int((1 << (END - found)).sum())
        return (1 << END) - taken - (1 << (END - REST)) - (1 << (END - int(found[len(found) // 2]) - STEP + 1))

    found: NDArray[np.int64]
    for slack in np.arange(-1, 1, 0.01):
        found = np.clip(np.rint(ideal + slack), 1, END).astype(np.int64)
        if left(found) >= 0:
            break
    while room := left(found):
        gain = np.where((1 << (END - found)) <= room, weights * 2.0**found, -1)
        gain[[len(found) // 2, *np.flatnonzero(found == 1)]] = -1
        if gain.max() < 0:
            raise ValueError(f"{room} units of room are left: {found}")
        found[gain.argmax()] -= 1
    return found


def lengths_of(code: Code) -> NDArray[np.uint8]:
    """For each byte the length of its code, such that a weight takes as many bits as it may; 0 for bytes unused."""
    low, high = 3 / 2**code.bits, 6 / 2**code.bits
    for _ in range(16):
        step = (low * high) ** 0.5
        one = probabilities(step, code)
        joint = one
        for _ in range(code.together - 1):
            joint = np.multiply.outer(joint, one).ravel()
        lengths = lengths_for(joint)
        taken = float(joint @ lengths) / code.together
        low, high = (step, high) if taken > code.bits else (low, step)
    found = np.zeros(256, np.uint8)
    every = [*lengths, *PADS, *range(int(lengths[len(lengths) // 2]) + STEP, END + 1), END]
    found[: len(every)] = every
    return found


def main() -> None:
    """Write them all."""
    folder = Path(__file__).parents[1] / "src" / "robustdice" / "codes"
    folder.mkdir(exist_ok=True)
    for name, code in CODED.items():
        (folder / f"{name}.bin").write_bytes(lengths_of(code).tobytes())


if __name__ == "__main__":
    main()
