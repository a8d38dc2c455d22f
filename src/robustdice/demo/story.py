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
from robustdice.failure.evaluate import Evaluation
from robustdice.report.sheet import Sheet
from robustdice.report.tables import percent, plan_summary, plan_table
from robustdice.runtime.cluster import LocalCluster

DEVICES = 4
SCORING_IMAGES = 64
ACT_AFTER = 20
"""Frames of a phase that are answered before something is done to a device."""
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
    """What came back in a phase. ``settled`` counts the frames that were answered without just the phase's ``down``."""

    phase: Phase
    frames: int
    answered: int
    accuracy: float
    predicted: float
    full_coverage: int
    settled: int
    frames_per_second: float

    def to_json(self) -> dict[str, Any]:
        """A phase of ``demo --json``."""
        return {
            "title": self.phase.title,
            "down": sorted(self.phase.down),
            "frames": self.frames,
            "answered": self.answered,
            "accuracy": self.accuracy,
            "predicted_accuracy": self.predicted,
            "full_coverage": self.full_coverage,
            "in_transition": self.frames - self.settled,
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
    console.rule("1. A trained network, and how important its neurons are")
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

    console.rule(f"2. A plan for {DEVICES} devices, and what it will be worth")
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

    console.rule(f"3. {DEVICES} processes answer while devices die and return")
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


def _run_phase(
    cluster: LocalCluster,
    phase: Phase,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    predicted: Mapping[frozenset[int], float],
) -> PhaseResult:
    answers = []
    act_after = min(ACT_AFTER, len(images) // 4)

    def frames() -> Iterator[NDArray[np.float32]]:
        for number, image in enumerate(images):
            if number == act_after:
                phase.act(cluster)
            yield image

    start = time.perf_counter()
    answers = list(cluster.client.stream(frames()))
    seconds = time.perf_counter() - start
    return PhaseResult(
        phase=phase,
        frames=len(images),
        answered=sum(answer.outputs is not None for answer in answers),
        accuracy=float(np.mean([a.class_index == label for a, label in zip(answers, labels, strict=True)])),
        predicted=predicted[phase.down],
        full_coverage=sum(answer.outputs is not None and answer.coverage == 1 for answer in answers),
        settled=sum(answer.outputs is not None and frozenset(answer.down) == phase.down for answer in answers),
        frames_per_second=len(images) / seconds,
    )


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
    return (
        f"{result.phase.title}: {result.answered} of {result.frames} frames answered, "
        f"accuracy {percent(result.accuracy)} (predicted {percent(result.predicted)})"
    )


def _phase_table(results: list[PhaseResult], count: int) -> Sheet:
    headings = ("phase", "answered", "moving", "complete", "accuracy", "predicted", "fps")
    table = Sheet(
        f"Measured, {count} frames in each phase",
        *headings,
        caption="moving: frames that were not answered by exactly the devices that are up at the end of the phase, "
        "because something had not happened yet, or was just happening. complete: answered with all neurons. "
        "predicted: for these very images, by the network in one process.",
    )
    for result in results:
        table.add_row(
            result.phase.title,
            str(result.answered),
            str(result.frames - result.settled),
            str(result.full_coverage),
            f"{100 * result.accuracy:.1f}",
            f"{100 * result.predicted:.1f}",
            f"{result.frames_per_second:.0f}",
        )
    return table
