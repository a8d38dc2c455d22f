"""All benchmarks, one after the other: ``make bench``. METHODOLOGY.md says how they measure."""

from __future__ import annotations

import runpy
from pathlib import Path


def main() -> None:
    """Run every ``bench_*.py`` beside this file."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"--- {path.stem}", flush=True)
        runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
