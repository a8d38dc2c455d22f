"""Frames per second, latency, memory and energy of devices; of those of a build on this machine beside the
unpartitioned model, in pairs of measurements."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import ClusterError, ModelError, OutputError, workshop_missing
from robustdice.progress import Progress, silent
from robustdice.runtime.answer import Answer
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.sessions import AUTO
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster

ANSWER_SECONDS = 30.0
"""A frame that is not answered so soon never will be; nor will the next ones, if none is for so long."""


@dataclass(frozen=True)
class DeviceFigures:
    """What one device took: bytes of weights (from its bundle) and resident memory of its process (measured): before
    the bundle was loaded, after the frames, and the most that it ever was; ``providers``: how many of its models each
    of ONNX Runtime's providers computed. ``joules_per_image`` is what its machine took by its own ``energy_source``;
    None where nothing could be read, and ``no_energy`` is why."""

    name: str
    weights_bytes: int
    empty_rss_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    providers: Mapping[str, int]
    joules_per_image: float | None = None
    energy_source: str | None = None
    no_energy: str | None = None


@dataclass(frozen=True)
class BenchResult:
    """Medians over pairs of measurements; ``ratios`` are the pairs' own. Of ``images``, ``unanswered`` got no answer,
    and the others a mean ``coverage``. ``idle_subtracted``: energy is what was taken beyond that of devices at rest.

    Where the workshop or the model is not there, there is no unpartitioned model to measure: None, no ratios, and the
    reason.
    """

    frames_per_second: float
    single_frames_per_second: float | None
    ratios: tuple[float, ...]
    latency_p50_ms: float
    latency_p99_ms: float
    devices: tuple[DeviceFigures, ...]
    images: int
    unanswered: int = 0
    coverage: float = 1.0
    idle_subtracted: bool = False
    silent: tuple[str, ...] = ()
    """Devices that are down."""
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
    samples: int | None = None,
    model: str | None = None,
    provider: str = AUTO,
    idle_seconds: float = 0.0,
    on_progress: Progress = silent,
) -> BenchResult:
    """Measure the build in ``directory`` with random images, device k on core k (modulo the number of cores).

    In every round the single process and the devices are measured one after the other, so that
    their ratio holds when the machine's speed drifts. Devices are sent frames for ``seconds``, or, where that is said,
    so many ``samples``. ``model`` says where the plan's model is now, when it has moved.
    What the devices take while they do nothing for ``idle_seconds`` (if any) is subtracted from their energy.
    ClusterError when frames stay unanswered, ModelError when ``model`` is not the plan's.
    """
    root = Path(directory)
    available = sorted(os.sched_getaffinity(0))
    devices = len(Cluster.read(root / CLUSTER_NAME).devices)
    cores = [[available[device % len(available)]] for device in range(devices)]
    whole, not_compared = _whole_model(root, model)
    alone: list[float] = []
    with tempfile.TemporaryDirectory(prefix="robustdice-bench-") as temporary:
        alone_model = Path(temporary) / "model.onnx"
        try:
            alone_model.write_bytes(whole)
        except OSError as error:
            raise OutputError(
                f"the whole model cannot be written to {temporary}: {error.strerror}; say where there is room with "
                "TMPDIR=DIR"
            ) from None
        with LocalCluster(root, 1, cores, 30.0, window, provider) as cluster:
            runs = _Runs(cluster.client, seed, idle_seconds, complete=True)
            runs.warm_up(min(seconds, 1.0))
            for done in range(rounds):
                for who in ("alone", "together") if done % 2 == 0 else ("together", "alone"):
                    if who == "alone" and whole:
                        shape = cluster.client.model.input_shape
                        alone.extend(measure_whole(alone_model, shape, seconds, available[:1]))
                    elif who == "together":
                        runs.measure(seconds, samples)
                on_progress(done + 1, rounds)
            return runs.result(alone, not_compared)


def bench_running(
    directory: str | os.PathLike[str],
    *,
    seconds: float,
    rounds: int,
    window: int,
    seed: int = 0,
    samples: int | None = None,
    idle_seconds: float = 0.0,
    frames: NDArray[np.float32] | None = None,
    on_progress: Progress = silent,
) -> BenchResult:
    """Measure from here, as a client, the devices that run with the cluster file in ``directory``, wherever they are.

    Each of ``rounds`` streams frames for ``seconds``, or, where that is said, so many ``samples``: those in ``frames``
    [n, C, H, W] in turn, or a random one. Frames that are not answered, or not in full, are counted; ClusterError when
    none is, or no device can be reached.
    """
    with Client(Path(directory) / CLUSTER_NAME, timeout_seconds=ANSWER_SECONDS, window=window) as client:
        runs = _Runs(client, seed, idle_seconds, complete=False, frames=frames)
        runs.warm_up(min(seconds, 1.0))
        for done in range(rounds):
            runs.measure(seconds, samples)
            on_progress(done + 1, rounds)
        return runs.result([], "the devices run elsewhere, and were measured as they are")


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
    return [rate for rate, _ in measure_processes(model, shape, seconds, cores)]


def measure_processes(
    model: Path, shape: Sequence[int], seconds: float, cores: Sequence[int]
) -> list[tuple[float, float]]:
    """As :func:`measure_whole`, and the seconds of its processor that each takes for a frame: these say the same
    whatever else the machine does."""
    command = [sys.executable, "-m", "robustdice.meter.single", str(model), ",".join(map(str, shape))]
    command += ["--seconds", str(seconds), "--core"]
    processes = [subprocess.Popen([*command, str(core)], stdout=subprocess.PIPE, text=True) for core in cores]  # noqa: S603
    said = [process.communicate()[0].split() for process in processes]
    if any(len(words) != 2 for words in said):
        raise ClusterError(
            "the whole model could not be computed in one process: there may not be memory enough for it"
        )
    return [(float(rate), float(busy)) for rate, busy in said]


class _Runs:
    """Streams of frames to running devices, and what devices say of themselves around them."""

    def __init__(
        self,
        client: Client,
        seed: int,
        idle_seconds: float,
        complete: bool,
        frames: NDArray[np.float32] | None = None,
    ) -> None:
        """``complete``: every frame must be answered in full, by all devices. ``frames`` are streamed in turn; without
        any, a random one is."""
        self._client, self._complete, self._idle_seconds = client, complete, idle_seconds
        shape = (1, *client.model.input_shape)
        self._frames = np.random.default_rng(seed).standard_normal(shape, np.float32) if frames is None else frames
        self._rates: list[float] = []
        self._latencies: list[float] = []
        self._images = self._unanswered = 0
        self._covered = 0.0
        self._energy: dict[int, tuple[float, float]] = {}
        """What each device's machine took while frames were streamed: joules, and in how many seconds."""
        self._idle: dict[int, float] = {}
        """Watts of each at rest."""
        if idle_seconds:
            before = self._said()
            time.sleep(idle_seconds)
            taken = _taken(before, self._said())
            self._idle = {device: joules / seconds for device, (joules, seconds) in taken.items()}

    def warm_up(self, seconds: float) -> None:
        """Stream for so long, which does not count."""
        self._stream(self._lasting(seconds))

    def measure(self, seconds: float, samples: int | None) -> None:
        """Keep the window full for so long, or for so many frames."""
        before = self._said()
        frames = self._lasting(seconds) if samples is None else islice(cycle(self._frames), samples)
        answers, elapsed = self._stream(frames)
        answered = [answer for answer in answers if answer.outputs is not None]
        self._rates.append(len(answered) / elapsed)
        self._latencies += [answer.latency_seconds for answer in answered]
        self._images += len(answers)
        self._unanswered += len(answers) - len(answered)
        self._covered += sum(answer.coverage for answer in answered)
        for device, (joules, of_seconds) in _taken(before, self._said()).items():
            so_far = self._energy.get(device, (0.0, 0.0))
            self._energy[device] = so_far[0] + joules, so_far[1] + of_seconds

    def _lasting(self, seconds: float) -> Iterator[NDArray[np.float32]]:
        end = time.perf_counter() + seconds
        for frame in cycle(self._frames):
            if time.perf_counter() > end:
                return
            yield frame

    def _stream(self, frames: Iterable[NDArray[np.float32]]) -> tuple[list[Answer], float]:
        """All answers, and the seconds from the first frame to the last answer; ClusterError where devices have stopped
        answering: else a long measurement would wait for each of its frames until time is up."""
        start = heard = time.perf_counter()
        answers: list[Answer] = []
        for answer in self._client.stream(frames):
            answers.append(answer)
            now = time.perf_counter()
            heard = heard if answer.outputs is None else now
            if now - heard > self._client.timeout_seconds:
                why = answer.refused or self._client.unreachable()
                raise ClusterError(
                    f"devices have stopped answering: none of the last frames was answered, for {now - heard:.0f} s "
                    f"({why}); 'robustdice status' says who is up"
                )
        elapsed = time.perf_counter() - start
        answered = [answer for answer in answers if answer.outputs is not None]
        for answer in answers:
            if answer.outputs is None and (self._complete or not answered):
                raise ClusterError(f"frame {answer.number} was not answered: {answer.refused or 'time is up'}")
            if self._complete and answer.coverage < 1:
                raise ClusterError(f"frame {answer.number} was not answered in full: devices {answer.down} were down")
        return answers, elapsed

    def result(self, alone: Sequence[float], not_compared: str | None) -> BenchResult:
        """``alone``: frames per second of one process with the unpartitioned model, as many as there were streams."""
        found, entries = self._said(), self._client.cluster.devices
        silent_ones = tuple(entry.name for number, entry in enumerate(entries) if number not in found)
        if silent_ones and self._complete:
            raise ClusterError(f"{silent_ones[0]} does not answer after the measurement; run it again")
        answered = self._images - self._unanswered
        return BenchResult(
            frames_per_second=median(self._rates),
            single_frames_per_second=median(alone) if alone else None,
            ratios=tuple(a / b for a, b in zip(self._rates, alone, strict=True)) if alone else (),
            latency_p50_ms=1e3 * float(np.percentile(self._latencies, 50)),
            latency_p99_ms=1e3 * float(np.percentile(self._latencies, 99)),
            devices=tuple(self._figures(number, entries[number].name, said) for number, said in sorted(found.items())),
            images=self._images,
            unanswered=self._unanswered,
            coverage=self._covered / answered,
            idle_subtracted=bool(self._idle_seconds),
            silent=silent_ones,
            not_compared=not_compared,
        )

    def _figures(self, number: int, name: str, said: Mapping[str, Any]) -> DeviceFigures:
        energy, joules = said["energy"], None
        if energy["source"] is not None and number in self._energy:
            taken, seconds = self._energy[number]
            joules = (taken - seconds * self._idle.get(number, 0.0)) / self._images
        return DeviceFigures(
            name=name,
            weights_bytes=said["weights_bytes"],
            empty_rss_bytes=said["empty_rss_bytes"],
            rss_bytes=said["rss_bytes"],
            peak_rss_bytes=said["peak_rss_bytes"],
            providers=said["providers"],
            joules_per_image=joules,
            energy_source=None if joules is None else energy["source"],
            no_energy=energy.get("reason", "a device was started again meanwhile") if joules is None else None,
        )

    def _said(self) -> dict[int, Mapping[str, Any]]:
        return self._client.status()


def _taken(
    before: Mapping[int, Mapping[str, Any]], after: Mapping[int, Mapping[str, Any]]
) -> dict[int, tuple[float, float]]:
    """Joules and seconds between two words of the same process, of those that measure energy."""
    found = {}
    for device in before.keys() & after.keys():
        then, now = before[device]["energy"], after[device]["energy"]
        if then["source"] is not None is not now["source"] and before[device]["process"] == after[device]["process"]:
            found[device] = now["joules"] - then["joules"], now["seconds"] - then["seconds"]
    return found
