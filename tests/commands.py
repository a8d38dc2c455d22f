"""Commands run as people and programs run them."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from robustdice.cli import main

COMMAND = [sys.executable, "-m", "robustdice"]


def run(
    *arguments: str | Path, status: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command that ends with ``status``: in this process, or with an ``environment`` beside this process's own in
    another one, which is slower by what importing PyTorch takes."""
    command = [*COMMAND, *map(str, arguments)]
    if environment is not None:
        env = {**os.environ, **environment}
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)
    else:
        result = _run_here(command)
    assert result.returncode == status, result.stdout + result.stderr
    return result


def _run_here(command: list[str]) -> subprocess.CompletedProcess[str]:
    out, err = io.StringIO(), io.StringIO()
    argv = ["robustdice", *command[len(COMMAND) :]]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log = logging.getLogger("robustdice")
    logged = log.handlers, log.propagate, log.level
    with mock.patch("sys.argv", argv), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main()
    for number, handler in handlers.items():  # commands that run until they are stopped set their own
        signal.signal(number, handler)
    log.handlers, log.propagate = logged[:2]  # commands log to what standard error is while they run
    log.setLevel(logged[2])
    return subprocess.CompletedProcess(command, int(ended.value.code or 0), out.getvalue(), err.getvalue())


def run_json(*arguments: str | Path) -> Any:
    """What a command prints with ``--json``."""
    return json.loads(run(*arguments, "--json").stdout)


def fails(*arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    """The error of a command: one line, no traceback, exit status 1."""
    stderr = run(*arguments, status=1, environment=environment).stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def without_workshop(directory: Path) -> dict[str, str]:
    """An environment for :func:`run` in which only the device side is installed; ``directory`` is made for it."""
    directory.mkdir()
    for name in ("torch", "torchvision", "onnx", "onnxscript", "sklearn", "timm", "distributed", "matplotlib"):
        (directory / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')")
    return {"PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}
