"""The command line: parse, call one public function, print (tables for people, --json for programs)."""

from __future__ import annotations

import logging
import sys

# --help lists the commands in this order.
from robustdice.cli import model as _model  # isort: skip
from robustdice.cli import plan as _plan  # isort: skip
from robustdice.cli import evaluate as _evaluate  # isort: skip
from robustdice.cli import build as _build  # isort: skip
from robustdice.cli import reproduce as _reproduce  # isort: skip
from robustdice.cli import cluster as _cluster  # isort: skip
from robustdice.cli.app import app
from robustdice.errors import RobustdiceError
from robustdice.terminal import err, escape, log_to_stderr

__all__ = ["app", "main"]

_COMMANDS = (_model, _plan, _evaluate, _build, _reproduce, _cluster)
"""Modules whose import registers their commands."""


def main() -> None:
    """Run a command; errors of the project are one line on stderr and exit status 1."""
    log_to_stderr(logging.Formatter("warning: %(message)s"), logging.WARNING)
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
