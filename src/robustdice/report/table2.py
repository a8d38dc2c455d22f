"""The paper's Table II, measured: frames per second, memory and energy of devices that run, by method.

Every plan is built with hot spares and with standby ones, and run by processes on this machine behind a switch. What is
measured is kept in ``OUT/work-table2``, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.onnx_graph import OnnxGraph, export_onnx
from robustdice.bundle.write import SPARES
from robustdice.errors import OutputError, PlanError, RobustdiceError
from robustdice.files import write_atomically, write_csv
from robustdice.meter.apart import Place, behind, on_loopback, running
from robustdice.meter.netns import one_switch, permitted
from robustdice.plan import Plan
from robustdice.progress import Progress, silent
from robustdice.provenance import commit, processor
from robustdice.report import plots, table2_page
from robustdice.report.comparison import Choices, Subject, check_memory, figure2_plans
from robustdice.report.kept import check_names, claim, kept_scores, settings_of
from robustdice.report.table2_rows import Row, Table2, name_of, with_ratios
from robustdice.workshop import build

METHODS = ("full", "cdc", "robustdice")
SAMPLES = 1000
MEASURED = "measured.json"
WINDOW = 4
"""Frames in flight."""
SIZES = ("weights_bytes", "rss_bytes", "peak_rss_bytes")


@dataclass(frozen=True)
class Network:
    """Between the devices: ports of ``megabits`` per second each (None: loopback), that ``in_words``, and why there is
    ``no_switch`` where one was wanted."""

    megabits: float | None
    in_words: str
    no_switch: str | None = None

    @classmethod
    def of(cls, megabits: float | None) -> Network:
        """What there can be of the wish."""
        if megabits is None:
            return cls(None, "loopback, as fast as the machine")
        if reason := permitted():
            return cls(None, "loopback, as fast as the machine", reason)
        return cls(megabits, f"a switch whose port for each device carries {megabits:g} Mbit/s either way")

    @contextlib.contextmanager
    def place(self, devices: int) -> Iterator[Place]:
        """For so many devices, until the end."""
        if self.megabits is None:
            yield on_loopback(devices)
        else:
            with one_switch(devices + 1) as switch:
                switch.limit(range(devices), self.megabits)
                yield behind(switch, devices)


def reproduce_table2(
    subjects: Sequence[Subject],
    out: Path,
    choices: Choices,
    *,
    samples: int = SAMPLES,
    megabits: float | None = 1000.0,
    scheduler: str | None = None,
    about: Mapping[str, str] | None = None,
    on_progress: Progress = silent,
) -> Table2:
    """Stream ``samples`` frames (a subject's scoring images, in turn) through every method on every number of devices,
    behind a switch whose ports carry ``megabits`` per second (None, or where namespaces are not permitted: loopback).

    Writes ``table2-measured.csv`` and ``.json``, ``table2.png`` and ``.svg``, and ``table2.html`` to ``out``, with what
    there is when it is interrupted. What fails is said, and the rest goes on. PlanError when full replication is not
    among the methods or the memory is too little; OutputError when ``out`` holds work of other settings.
    """
    if "full" not in choices.methods:
        raise PlanError("Table II compares with full replication: add full to the methods")
    check_names(subjects)
    for subject in subjects:
        check_memory(subject, choices)
    network, measured, failed = Network.of(megabits), list[Row](), dict[str, str]()
    works = [out / "work-table2" / subject.name for subject in subjects]
    for subject, work in zip(subjects, works, strict=True):
        more = {"samples": samples, "megabits": network.megabits, "machine": processor()}
        claim(work, {**settings_of(subject, choices), **more})
    try:
        for number, (subject, work) in enumerate(zip(subjects, works, strict=True)):

            def advance(done: int, total: int, before: int = number) -> None:
                on_progress(1000 * before + 1000 * done // total, 1000 * len(subjects))

            scores = kept_scores(subject, work, choices.s3, scheduler, silent)
            plans, _ = figure2_plans(subject, scores, choices)
            for row in _measure_all(subject, plans, work, samples, network, failed, advance):
                measured.append(row)
    finally:
        table = Table2(network.in_words, network.no_switch, with_ratios(measured), failed)
        if measured:
            _write(table, out, about or {})
    return table


def _measure_all(
    subject: Subject,
    plans: Mapping[int, Mapping[str, Plan]],
    work: Path,
    samples: int,
    network: Network,
    failed: dict[str, str],
    on_progress: Progress,
) -> Iterator[Row]:
    """A model's rows, each kept as soon as it is measured; why one cannot be goes into ``failed``."""
    kept = _kept(work / MEASURED)
    frames = work / "frames.npy"
    graph = cache(lambda: export_onnx(subject.network))
    cells = [
        (devices, method, plan, spares)
        for devices, of_size in plans.items()
        for method, plan in of_size.items()
        for spares in SPARES
    ]
    for done, (devices, method, plan, spares) in enumerate(cells):
        on_progress(done, len(cells))
        row: Row = {"model": subject.name, "source": subject.network.reference.source, "devices": devices}
        row |= {"method": method, "spares": spares, "trained": subject.network.reference.random_weights_seed is None}
        name = name_of(row)
        if name not in kept:
            if not frames.exists():
                _write_frames(frames, subject.scoring.images())
            try:
                with _built(work / "build", network, subject, plan, spares, graph()) as (directory, where):
                    kept[name] = {**row, **_measured(directory, where, samples, frames)}
            except RobustdiceError as error:
                failed[name] = str(error)
                continue
            write_atomically(work / MEASURED, json.dumps(kept).encode())
        yield kept[name]
    on_progress(len(cells), len(cells))


def _write_frames(file: Path, images: NDArray[np.float32]) -> None:
    written = file.with_name(f"part.{file.name}")
    try:
        np.save(written, images)
        written.replace(file)
    except OSError as error:
        written.unlink(missing_ok=True)
        raise OutputError(f"cannot write {file}: {error.strerror}; free some room, or choose another place") from None


def _kept(file: Path) -> dict[str, Row]:
    """What has been measured, by name."""
    try:
        return dict(json.loads(file.read_bytes())) if file.exists() else {}
    except (OSError, TypeError, ValueError) as error:
        raise OutputError(f"cannot read {file}: {error}; delete it to measure again") from None


@contextlib.contextmanager
def _built(
    directory: Path, network: Network, subject: Subject, plan: Plan, spares: str, graph: OnnxGraph
) -> Iterator[tuple[Path, Place]]:
    """A build, and where it is to run; whole copies of a large network take gigabytes, so it is removed at once."""
    shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed
    try:
        with network.place(plan.devices) as where:
            yield build(subject.network, plan, directory, spares=spares, host=where.hosts, graph=graph), where
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measured(directory: Path, where: Place, samples: int, frames: Path) -> Row:
    """What running devices give, and what they say of themselves; the largest of a figure that each has."""
    start, busy, own = time.monotonic(), _busy_seconds(), sum(os.times()[:4])
    with running(directory, where) as devices:
        found = devices.measure(samples=samples, window=WINDOW, frames=frames)
    elsewhere = _busy_seconds() - busy - (sum(os.times()[:4]) - own)
    joules = [each.joules_per_image for each in found.devices if each.joules_per_image is not None]
    return {
        "samples": found.images,
        "frames_per_second": found.frames_per_second,
        "latency_p50_ms": found.latency_p50_ms,
        "latency_p99_ms": found.latency_p99_ms,
        "coverage": found.coverage,
        "unanswered": found.unanswered,
        **{key: max(getattr(each, key) for each in found.devices) for key in SIZES},
        "joules_per_image": max(joules, default=None),
        "energy": next(each.energy_source or each.no_energy for each in found.devices),
        "processors_busy_elsewhere": max(0.0, elsewhere) / (time.monotonic() - start),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
    }


def _busy_seconds() -> float:
    """What all processors together have been busy, with what the host has taken from a virtual machine; 0 where Linux
    does not say it."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, interrupts, softly, stolen = map(int, words[1:9])
    return (user + nice + system + interrupts + softly + stolen) / os.sysconf("SC_CLK_TCK")


def _write(table: Table2, out: Path, about: Mapping[str, str]) -> None:
    write_csv(out / "table2-measured.csv", table.rows)
    document = {"about": dict(about), **table.document()}
    write_atomically(out / "table2-measured.json", json.dumps(document, indent=1).encode())
    figure = plots.running(table.rows)
    for suffix in ("png", "svg"):
        plots.save(figure, out / f"table2.{suffix}")
    page = table2_page.render(table, (out / "table2.svg").read_text(), about)
    write_atomically(out / "table2.html", page.encode())
