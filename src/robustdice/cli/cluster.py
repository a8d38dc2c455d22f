"""The commands that run bundles: a device, all of them here, and whoever asks them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

import robustdice as rd
from robustdice.cli.app import app
from robustdice.cli.options import BuildDirectory, Json, MovedModel, Provider, Seed
from robustdice.cli.usage import number
from robustdice.errors import ClusterError, DataError, RobustdiceError
from robustdice.images import read_image
from robustdice.model.folders import find_images
from robustdice.report import cluster_tables
from robustdice.runtime.journal import JsonLines
from robustdice.terminal import err, log_to_stderr, out, print_json, progress, stop_on_signals


@app.command(epilog="Example: robustdice device build/device-0")
def device(
    directory: Annotated[Path, typer.Argument(metavar="DIR/device-K", help="the bundle of the device")],
    cluster: Annotated[Path | None, typer.Option(metavar="FILE", help="cluster.toml, if not in or beside DIR")] = None,
    threads: Annotated[int, number("--threads", "threads to compute with", least=1)] = 1,
    provider: Provider = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="log one JSON object a line")] = False,
) -> None:
    """Run one device in the foreground; Ctrl-C stops it."""
    log_to_stderr(JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s"), logging.INFO)
    rd.run_device(directory, cluster, threads, stop=stop_on_signals(), provider=provider)


@app.command(epilog="Example: robustdice up build")
def up(
    directory: BuildDirectory,
    threads: Annotated[int, number("--threads", "threads that each device computes with", least=1)] = 1,
    provider: Provider = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each device and event")] = False,
) -> None:
    """Run all devices of a build on this machine, to try it out; Ctrl-C stops them."""

    def say(text: str, **facts: Any) -> None:
        print_json(facts) if as_json else out.print(text, soft_wrap=True)

    stop = stop_on_signals()
    with rd.LocalCluster(directory, threads, provider=provider) as cluster:
        pids = {number: cluster.process(number) for number in range(len(cluster.client.cluster.devices))}
        for number, pid in pids.items():
            text = f"device {number} is up, process {pid} (try: kill -9 {pid}, or kill -STOP {pid})"
            say(text, event="up", device=number, process=pid)
        say(f"Ask them from another terminal: robustdice infer {directory} IMAGES... Ctrl-C stops them.", event="ready")
        while not stop.wait(0.2):
            for number, pid in pids.items():
                if pid is not None and cluster.process(number) is None:
                    last = cluster.last_words(number)
                    say(
                        f"device {number} has ended; the others go on ({last})", event="ended", device=number, last=last
                    )
                    pids[number] = None
    say("All devices are stopped.", event="stopped")


@app.command(epilog="Example: robustdice infer build photo.jpg other.png")
def infer(
    directory: BuildDirectory,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="image files, folders and zip files of them")
    ],
    timeout: Annotated[float, number("--timeout", "seconds to wait for each answer", float, least=0.01)] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object for each image, as it is answered")
    ] = False,
) -> None:
    """Ask the running devices of a build: class, probability, coverage, latency.

    Of a folder or zip file, every image in it. Images are read as they are asked about. One that cannot be read is
    named, and the others are answered.
    """
    sources = [source for path in images for source in _sources(path)]
    read: list[str] = []
    bad: list[str] = []
    answers: list[dict[str, Any]] = []

    def say(document: dict[str, Any]) -> None:
        if as_json:
            print_json(document)

    def arrays(preprocessing: dict[str, Any]) -> Iterator[NDArray[np.float32]]:
        for path, content in sources:
            try:
                array = read_image(content(), preprocessing, path)
            except DataError as error:
                bad.append(str(error))
                say({"path": path, "error": str(error)})
                continue
            read.append(path)
            yield array

    with rd.Client(directory / "cluster.toml", timeout_seconds=timeout) as client:
        model = client.model
        for answer in client.stream(arrays({"input_size": list(model.input_shape), **model.preprocessing})):
            answers.append(cluster_tables.answer_json(read[len(answers)], answer, model.classes, model.activation))
            say(answers[-1])
    if answers and not as_json:
        out.print(cluster_tables.answers_table(answers))
    unanswered = [answer["path"] for answer in answers if answer["class_index"] is None]
    if unanswered:
        bad.append(f"{len(unanswered)} of {len(answers)} images were not answered, such as {unanswered[0]}")
    if bad:
        raise RobustdiceError("\n".join(bad))


def _sources(path: Path) -> list[tuple[str, Callable[[], Path | bytes]]]:
    """The name and the content of an image, or of all images of a folder or zip file; what is left out is said."""
    if not path.is_dir() and path.suffix.lower() != ".zip":
        return [(str(path), lambda: path)]
    found = find_images(path)
    for left_out in found.left_out:
        err.print(f"not read: {left_out}", soft_wrap=True)
    return [(str(path / image.name), image.content) for image in found.files]


@app.command(epilog="Example: robustdice status build")
def status(
    directory: BuildDirectory,
    as_json: Json = False,
) -> None:
    """Who is up, and what each has done; exit status 1 when no device answers."""
    with rd.Client(directory / "cluster.toml") as client:
        devices = [entry.name for entry in client.cluster.devices]
        found, unreachable, troubles = client.status(), client.unreachable(), client.troubles()
    if as_json:
        print_json(cluster_tables.status_json(devices, found, troubles))
    else:
        out.print(cluster_tables.status_table(devices, found, troubles))
    if not found:
        raise ClusterError(unreachable)


@app.command(epilog="Example: robustdice bench build --seconds 3 --rounds 5")
def bench(
    directory: BuildDirectory,
    seconds: Annotated[float, number("--seconds", "length of each measurement", float, least=0.1)] = 3.0,
    samples: Annotated[
        int | None, number("--samples", "images that are streamed in each measurement, however long it takes", least=1)
    ] = None,
    rounds: Annotated[int, number("--rounds", "pairs of measurements", least=1)] = 5,
    window: Annotated[
        int, number("--window", "frames in flight (up to 8 where each goes to all devices)", least=1)
    ] = 4,
    provider: Provider = "auto",
    running: Annotated[bool, typer.Option("--running", help="measure devices that run already, wherever")] = False,
    idle: Annotated[float, number("--idle", "seconds to measure energy at rest, which is subtracted", float, 0)] = 0.0,
    model: MovedModel = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Frames per second, latency, memory and energy of the devices (one core each), beside the unpartitioned model in
    one process on one core.

    That needs the workshop and the plan's model; without them the devices are measured alone. With --running, devices
    that are not started here, but run already, on their own machines.
    """
    from robustdice.meter.throughput import bench_build, bench_running  # noqa: PLC0415 -- ONNX Runtime takes its time

    if running and (provider != "auto" or model is not None):
        raise RobustdiceError("--running measures devices as they run: leave out --provider and --model")
    with progress("measuring") as advance:
        how: dict[str, Any] = {"seconds": seconds, "samples": samples, "rounds": rounds, "window": window}
        how |= {"seed": seed, "idle_seconds": idle, "on_progress": advance}
        if running:
            result = bench_running(directory, **how)
        else:
            result = bench_build(directory, model=model, provider=provider, **how)
    if as_json:
        print_json(cluster_tables.bench_json(result))
    else:
        out.print(cluster_tables.bench_table(result))
