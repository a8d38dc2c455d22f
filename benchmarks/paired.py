"""Two things timed side by side, as METHODOLOGY.md asks for, and what is recorded with the result."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
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


def spread(ratios: Sequence[float]) -> str:
    """The median, and the least and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


class Results:
    """What a benchmark prints; appended to a file too, if there is one, so that pieces of a long one add up."""

    def __init__(self, path: Path | None) -> None:
        """The machine and the commit come first, where they are not the file's last ones."""
        self._path = path
        kept = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        last = next((line for line in reversed(kept) if line.startswith("commit ")), None)
        if record() != last:
            self.say(record())

    def say(self, line: str) -> None:
        """A line."""
        print(line, flush=True)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
