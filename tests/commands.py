"""Commands run as people and programs run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from robustdice.cli import main; main()"]


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
