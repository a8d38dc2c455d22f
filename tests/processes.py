"""Single device processes, started as somebody wants them, and what tests wait for and compare."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.runtime.client import Client
from robustdice.runtime.inprocess import InProcess
from robustdice.runtime.wire.config import CLUSTER_NAME

NOTHING: Mapping[int, Callable[[], object]] = {}


@contextlib.contextmanager
def device(directory: Path, number: int, *prefix: str, cluster: Path | None = None, log: str = "log") -> Iterator[int]:
    """A device process, started by the words of ``prefix``; its id."""
    command = [*prefix, sys.executable, "-m", "robustdice.runtime.device", str(directory / f"device-{number}")]
    command += ["--cluster", str(cluster or directory / CLUSTER_NAME), "--watch-stdin"]
    with (directory / log).open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=output)
        try:
            yield process.pid
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:  # one that others leave next to no time
                process.kill()
                process.communicate()


def until_up(client: Client, devices: list[int], by: Sequence[int] = (0,)) -> None:
    """Until each of ``by`` sees these. Frames are sent: who was suspect has to show that it keeps up."""
    end = time.monotonic() + 60.0
    while True:
        status = client.status(0.5)
        if all(status.get(each, {}).get("up") == devices for each in by):
            return
        if status:
            client.infer(np.zeros(client.model.input_shape, np.float32))
        assert time.monotonic() < end, f"devices {devices} do not see each other"


def whole_and_right(
    client: Client,
    reference: InProcess,
    frames: NDArray[np.float32],
    meanwhile: Mapping[int, Callable[[], object]] = NOTHING,
) -> bool:
    """Every answer has full coverage, and is what the bundles give. ``meanwhile``: what is done after so many."""
    expected, right = reference.run(frames), True
    for number, answer in enumerate(client.stream(frames)):
        meanwhile.get(number, int)()
        full = answer.outputs is not None and answer.coverage == 1.0
        right = right and full and np.allclose(answer.outputs, expected[number], 1e-4, 1e-5)  # type: ignore[arg-type]
    return right


STREAM = """
import json, sys, time
import numpy as np
from robustdice.runtime.client import Client
client = Client(sys.argv[1], timeout_seconds=3.0)
def frames(count): return [np.zeros(client.model.input_shape, np.float32)] * count
def settled(up, seconds=30):
    end = time.monotonic() + seconds
    while [s["up"] for _, s in sorted(client.status(0.5).items())] != up:
        list(client.stream(frames(3)))
        if time.monotonic() > end: return False
    return True
for line in sys.stdin:
    answers = list(client.stream(frames(30)))
    print(json.dumps({
        "coverage": min(a.coverage for a in answers), "down": sorted({d for a in answers[-5:] for d in a.down}),
        "most_ms": max(a.latency_seconds for a in answers) * 1e3, "settled": settled(json.loads(line)),
    }), flush=True)
"""


@contextlib.contextmanager
def client_elsewhere(prefix: Sequence[str], cluster: Path) -> Iterator[Callable[[list[list[int]]], dict[str, Any]]]:
    """A client in a process of its own, which the words of ``prefix`` start. Calling it streams 30 frames and tells the
    least ``coverage``, who was ``down`` in the end, the longest latency (``most_ms``), and whether it has ``settled``
    then: whether each device that it reaches sees those which the call says."""
    command = [*prefix, sys.executable, "-c", STREAM, str(cluster)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        given, said = process.stdin, process.stdout

        def stream(up: list[list[int]]) -> dict[str, Any]:
            given.write(json.dumps(up) + "\n")
            given.flush()
            found: dict[str, Any] = json.loads(said.readline())
            return found

        yield stream
        given.close()
