"""The command line: parse, call one public function, print (tables for people, --json for programs)."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import robustdice as rd
from robustdice.errors import DataError, RobustdiceError
from robustdice.images import read_image
from robustdice.report import tables
from robustdice.terminal import (
    JsonLines,
    err,
    escape,
    interrupt_on_sigterm,
    out,
    print_json,
    progress,
    stop_on_signals,
    waiting,
)

SCORING_SAMPLES = 64

app = typer.Typer(
    name="robustdice",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a pretrained CNN on a handful of unreliable devices, so that answers keep coming while devices fail.\n\n"
    "In the workshop: [bold]inspect[/] a model, [bold]score[/] its neurons, make a [bold]plan[/], [bold]evaluate[/] "
    "what accuracy failures leave, [bold]build[/] a bundle per device and [bold]verify[/] it. On the devices: "
    "[bold]device[/] runs one, [bold]up[/] runs all of them here, [bold]infer[/] asks them. "
    "To see all of it in a minute: [bold]robustdice demo[/].",
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="torchvision:NAME, a .pt2 file, or package.module:factory")
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="seeded random weights, not pretrained ones")]
Size = Annotated[str | None, typer.Option(metavar="C,H,W", help="input size, where the model's source does not say it")]
Mean = Annotated[str | None, typer.Option(metavar="X,...", help="mean of each channel, for pixels from 0 to 1")]
Std = Annotated[str | None, typer.Option(metavar="X,...", help="standard deviation of each channel")]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="class folders in the order of the outputs, the first word of each line"),
]
Data = Annotated[str, typer.Option(metavar="DATA", help="a folder or zip file with class folders, or 'digits'")]
Use = Annotated[str, typer.Option(metavar="S,...", help="which of the scores s1, s2, s3")]
Samples = Annotated[int | None, typer.Option(min=1, help="use a seeded, class-balanced subset of this many images")]
Seed = Annotated[int, typer.Option(help="of everything random")]
UnusedSeed = Annotated[int, typer.Option("--seed", help="taken by every command; nothing is random in this one")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead of tables")]
BuildDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="what 'robustdice build' wrote")]


@app.command(epilog="Example: robustdice inspect torchvision:resnet18 --random-weights")
def inspect(
    model: ModelArgument,
    random_weights: RandomWeights = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Layers, neurons, parameters, exchanges and their sizes."""
    with waiting("loading the model"):
        network = _load_model(model, random_weights, seed, size, mean, std, classes)
    if as_json:
        print_json(tables.network_json(network))
    else:
        out.print(tables.network_table(network))


@app.command(epilog="Example: robustdice score resnet20.pt2 --data cifar10-train.zip --samples 64 -o scores.npz")
def score(
    model: ModelArgument,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="where to write the scores (.npz)")],
    use: Use = "s1,s2,s3",
    samples: Samples = SCORING_SAMPLES,
    random_weights: RandomWeights = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Importance of every neuron: L1 norm (s1), connection sensitivity (s2), removal divergence (s3).

    s3 is exact: one forward pass per neuron and image, from the neuron's layer on. That is a minute for a small
    network and hours for a large one, which --use s1,s2 does without.
    """
    with waiting("loading the model"):
        network = _load_model(model, random_weights, seed, size, mean, std, classes)
    importance = _score(network, data, samples, seed, use.split(","))
    importance.save(output)
    if as_json:
        print_json({"output": str(output), "columns": importance.columns, "settings": importance.settings})
    else:
        out.print(tables.importance_table(importance))
        out.print(f"Scores of {len(importance.names)} layers are in {output}.")


@app.command(epilog="Example: robustdice plan resnet20.pt2 --devices 4 --memory 0.6 --scores scores.npz -o plan.json")
def plan(
    model: ModelArgument,
    devices: Annotated[int, typer.Option(help="number of devices, 2 to 16")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN", help="where to write the plan (.json)")],
    method: Annotated[
        str, typer.Option(help="robustdice, lop (no replicas) or full (replicas of everything)")
    ] = "robustdice",
    memory: Annotated[
        str | None, typer.Option(help="the most that a device may hold: a share of the model (0.5) or bytes (80MB)")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="cluster threshold, instead of --memory")] = None,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="what 'robustdice score' wrote")] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="score with these images first")] = None,
    use: Use = "s1,s2,s3",
    samples: Samples = SCORING_SAMPLES,
    random_weights: RandomWeights = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    classes: Classes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Which device holds which neurons, and which are copied."""
    with waiting("loading the model"):
        network = _load_model(model, random_weights, seed, size, mean, std, classes)
    importance = columns = None
    if method == "robustdice":
        columns = use.split(",")
        if scores is not None:
            importance = rd.Importance.load(scores)
        elif data is not None:
            importance = _score(network, data, samples, seed, columns)
        else:
            raise RobustdiceError("robustdice plans by importance: give --scores FILE, or --data DATA to score with")
    with waiting("clustering and distributing"):
        made = rd.partition(
            network, importance, devices=devices, method=method, memory=memory, threshold=threshold, columns=columns
        )
    made.save(output)
    if as_json:
        print_json(tables.plan_json(made))
    else:
        out.print(tables.plan_table(made))
        out.print(tables.plan_summary(made))
        out.print(f"The plan is in {output}.")


@app.command(epilog="Example: robustdice evaluate plan.json --data cifar10-test.zip --samples 1000")
def evaluate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="what 'robustdice plan' wrote")],
    data: Data,
    max_failed: Annotated[int | None, typer.Option(min=0, help="most devices down at once (all but one)")] = None,
    samples: Samples = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Accuracy for every set of failed devices, before anything is deployed."""
    made = rd.Plan.load(plan)
    with waiting("loading the model"):
        network = rd.reload_model(made.model)
    dataset = _load_data(data, network, samples, seed)
    with progress("evaluating") as advance:
        result = rd.evaluate(network, made, dataset, max_failed=max_failed, on_progress=advance)
    if as_json:
        print_json(tables.evaluation_json(result))
    else:
        out.print(tables.evaluation_table(result))


@app.command(epilog="Example: robustdice build plan.json -o build --spares standby")
def build(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="what 'robustdice plan' wrote")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="where to write the bundles")],
    spares: Annotated[
        str, typer.Option(help="standby (computed when needed) or hot (computed on every frame)")
    ] = "standby",
    host: Annotated[str, typer.Option(help="address of the devices in cluster.toml, to be edited")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="device K listens on this port + K (default: free ones)")] = None,
    seed: UnusedSeed = 0,  # noqa: ARG001
    as_json: Json = False,
) -> None:
    """One self-contained bundle per device, and DIR/cluster.toml."""
    made = rd.Plan.load(plan)
    with waiting("loading the model"):
        network = rd.reload_model(made.model)
    with waiting("writing the bundles"):
        rd.build(network, made, output, spares=spares, host=host, base_port=port)
    if as_json:
        print_json({"directory": str(output), "bytes_per_device": made.bytes_per_device})
    else:
        for device, size in enumerate(made.bytes_per_device):
            out.print(f"{output / f'device-{device}'}  {size / 1e6:.2f} MB of weights", soft_wrap=True)
        out.print(f"Next: robustdice verify {output}, then robustdice up {output} to try it here.", soft_wrap=True)


@app.command(epilog="Example: robustdice verify build")
def verify(directory: BuildDirectory, seed: Seed = 0, as_json: Json = False) -> None:
    """Run the bundles in one process and compare them with the model, for every failure set."""
    with progress("verifying") as advance:
        result = rd.verify(directory, seed=seed, on_progress=advance)
    if as_json:
        print_json(tables.verification_json(result))
    else:
        out.print(tables.verification_table(result))
    if result.max_relative_error > 1e-4:
        raise RobustdiceError(
            f"the bundles differ from the model by {result.max_relative_error:.1e}, more than 1e-4; build them again"
        )


@app.command(epilog="Example: robustdice device build/device-0")
def device(
    directory: Annotated[Path, typer.Argument(metavar="DIR/device-K", help="the bundle of the device")],
    cluster: Annotated[Path | None, typer.Option(metavar="FILE", help="cluster.toml, if not in or beside DIR")] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads to compute with")] = 1,
    seed: UnusedSeed = 0,  # noqa: ARG001
    as_json: Annotated[bool, typer.Option("--json", help="log one JSON object a line")] = False,
) -> None:
    """Run one device in the foreground; Ctrl-C stops it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
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


@app.command(epilog="Example: robustdice demo --memory 0.6")
def demo(
    memory: Annotated[str, typer.Option(help="the most that a device may hold, as for 'plan'")] = "0.5",
    frames: Annotated[int, typer.Option(min=8, help="test images that are streamed in each phase")] = 250,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The whole story on this machine, on scikit-learn's digits, in about a minute."""
    from robustdice.demo.story import run_demo  # noqa: PLC0415 -- needs the workshop

    interrupt_on_sigterm()
    result = run_demo(memory, frames, seed, Console(quiet=True) if as_json else out)
    if as_json:
        print_json(result)


def main() -> None:
    """Run a command; errors of the project are one line on stderr and exit status 1."""
    try:
        app()
    except RobustdiceError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def _load_model(
    source: str,
    random_weights: bool,
    seed: int,
    size: str | None,
    mean: str | None,
    std: str | None,
    classes: Path | None,
) -> rd.Network:
    declared: dict[str, Any] = {}
    for key, text, kind in (("input_size", size, int), ("mean", mean, float), ("std", std, float)):
        if text is not None:
            try:
                declared[key] = [kind(number) for number in text.split(",")]
            except ValueError:
                option = "--size" if key == "input_size" else f"--{key}"
                raise DataError(f"{option} takes numbers with commas between them, not {text!r}") from None
    if classes is not None:
        try:
            lines = classes.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot read {classes}: {error.strerror}") from None
        declared["classes"] = [line.split()[0] for line in lines if line.strip()]
    return rd.load_model(source, random_weights=random_weights, seed=seed, preprocessing=declared)


def _load_data(source: str, network: rd.Network, samples: int | None, seed: int, split: Any = "test") -> rd.Dataset:
    return rd.load_data(source, network.preprocessing, network.outputs, split=split).sample(samples, seed)


def _score(network: rd.Network, data: str, samples: int | None, seed: int, columns: list[str]) -> rd.Importance:
    images = _load_data(data, network, samples, seed, "train").images()
    with progress("scoring") as advance:
        return rd.score(network, images, columns=columns, on_progress=advance)
