"""Commands run as people and programs run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from robustdice.cli import main

COMMAND = [sys.executable, "-m", "robustdice"]


def run(
    *arguments: str | Path, status: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command that ends with ``status``, with ``environment`` beside this process's own."""
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **(environment or {})},
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result


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


def called(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command that runs in this process."""
    with mock.patch("sys.argv", ["robustdice", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), *capsys.readouterr()
