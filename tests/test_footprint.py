"""What a device takes before it has read its bundle stays what README says: on disk and of memory."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement

INSTALLED_BYTES = 230e6
RESIDENT_BYTES = 75e6


def device_side() -> set[str]:
    """What ``pip install robustdice`` brings, without extras."""
    found, ahead = set[str](), ["robustdice"]
    while ahead:
        name = ahead.pop()
        found.add(name)
        requirements = map(Requirement, distribution(name).requires or ())
        wanted = {r.name.lower() for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
        ahead += sorted(wanted - found)
    return found


def test_what_a_device_installs_is_small_and_without_the_workshop() -> None:
    packages = device_side()
    assert {"numpy", "onnxruntime", "pyzmq", "pillow"} < packages
    assert not {"torch", "onnx", "scipy", "matplotlib"} & packages
    files = [file.locate() for name in packages for file in distribution(name).files or ()]
    assert sum(file.stat().st_size for file in files if file.is_file()) < INSTALLED_BYTES  # type: ignore[attr-defined]


def test_a_device_takes_little_memory_before_it_reads_its_bundle() -> None:
    code = """
import robustdice.runtime.device
from robustdice.runtime.memory import peak_rss_bytes
print(peak_rss_bytes())
"""
    command = [sys.executable, "-c", code]
    assert int(subprocess.run(command, capture_output=True, check=True).stdout) < RESIDENT_BYTES
