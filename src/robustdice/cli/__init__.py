"""The command line: parse, call one public function, print (tables for people, --json for programs)."""

from __future__ import annotations

import sys

from robustdice.cli import workshop as _workshop  # first: --help lists the commands in this order

from robustdice.cli import cluster as _cluster  # isort: skip
from robustdice.cli.app import app
from robustdice.errors import RobustdiceError
from robustdice.terminal import err, escape

__all__ = ["app", "main"]

_COMMANDS = (_workshop, _cluster)
"""Modules whose import registers their commands."""


def main() -> None:
    """Run a command; errors of the project are one line on stderr and exit status 1."""
    try:
        app()
    except RobustdiceError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
