"""Does every dependency of the device side have a wheel for 64-bit ARM, for Python 3.10 to 3.13?

    python scripts/wheels.py [--machine aarch64] [--python 3.10 3.11 3.12 3.13]

pip resolves what pyproject.toml asks for, and what that asks for, as it would on such a machine, with wheels alone. It
asks the package index, and is not run with the other tests; the exit status is 1 when something has no wheel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)
"""The minor versions of glibc that wheels are made for and JetPack 6 (Ubuntu 22.04, 2.35) and Raspberry Pi OS have."""


def device_side(python: str) -> list[str]:
    """What a device installs with that Python."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    here = {key: str(value) for key, value in default_environment().items()}
    environment = here | {"python_version": python, "python_full_version": f"{python}.0"}
    requirements = map(Requirement, lines)
    return [f"{r.name}{r.specifier}" for r in requirements if r.marker is None or r.marker.evaluate(environment)]


def wheels(machine: str, python: str) -> dict[str, str]:
    """The version of each package that pip would install; SystemExit with what pip says when one has no wheel."""
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC] + [
        f"--platform=manylinux2014_{machine}"
    ]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report"]
        command += [str(report), "--only-binary=:all:", "--target", directory, "--implementation=cp"]
        command += [f"--python-version={python}", *platforms, *device_side(python)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise SystemExit(f"Python {python} on {machine}: {done.stderr.strip()}")
        found = json.loads(report.read_text())["install"]
    return {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in found}


def main() -> None:
    """Ask, and print a table of versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="aarch64")
    parser.add_argument("--python", nargs="+", default=["3.10", "3.11", "3.12", "3.13"])
    options = parser.parse_args()
    found = {python: wheels(options.machine, python) for python in options.python}
    names = sorted({name for versions in found.values() for name in versions})
    print(f"| wheels for {options.machine} | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for name in names:
        print(f"| {name} | {' | '.join(versions.get(name, '') for versions in found.values())} |")


if __name__ == "__main__":
    main()
