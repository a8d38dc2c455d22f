"""Two things timed side by side, as METHODOLOGY.md asks for, and what is recorded with the result."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch


def seconds(work: Callable[[], object]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(first: Callable[[], object], second: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """Seconds of both in every round, after a warm-up of both; every other round the second begins."""
    first()
    second()
    found = []
    for number in range(rounds):
        if number % 2:
            b, a = seconds(second), seconds(first)
        else:
            a, b = seconds(first), seconds(second)
        found.append((a, b))
    return found


def record() -> str:
    """Commit, processor, memory, threads and versions."""
    here = Path(__file__).parent
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=here, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "numpy"))
    return (
        f"commit {commit or 'unknown'}; {processor}, {os.cpu_count()} cores, {memory:.0f} GiB; "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}"
    )
