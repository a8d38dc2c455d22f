"""What a device takes before it has read its bundle stays what README says: on disk, of time and of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement

INSTALLED_BYTES = 230e6
START_SECONDS = 1.5
"""Of processor time, half of it what other work on the machine may add."""
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


def test_a_device_starts_at_once_and_takes_little_before_it_reads_its_bundle() -> None:
    code = """
import json, time
import robustdice.runtime.device
from robustdice.runtime.memory import peak_rss_bytes
print(json.dumps([time.process_time(), peak_rss_bytes()]))
"""
    command = [sys.executable, "-c", code]
    seconds, resident = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert seconds < START_SECONDS
    assert resident < RESIDENT_BYTES
