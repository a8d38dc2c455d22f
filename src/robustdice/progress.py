"""How long work tells whoever waits for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with the work done and the whole work, in the same unit."""

BAR_WIDTH = 40


def silent(_done: int, _total: int) -> None:
    """The progress of somebody who does not want to know."""


def part(of: Progress, first: float, last: float) -> Progress:
    """The progress of a part of some work, which goes on from the share ``first`` of it to ``last``."""
    return lambda done, total: of(round(1000 * (first + (last - first) * (done / total if total else 1.0))), 1000)


@contextmanager
def shown(what: str, show: bool, also: Progress = silent) -> Iterator[Progress]:
    """Progress that, with ``show``, draws a bar on standard error, and tells ``also``.

    The bar is one line that is written over: so it is one in a notebook, too, where nothing else moves.
    """
    if not show:
        yield also
        return
    last = ""

    def tell(done: int, total: int) -> None:
        nonlocal last
        share = done / total if total else 1.0
        line = f"\r{what} [{'#' * round(BAR_WIDTH * share):<{BAR_WIDTH}}] {share:4.0%}"
        if line != last:
            print(line, end="", file=sys.stderr, flush=True)
            last = line
        also(done, total)

    try:
        yield tell
    finally:
        print(file=sys.stderr, flush=True)
