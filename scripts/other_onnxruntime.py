"""Installs other builds or versions of ONNX Runtime beside the one that is installed, and runs the bundle tests there.

    python scripts/other_onnxruntime.py onnxruntime==1.23.2 onnxruntime-openvino [--tests tests/test_bundles.py ...]

Each goes to a directory of its own, ``build/NAME``, which takes precedence over what is installed while the tests run
with it; so nothing that is installed changes. With ``onnxruntime-openvino`` there, ``tests/test_providers.py`` tries
that provider on the real thing from then on. It needs a package index, and is not run with the other tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("bundles", "bundle_read", "coarse_bundles", "activations", "pair_bundles", "strips", "providers")
"""What runs bundles, without the slow ones."""


def main() -> None:
    """Run it; the exit status says whether all tests pass with all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", help="as pip takes them, such as onnxruntime==1.23.2")
    parser.add_argument("--tests", nargs="*", default=[str(ROOT / "tests" / f"test_{name}.py") for name in TESTS])
    arguments = parser.parse_args()
    failed = [package for package in arguments.packages if not _passes(package, arguments.tests)]
    if failed:
        raise SystemExit(f"the bundle tests fail with {', '.join(failed)}")


def _passes(package: str, tests: list[str]) -> bool:
    target = ROOT / "build" / package
    if not target.exists():
        _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), package)
    paths = os.pathsep.join([str(target), str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths}
    _run(sys.executable, "-c", "import onnxruntime as o; print(o.__version__, o.__file__)", environment=environment)
    return not tests or _run(
        sys.executable, "-m", "pytest", "-q", "-m", "not slow", *tests, environment=environment, check=False
    )


def _run(*command: str, environment: dict[str, str] | None = None, check: bool = True) -> bool:
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, check=check, cwd=ROOT, env=environment).returncode == 0  # noqa: S603


if __name__ == "__main__":
    main()
