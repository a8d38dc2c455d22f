"""A command that was called wrongly: what the parser of the command line says, as one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import typer

from robustdice.errors import RobustdiceError

UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])
"""click's, which some versions of typer depend on and others carry with them."""


def explain(error: Any) -> str:
    """What was wrong, and where it is described; ``error`` is a :data:`UsageError`."""
    path = getattr(error.ctx, "command_path", "robustdice")
    return f"{error.format_message().rstrip('.')}; see '{path} --help'"


def number(option: str, description: str, kind: type[int] | type[float] = int, least: float | None = None) -> Any:
    """An option that takes a number, ``least`` or more; anything else is a RobustdiceError in our words."""
    what = "a whole number" if kind is int else "a number"
    if least is not None:
        what += f", {least:g} or more"

    def parse(text: str) -> Any:
        try:
            found = kind(text)
        except ValueError:
            found = None
        if found is None or not math.isfinite(found) or (least is not None and found < least):
            raise RobustdiceError(f"{option} takes {what}, not {text!r}")
        return found

    return typer.Option(option, parser=parse, metavar="N", help=description)


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Shell completion for an option that takes one of a few words."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
