"""What the command line needs of a terminal: text and JSON out, waiting shown, signals in."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from robustdice.progress import Progress as OnProgress

JSON_VERSION = 1
"""Of the documents that ``--json`` prints (docs/formats.md)."""
FULL_WIDTH = 100_000
"""Columns of what is no terminal: nothing is folded or cut on its way into a file or another program."""
SPEAK_EVERY_SECONDS = 10.0
"""So often long work says on a pipe how far it is."""


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() else FULL_WIDTH
    return Console(stderr=stream is sys.stderr, width=width, markup=False, highlight=False)


out, err = _console(sys.stdout), _console(sys.stderr)


def log_to_stderr(formatter: logging.Formatter, level: int) -> None:
    """Send what the package logs, from ``level`` on, to standard error; in the place of where it went before."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    ours = logging.getLogger("robustdice")
    ours.handlers = [handler]
    ours.setLevel(level)


def print_error(text: str) -> None:
    """``error: text`` on standard error."""
    err.print(Text("error: ", style="bold red") + Text(text, style="not bold"), soft_wrap=True)


def close_output(status: int | None) -> int:
    """Write what standard output still holds; the exit ``status``, which is 1 where that fails and was 0 before."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not status:
            print_error(f"cannot write to standard output: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again as it ends
        return status or 1
    return status or 0


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on standard output, with the version of what its keys mean."""
    print(json.dumps({"version": JSON_VERSION, **document}, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows that something is going on: a spinner on a terminal, a line now and then elsewhere."""
    if err.file.isatty():
        with err.status(f"{what} ..."):
            yield
    else:
        with _now_and_then(lambda: what):
            yield


@contextlib.contextmanager
def progress(what: str) -> Iterator[OnProgress]:
    """How far something is, by what the given function is told: a bar on a terminal, a line now and then elsewhere."""
    if err.file.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        percent = ""

        def update(done: int, total: int) -> None:
            nonlocal percent
            percent = f", {100 * done / max(total, 1):.0f} %"

        with _now_and_then(lambda: f"{what}{percent}"):
            yield update


@contextlib.contextmanager
def _now_and_then(line: Callable[[], str]) -> Iterator[None]:
    start, over = time.monotonic(), threading.Event()

    def speak() -> None:
        while not over.wait(SPEAK_EVERY_SECONDS):
            err.print(f"{line()}, {time.monotonic() - start:.0f} s ...")

    thread = threading.Thread(target=speak, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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
