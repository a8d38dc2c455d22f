"""Installs the lowest versions that pyproject.toml allows on a device, and runs the device side with them.

    python scripts/minimum_versions.py [--python python3.10] [--latest] [--keep DIR]

A build of the digits network is made here, with the workshop; a fresh virtual environment then gets this package with
every dependency at its minimum, starts the devices, asks them, and runs the tests that need no workshop. A range in
pyproject.toml is true when this passes; it is run when one changes, and not with the other tests: it needs a package
index. The minimums have wheels for Python 3.10 to 3.12; ``--latest`` takes what pip takes, for newer ones.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_plan.py", "test_representation.py", "test_importance_values.py", "test_distribute.py", "test_cluster.py")
"""Those of the device side and of partitioning that need neither PyTorch nor a build made by a test."""
TOOLS = ("pytest", "pytest-timeout", "hypothesis")

BUILD = """
import sys
import robustdice as rd
network = rd.load_model("robustdice.demo.network:digits_cnn")
images = rd.load_data("digits", network.preprocessing, network.outputs).sample(20)
rd.build(network, rd.partition(network, rd.score(network, images, columns=("s1",)), devices=3, memory=0.6), sys.argv[1])
import numpy as np
np.savez(sys.argv[2], images=images.images(), labels=images.labels)
"""

RUN = """
import sys
import numpy as np
import robustdice as rd
import robustdice.cli
assert not {"torch", "onnx", "matplotlib"} & set(sys.modules)
known = np.load(sys.argv[2])
with rd.LocalCluster(sys.argv[1]) as cluster:
    answers = [cluster.infer(image) for image in known["images"]]
right = sum(int(a.probabilities.argmax()) == label for a, label in zip(answers, known["labels"]))
assert all(a.coverage == 1 for a in answers), [a.coverage for a in answers]
assert right >= 0.9 * len(answers), right
print(f"{right} of {len(answers)} images answered rightly, all with full coverage")
"""


def minimums(project: Path) -> list[str]:
    """The dependencies of the device side, each pinned to the lowest version that its range allows."""
    with project.open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    pinned = []
    for line in dependencies:
        requirement = Requirement(line)
        lowest = re.search(r">=\s*([\w.]+)", str(requirement.specifier))
        if lowest is None:
            raise SystemExit(f"{line} in {project} says no minimum; expected one, as in 'numpy>=1.26'")
        marker = f" ; {requirement.marker}" if requirement.marker else ""
        pinned.append(f"{requirement.name}=={lowest[1]}{marker}")
    return pinned


def main() -> None:
    """Run it; the exit status says whether the ranges are true."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to try")
    parser.add_argument("--latest", action="store_true", help="the newest versions instead of the lowest")
    parser.add_argument("--keep", type=Path, help="make the environment there, and leave it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        environment = arguments.keep or work / "environment"
        build, known = work / "build", work / "known.npz"
        _run(sys.executable, "-c", BUILD, build, known)
        _run(arguments.python, "-m", "venv", environment)
        python = environment / "bin" / "python"
        pinned = [] if arguments.latest else minimums(ROOT / "pyproject.toml")
        _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", ROOT, *pinned, *TOOLS)
        _run(python, "-m", "pip", "check")
        _run(python, "-c", RUN, build, known, cwd=work)
        _run(python, "-m", "robustdice", "--help", cwd=work, quiet=True)
        tests = [ROOT / "tests" / name for name in TESTS]
        _run(python, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", *tests, cwd=work)
        print("These versions do: " + (", ".join(pinned) or "the newest"))


def _run(*command: str | Path, cwd: Path | None = None, quiet: bool = False) -> None:
    print("+", " ".join(str(word).split("\n", 1)[0] or "CODE" for word in command), flush=True)
    output = subprocess.DEVNULL if quiet else None
    found = subprocess.run([str(word) for word in command], check=False, cwd=cwd, stdout=output)  # noqa: S603
    if found.returncode:
        raise SystemExit(f"failed with status {found.returncode}: {' '.join(map(str, command[:4]))} ...")


if __name__ == "__main__":
    main()
