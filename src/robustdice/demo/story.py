"""The whole story on one machine: from a trained network to four processes that answer through failures."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import robustdice as rd
from robustdice.bundle.read import load_bundle
from robustdice.errors import ClusterError
from robustdice.failure.evaluate import Evaluation
from robustdice.plan import publishers
from robustdice.report.sheet import Sheet
from robustdice.report.tables import percent, plan_summary, plan_table
from robustdice.runtime.answer import Answer
from robustdice.runtime.cluster import LocalCluster

DEVICES = 4
SCORING_IMAGES = 64
ACT_AFTER = 20
"""Frames of a phase that are answered before something is done to a device."""
SETTLE_SECONDS = 120.0
"""The longest that a phase may take. Far more than it needs, again."""
TIMEOUT_SECONDS = 10.0
"""For each answer. Far more than it takes: a machine that is busy with other things must not spoil the story."""
MODEL = "robustdice.demo.network:digits_cnn"


@dataclass(frozen=True)
class Phase:
    """What happens to which devices while frames stream, and who is down from then on."""

    title: str
    act: Callable[[LocalCluster], None]
    down: frozenset[int]


@dataclass(frozen=True)
class PhaseResult:
    """What came back in a phase. A frame is *settled* when exactly the devices that are up at the phase's end have
    answered it, and in transition otherwise: then it was sent once more. Every image has one settled frame in the end,
    and these are what ``accuracy`` and ``predicted`` are about."""

    phase: Phase
    frames: int
    answered: int
    settled: int
    accuracy: float
    predicted: float
    transition_accuracy: float | None
    """Of the frames in transition, unanswered ones being wrong; None when there were none."""
    full_coverage: int
    frames_per_second: float

    def to_json(self) -> dict[str, Any]:
        """A phase of ``demo --json``."""
        return {
            "title": self.phase.title,
            "down": sorted(self.phase.down),
            "frames": self.frames,
            "answered": self.answered,
            "settled": self.settled,
            "accuracy": self.accuracy,
            "predicted_accuracy": self.predicted,
            "full_coverage": self.full_coverage,
            "in_transition": self.frames - self.settled,
            "transition_accuracy": self.transition_accuracy,
            "frames_per_second": self.frames_per_second,
        }


PHASES = (
    Phase("all up", lambda cluster: None, frozenset()),  # noqa: ARG005
    Phase("0 killed", lambda cluster: cluster.kill(0), frozenset({0})),
    Phase("2 killed", lambda cluster: cluster.kill(2), frozenset({0, 2})),
    Phase("3 killed", lambda cluster: cluster.kill(3), frozenset({0, 2, 3})),
    Phase("all restarted", lambda cluster: _restart(cluster, 0, 2, 3), frozenset()),
    Phase("1 frozen", lambda cluster: cluster.freeze(1), frozenset({1})),
    Phase("1 thawed", lambda cluster: cluster.thaw(1), frozenset()),
)


def run_demo(memory: str, frames: int, seed: int, console: Console) -> dict[str, Any]:
    """Tell the story on ``console``; the document that ``demo --json`` prints.

    The first ``frames`` test images are streamed in each phase. What was started is ended, whatever happens.
    """
    _heading(console, "1. A trained network, and how important its neurons are")
    network = rd.load_model(MODEL)
    test = rd.load_data("digits", network.preprocessing, network.outputs)
    training = rd.load_data("digits", network.preprocessing, network.outputs, split="train")
    weights = sum(layer.neurons * layer.neuron_weights for layer in network.plan_layers)
    console.print(
        f"A CNN of {len(network.layers)} layers and {weights:,} parameters, trained on digits (scikit-learn's)."
    )
    started = time.perf_counter()
    scores = rd.score(network, training.sample(SCORING_IMAGES, seed).images())
    console.print(
        f"Its {sum(map(len, scores.scores))} neurons scored with {SCORING_IMAGES} training images in "
        f"{time.perf_counter() - started:.1f} s: L1 norm, connection sensitivity, removal divergence."
    )

    _heading(console, f"2. A plan for {DEVICES} devices, and what it will be worth")
    plan = rd.partition(network, scores, devices=DEVICES, memory=memory)
    console.print(plan_table(plan))
    console.print(plan_summary(plan))
    plans = {
        "robustdice": plan,
        "lop": rd.partition(network, devices=DEVICES, method="lop"),
        "full": rd.partition(network, devices=DEVICES, method="full"),
    }
    evaluations = {name: rd.evaluate(network, method, test) for name, method in plans.items()}
    console.print(_prediction_table(evaluations))

    _heading(console, f"3. {DEVICES} processes answer while devices die and return")
    console.print("Devices are killed with SIGKILL, frozen with SIGSTOP and thawed with SIGCONT, while frames stream.")
    count = min(frames, len(test))
    images, labels = test.images(0, count), test.labels[:count]
    streamed = rd.Dataset(f"the first {count} of them", labels, test.read)
    predicted = rd.evaluate(network, plan, streamed).accuracy
    with tempfile.TemporaryDirectory(prefix="robustdice-demo-") as directory:
        rd.build(network, plan, Path(directory) / "build")
        with rd.LocalCluster(Path(directory) / "build", timeout_seconds=TIMEOUT_SECONDS) as cluster:
            results = []
            for phase in PHASES:
                result = _run_phase(cluster, phase, images, labels, predicted)
                results.append(result)
                console.print(_phase_line(result))
    console.print(_phase_table(results, count))
    return {
        "clean_accuracy": evaluations["robustdice"].clean,
        "memory_share": plan.memory_share,
        "phases": [result.to_json() for result in results],
        "methods": {
            name: {
                "memory_share": result.memory_share,
                "worst": {str(size): result.by_size[size].worst for size in range(1, DEVICES)},
            }
            for name, result in evaluations.items()
        },
    }


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _run_phase(
    cluster: LocalCluster,
    phase: Phase,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    predicted: Mapping[frozenset[int], float],
) -> PhaseResult:
    manifest = load_bundle(cluster.directory / "device-0").manifest
    expected = tuple(
        tuple(-1 if device is None else device for device in publishers(exchange.shards, phase.down))
        for exchange in manifest.exchanges
    )
    settled: dict[int, Answer] = {}
    moving: list[tuple[int, Answer]] = []
    start = time.perf_counter()
    while pending := [number for number in range(len(images)) if number not in settled]:
        if (seconds := time.perf_counter() - start) > SETTLE_SECONDS:
            raise ClusterError(
                f"phase '{phase.title}': after {seconds:.0f} s exactly the devices that are up have not answered "
                f"{len(pending)} of {len(images)} frames; give this machine less else to do"
            )
        act = phase.act if not moving and not settled else None
        for number, answer in zip(pending, cluster.client.stream(_frames(cluster, images[pending], act)), strict=True):
            if answer.outputs is not None and answer.sources == expected and phase.down == frozenset(answer.down):
                settled[number] = answer
            else:
                moving.append((number, answer))
    seconds = time.perf_counter() - start
    answers = [*settled.values(), *(answer for _, answer in moving)]
    return PhaseResult(
        phase=phase,
        frames=len(answers),
        answered=sum(answer.outputs is not None for answer in answers),
        settled=len(settled),
        accuracy=float(np.mean([answer.class_index == labels[number] for number, answer in settled.items()])),
        predicted=predicted[phase.down],
        transition_accuracy=float(np.mean([a.class_index == labels[k] for k, a in moving])) if moving else None,
        full_coverage=sum(answer.outputs is not None and answer.coverage == 1 for answer in answers),
        frames_per_second=len(answers) / seconds,
    )


def _frames(
    cluster: LocalCluster, images: NDArray[np.float32], act: Callable[[LocalCluster], None] | None
) -> Iterator[NDArray[np.float32]]:
    """The images; ``act`` happens when some of them are on their way."""
    for number, image in enumerate(images):
        if act is not None and number == min(ACT_AFTER, len(images) // 4):
            act(cluster)
        yield image


def _restart(cluster: LocalCluster, *devices: int) -> None:
    for device in devices:
        cluster.restart(device)


def _prediction_table(evaluations: dict[str, Evaluation]) -> Sheet:
    first = evaluations["robustdice"]
    sizes = [f"{size} down" for size in range(1, DEVICES)]
    table = Sheet(
        "Predicted top-1 accuracy in %, worst failure set (mean of all)",
        *("method", "memory", *sizes),
        caption=f"Measured with the network in one process on {first.samples} images of {first.data}. "
        f"The unpartitioned model: {percent(first.clean)}.",
    )
    for name, result in evaluations.items():
        cells = [f"{100 * s.worst:.1f} ({100 * s.mean:.1f})" for size, s in result.by_size.items() if size]
        table.add_row(name, percent(result.memory_share), *cells)
    return table


def _phase_line(result: PhaseResult) -> str:
    moving = result.frames - result.settled
    beside = "" if result.transition_accuracy is None else f", {percent(result.transition_accuracy)} of them right"
    return (
        f"{result.phase.title}: {result.answered} of {result.frames} frames answered, {moving} while things changed"
        f"{beside}; then accuracy {percent(result.accuracy)} (predicted {percent(result.predicted)})"
    )


def _phase_table(results: list[PhaseResult], count: int) -> Sheet:
    headings = ("phase", "frames", "answered", "complete", "settled %", "predicted %", "moving", "moving %", "fps")
    sheet = Sheet(
        f"Measured, {count} images in each phase",
        *headings,
        caption="settled: accuracy of the frames that exactly the devices up at the end of the phase have answered, "
        "one for each image. predicted: for the same images, by the network in one process. moving: frames that were "
        "answered otherwise, because something had not happened yet or was just happening, and their accuracy; these "
        "images were sent once more. complete: answered with all neurons.",
    )
    for result in results:
        moving = result.transition_accuracy
        sheet.add_row(
            result.phase.title,
            str(result.frames),
            str(result.answered),
            str(result.full_coverage),
            f"{100 * result.accuracy:.1f}",
            f"{100 * result.predicted:.1f}",
            str(result.frames - result.settled),
            "" if moving is None else f"{100 * moving:.1f}",
            f"{result.frames_per_second:.0f}",
        )
    return sheet
