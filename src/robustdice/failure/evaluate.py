"""Network, plan, labelled images -> the accuracy that is left for every set of failed devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from robustdice.errors import PlanError
from robustdice.model.data import Dataset
from robustdice.model.network import Network, check_plan_fits
from robustdice.plan import FailureSet, Plan, failure_sets
from robustdice.progress import Progress, silent

BATCH_ELEMENTS = 1_000_000
"""Largest temporary, in numbers: larger ones cost more in page faults than they save in calls."""


@dataclass(frozen=True)
class SizeSummary:
    """Accuracy over all failure sets of one size."""

    worst: float
    mean: float
    best: float


@dataclass(frozen=True)
class Evaluation:
    """Measured top-1 accuracy (fractions) on ``samples`` images of ``data``: of the unpartitioned float32 model
    (``clean``), and of the plan for every failure set."""

    clean: float
    samples: int
    data: str
    method: str
    memory_share: float
    accuracy: Mapping[FailureSet, float]

    @cached_property
    def by_size(self) -> dict[int, SizeSummary]:
        """Worst, mean and best accuracy for each number of failed devices."""
        sizes = sorted({len(failed) for failed in self.accuracy})
        summaries = {}
        for size in sizes:
            values = [value for failed, value in self.accuracy.items() if len(failed) == size]
            summaries[size] = SizeSummary(min(values), float(np.mean(values)), max(values))
        return summaries


def evaluate(
    network: Network,
    plan: Plan,
    dataset: Dataset,
    *,
    max_failed: int | None = None,
    on_progress: Progress = silent,
) -> Evaluation:
    """Run ``dataset`` through the network as the plan leaves it for every failure set of up to ``max_failed``
    devices (default: all but one). Failure sets that leave the same neurons share their passes.

    PlanError when the plan was made for another model.
    """
    check_plan_fits(network, plan)
    largest = plan.devices - 1 if max_failed is None else max_failed
    if not 0 <= largest < plan.devices:
        raise PlanError(f"of {plan.devices} devices 0 to {plan.devices - 1} can fail, not {largest}")
    every = [failed for size in range(largest + 1) for failed in failure_sets(plan.devices, size)]
    survivors = {failed: plan.surviving_neurons(failed) for failed in every}
    keys = {failed: b"".join(mask.tobytes() for mask in masks) for failed, masks in survivors.items()}
    distinct = {keys[failed]: [torch.tensor(mask) for mask in survivors[failed]] for failed in every}
    correct = dict.fromkeys(distinct, 0)
    clean = 0
    with torch.no_grad():
        done = 0
        for images, labels in dataset.batches(_images_at_once(network)):
            batch, wanted = torch.from_numpy(images), torch.from_numpy(labels)
            clean += count_correct(network.run(batch), wanted)
            for key, masks in distinct.items():
                correct[key] += count_correct(network.run(batch, masks), wanted)
            done += len(images)
            on_progress(done, len(dataset))
    return Evaluation(
        clean=clean / len(dataset),
        samples=len(dataset),
        data=dataset.name,
        method=plan.method,
        memory_share=plan.memory_share,
        accuracy={failed: correct[keys[failed]] / len(dataset) for failed in every},
    )


def _images_at_once(network: Network) -> int:
    largest = max(int(np.prod(shape[1:])) for node, shape in network.shapes.items() if node.op == "call_function")
    return int(np.clip(BATCH_ELEMENTS // largest, 8, 64))


def count_correct(scores: torch.Tensor, labels: torch.Tensor) -> int:
    """How many rows of class scores [n, classes] name the label [n]; a row without any class score names none."""
    answered = scores.isneginf().logical_not().any(1)
    return int(((scores.argmax(1) == labels) & answered).sum())
