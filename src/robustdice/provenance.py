"""Where results come from: said beside them, and no part of what makes two of them the same."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, of this package and of ``packages``."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("robustdice", *packages)}}
