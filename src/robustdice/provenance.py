"""Where results come from: said beside them, and no part of what makes two of them the same."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, of this package and of ``packages``."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("robustdice", *packages)}}


def commit() -> str | None:
    """The commit of this package where it runs from a git checkout, with ``-dirty`` when files were changed since."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # Installed packages may lie in a checkout of something else.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)  # noqa: S603
        found = subprocess.run(  # noqa: S603
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(iter(filter(None, names)), platform.processor() or platform.machine())
