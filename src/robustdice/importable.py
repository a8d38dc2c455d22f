"""Modules of the user's own, named on the command line: found in the directory that it is called from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def importable_from_here() -> Iterator[None]:
    """Modules in the current directory can be imported, as 'python -c' can."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)
