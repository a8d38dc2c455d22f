"""How long work tells whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the work done and the whole work, in the same unit."""


def silent(_done: int, _total: int) -> None:
    """The progress of somebody who does not want to know."""
