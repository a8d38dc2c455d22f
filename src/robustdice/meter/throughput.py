"""Frames per second of a build's devices beside the unpartitioned model, in pairs of measurements."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import ClusterError, ModelError, workshop_missing
from robustdice.progress import Progress, silent
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.sessions import AUTO
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster


@dataclass(frozen=True)
class DeviceFigures:
    """What one device took: bytes of weights (from its bundle) and resident memory of its process (measured): before
    the bundle was loaded, after the frames, and the most that it ever was; ``providers``: how many of its models each
    of ONNX Runtime's providers computed."""

    name: str
    weights_bytes: int
    empty_rss_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    providers: Mapping[str, int]


@dataclass(frozen=True)
class BenchResult:
    """Medians over pairs of measurements; ``ratios`` are the pairs' own.

    Where the workshop or the model is not there, there is no unpartitioned model to measure: None, no ratios, and the
    reason.
    """

    frames_per_second: float
    single_frames_per_second: float | None
    ratios: tuple[float, ...]
    latency_p50_ms: float
    latency_p99_ms: float
    devices: tuple[DeviceFigures, ...]
    not_compared: str | None = None

    @property
    def ratio(self) -> float | None:
        """Median of the pairs' ratios."""
        return median(self.ratios) if self.ratios else None


def bench_build(
    directory: str | os.PathLike[str],
    *,
    seconds: float,
    rounds: int,
    window: int,
    seed: int = 0,
    model: str | None = None,
    provider: str = AUTO,
    on_progress: Progress = silent,
) -> BenchResult:
    """Measure the build in ``directory`` with random images, device k on core k (modulo the number of cores).

    In every round the single process and the devices are measured one after the other, so that
    their ratio holds when the machine's speed drifts. ``model`` says where the plan's model is now, when it has moved.
    ClusterError when frames stay unanswered, ModelError when ``model`` is not the plan's.
    """
    root = Path(directory)
    available = sorted(os.sched_getaffinity(0))
    devices = len(Cluster.read(root / CLUSTER_NAME).devices)
    cores = [[available[device % len(available)]] for device in range(devices)]
    whole, not_compared = _whole_model(root, model)
    together: list[float] = []
    alone: list[float] = []
    latencies: list[float] = []
    with tempfile.TemporaryDirectory(prefix="robustdice-bench-") as temporary:
        alone_model = Path(temporary) / "model.onnx"
        alone_model.write_bytes(whole)
        with LocalCluster(root, 1, cores, 30.0, window, provider) as cluster:
            shape = cluster.client.model.input_shape
            frame = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
            _stream(cluster, frame, min(seconds, 1.0))
            for done in range(rounds):
                for who in ("alone", "together") if done % 2 == 0 else ("together", "alone"):
                    if who == "alone" and whole:
                        alone.extend(measure_whole(alone_model, shape, seconds, available[:1]))
                    elif who == "together":
                        rate, times = _stream(cluster, frame, seconds)
                        together.append(rate)
                        latencies.extend(times)
                on_progress(done + 1, rounds)
            figures = _figures(cluster)
    return BenchResult(
        frames_per_second=median(together),
        single_frames_per_second=median(alone) if whole else None,
        ratios=tuple(a / b for a, b in zip(together, alone, strict=True)) if whole else (),
        latency_p50_ms=1e3 * float(np.percentile(latencies, 50)),
        latency_p99_ms=1e3 * float(np.percentile(latencies, 99)),
        devices=figures,
        not_compared=not_compared,
    )


def _whole_model(build: Path, model: str | None) -> tuple[bytes, str | None]:
    """The unpartitioned model as ONNX, or nothing and the reason: devices can be measured where it is not."""
    try:
        from robustdice.meter.whole import whole_model_of  # noqa: PLC0415 -- the one part that needs the workshop
    except ModuleNotFoundError as error:
        if (missing := workshop_missing(error)) is None:
            raise
        return b"", str(missing)
    try:
        return whole_model_of(build, model), None
    except ModelError as error:
        if model is not None:
            raise
        return b"", str(error)


def measure_whole(model: Path, shape: Sequence[int], seconds: float, cores: Sequence[int]) -> list[float]:
    """Frames per second of the whole model in one process on each of ``cores``, all at the same time."""
    command = [sys.executable, "-m", "robustdice.meter.single", str(model), ",".join(map(str, shape))]
    command += ["--seconds", str(seconds), "--core"]
    processes = [subprocess.Popen([*command, str(core)], stdout=subprocess.PIPE, text=True) for core in cores]  # noqa: S603
    return [float(process.communicate()[0]) for process in processes]


def _stream(cluster: LocalCluster, frame: NDArray[np.float32], seconds: float) -> tuple[float, list[float]]:
    """Frames per second while the window is kept full, and the latencies in seconds."""
    start = time.perf_counter()

    def frames() -> Iterator[NDArray[np.float32]]:
        for _ in count():
            if time.perf_counter() - start >= seconds:
                return
            yield frame

    latencies = []
    for answer in cluster.client.stream(frames()):
        if answer.outputs is None or answer.coverage < 1:
            raise ClusterError(f"frame {answer.number} was not answered in full: {answer.refused or 'time is up'}")
        latencies.append(answer.latency_seconds)
    return len(latencies) / (time.perf_counter() - start), latencies


def _figures(cluster: LocalCluster) -> tuple[DeviceFigures, ...]:
    found = cluster.client.status()
    if missing := [entry.name for number, entry in enumerate(cluster.cluster.devices) if number not in found]:
        raise ClusterError(f"{missing[0]} does not answer after the measurement; run it again")
    return tuple(
        DeviceFigures(
            entry.name,
            *(int(found[number][key]) for key in ("weights_bytes", "empty_rss_bytes", "rss_bytes", "peak_rss_bytes")),
            providers=found[number]["providers"],
        )
        for number, entry in enumerate(cluster.cluster.devices)
    )
