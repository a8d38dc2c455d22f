"""The commands that run bundles: a device, all of them here, and whoever asks them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

import robustdice as rd
from robustdice.cli.app import app
from robustdice.cli.options import BuildDirectory, Json, Seed, UnusedSeed
from robustdice.errors import RobustdiceError
from robustdice.images import read_image
from robustdice.report import tables
from robustdice.runtime.journal import JsonLines
from robustdice.terminal import log_to_stderr, out, print_json, progress, stop_on_signals


@app.command(epilog="Example: robustdice device build/device-0")
def device(
    directory: Annotated[Path, typer.Argument(metavar="DIR/device-K", help="the bundle of the device")],
    cluster: Annotated[Path | None, typer.Option(metavar="FILE", help="cluster.toml, if not in or beside DIR")] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads to compute with")] = 1,
    seed: UnusedSeed = 0,  # noqa: ARG001
    as_json: Annotated[bool, typer.Option("--json", help="log one JSON object a line")] = False,
) -> None:
    """Run one device in the foreground; Ctrl-C stops it."""
    log_to_stderr(JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s"), logging.INFO)
    rd.run_device(directory, cluster, threads, stop=stop_on_signals())


@app.command(epilog="Example: robustdice up build")
def up(
    directory: BuildDirectory,
    threads: Annotated[int, typer.Option(min=1, help="threads that each device computes with")] = 1,
    seed: UnusedSeed = 0,  # noqa: ARG001
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each device and event")] = False,
) -> None:
    """Run all devices of a build on this machine, to try it out; Ctrl-C stops them."""

    def say(text: str, **facts: Any) -> None:
        print(json.dumps(facts), flush=True) if as_json else out.print(text, soft_wrap=True)

    stop = stop_on_signals()
    with rd.LocalCluster(directory, threads) as cluster:
        pids = {number: cluster.process(number) for number in range(len(cluster.client.cluster.devices))}
        for number, pid in pids.items():
            text = f"device {number} is up, process {pid} (try: kill -9 {pid}, or kill -STOP {pid})"
            say(text, event="up", device=number, process=pid)
        say(f"Ask them from another terminal: robustdice infer {directory} IMAGES... Ctrl-C stops them.", event="ready")
        while not stop.wait(0.2):
            for number, pid in pids.items():
                if pid is not None and cluster.process(number) is None:
                    say(f"device {number} has ended; the others go on", event="ended", device=number)
                    pids[number] = None
    say("All devices are stopped.", event="stopped")


@app.command(epilog="Example: robustdice infer build photo.jpg other.png")
def infer(
    directory: BuildDirectory,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="image files")],
    timeout: Annotated[float, typer.Option(min=0.01, help="seconds to wait for each answer")] = 2.0,
    seed: UnusedSeed = 0,  # noqa: ARG001
    as_json: Json = False,
) -> None:
    """Ask the running devices of a build: class, probability, coverage, latency."""
    with rd.Client(directory / "cluster.toml", timeout_seconds=timeout) as client:
        model = client.model
        preprocessing = {"input_size": list(model.input_shape), **model.preprocessing}
        arrays = [read_image(path, preprocessing) for path in images]
        answers = [
            tables.answer_json(str(p), a, model.classes) for p, a in zip(images, client.stream(arrays), strict=True)
        ]
    if as_json:
        for answer in answers:
            print(json.dumps(answer))
    else:
        out.print(tables.answers_table(answers))
    if unanswered := [answer["path"] for answer in answers if answer["class_index"] is None]:
        raise RobustdiceError(f"{len(unanswered)} of {len(answers)} images were not answered, such as {unanswered[0]}")


@app.command(epilog="Example: robustdice status build")
def status(
    directory: BuildDirectory,
    seed: UnusedSeed = 0,  # noqa: ARG001
    as_json: Json = False,
) -> None:
    """Who is up, and what each has done."""
    with rd.Client(directory / "cluster.toml") as client:
        devices = [entry.name for entry in client.cluster.devices]
        found = client.status()
    if as_json:
        print_json({name: found.get(number) for number, name in enumerate(devices)})
    else:
        out.print(tables.status_table(devices, found))


@app.command(epilog="Example: robustdice bench build --seconds 3 --rounds 5")
def bench(
    directory: BuildDirectory,
    seconds: Annotated[float, typer.Option(min=0.1, help="length of each measurement")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="pairs of measurements")] = 5,
    window: Annotated[int, typer.Option(min=1, help="frames in flight")] = 4,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Frames per second of the devices (one core each), beside the unpartitioned model in one process on one core."""
    from robustdice.meter.throughput import bench_build  # noqa: PLC0415 -- not needed on a device

    with progress("measuring") as advance:
        result = bench_build(directory, seconds=seconds, rounds=rounds, window=window, seed=seed, on_progress=advance)
    if as_json:
        print_json(tables.bench_json(result))
    else:
        out.print(tables.bench_table(result))
