"""The command line: parse, call one public function, print (tables for people, --json for programs)."""

from __future__ import annotations

import logging
import sys

# --help lists the commands in this order.
from robustdice.cli import model as _model  # isort: skip
from robustdice.cli import plan as _plan  # isort: skip
from robustdice.cli import calibrate as _calibrate  # isort: skip
from robustdice.cli import evaluate as _evaluate  # isort: skip
from robustdice.cli import build as _build  # isort: skip
from robustdice.cli import reproduce as _reproduce  # isort: skip
from robustdice.cli import cluster as _cluster  # isort: skip
from robustdice.cli.app import app
from robustdice.cli.usage import UsageError, explain
from robustdice.errors import RobustdiceError, workshop_missing
from robustdice.terminal import close_output, err, log_to_stderr, print_error

__all__ = ["app", "main"]

_COMMANDS = (_model, _plan, _calibrate, _evaluate, _build, _reproduce, _cluster)
"""Modules whose import registers their commands."""


def main() -> None:
    """Run a command. Errors of the project are one line on stderr and exit status 1; wrong calls have status 2."""
    log_to_stderr(logging.Formatter("warning: %(message)s"), logging.WARNING)
    try:
        status = app(prog_name="robustdice", standalone_mode=False)
    except UsageError as error:
        print_error(explain(error))
        status = 2
    except RobustdiceError as error:
        print_error(str(error))
        status = 1
    except ModuleNotFoundError as error:
        if (missing := workshop_missing(error)) is None:
            raise
        print_error(str(missing))
        status = 1
    except KeyboardInterrupt:
        err.print("interrupted")
        status = 130
    except BrokenPipeError:
        status = 141
    except OSError as error:  # of files of ours there are errors of our own: mostly what is left is standard output
        where = "cannot write to standard output" if error.filename is None else error.filename
        print_error(f"{where}: {error.strerror}")
        status = 1
    sys.exit(close_output(status))
