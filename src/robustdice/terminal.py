"""What the command line needs of a terminal: tables and JSON out, waiting shown, signals in."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from robustdice.progress import Progress as OnProgress

out = Console()
err = Console(stderr=True)


def log_to_stderr(formatter: logging.Formatter, level: int) -> None:
    """Send what the package logs, from ``level`` on, to standard error; in the place of where it went before."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    ours = logging.getLogger("robustdice")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(level)


def escape(text: str) -> str:
    """Text that is not to be read as markup."""
    return text.replace("[", r"\[")


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows that something is going on, where standard error is a terminal."""
    with err.status(f"{what} ..."):
        yield


@contextlib.contextmanager
def progress(what: str) -> Iterator[OnProgress]:
    """A bar that what is given moves, where standard error is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set, instead of ending the process."""
    stop = threading.Event()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def interrupt_on_sigterm() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that whatever was started is ended."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)
