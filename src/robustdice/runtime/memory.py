"""How much memory this process has resident, as Linux counts it; None elsewhere."""

from __future__ import annotations

import ctypes
from pathlib import Path


def rss_bytes() -> int | None:
    """What is resident now."""
    return _of_process("VmRSS:")


def peak_rss_bytes() -> int | None:
    """The most that has been resident.

    Not ``getrusage``: its maximum starts with that of the process that started this one.
    """
    return _of_process("VmHWM:")


def give_back() -> None:
    """Give freed memory back to the system, where the C library (glibc) otherwise keeps it: what loading models took is
    several times what they need."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _of_process(line: str) -> int | None:
    try:
        with Path("/proc/self/status").open(encoding="ascii") as file:
            return next(1024 * int(each.split()[1]) for each in file if each.startswith(line))
    except (OSError, StopIteration):
        return None
