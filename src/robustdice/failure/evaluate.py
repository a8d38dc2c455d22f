"""Network, plans, labelled images -> the accuracy that is left for every set of failed devices."""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.errors import DataError
from robustdice.failure.copies import Copies, State, intact, state_of
from robustdice.failure.passes import run_under
from robustdice.files import write_csv
from robustdice.markup import html_table
from robustdice.model.data import UNKNOWN, Dataset
from robustdice.model.fits import check_plan_fits
from robustdice.model.load import reload_model
from robustdice.model.network import Network, images_at_once, on_best_device
from robustdice.plan import MAX_SETS, FailureSet, ModelReference, Plan, check_max_failed, failure_sets
from robustdice.progress import Progress, shown, silent
from robustdice.tasks import Checkpoint, run_tasks

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Images [n, channels, height, width] and their labels [n]."""


@dataclass(frozen=True)
class SizeSummary:
    """Accuracy over the failure sets of one size: ``sets`` of the ``of`` that exist were measured."""

    worst: float
    mean: float
    best: float
    sets: int
    of: int

    @property
    def sampled(self) -> bool:
        """Whether the sets are a sample: then the worst may be worse, and the best better, than what was seen."""
        return self.sets < self.of


@dataclass(frozen=True)
class Evaluation:
    """Measured top-1 accuracy (fractions) on ``samples`` images of ``data``: of the unpartitioned float32 model
    (``clean``), and of the plan for failure sets: all of each size, or a sample of them, with values rounded as they
    travel (``wire``)."""

    clean: float
    samples: int
    data: str
    method: str
    devices: int
    memory_share: float
    accuracy: Mapping[FailureSet, float]
    wire: str = "float32"

    @cached_property
    def by_size(self) -> dict[int, SizeSummary]:
        """Worst, mean and best accuracy for each number of failed devices."""
        sizes = sorted({len(failed) for failed in self.accuracy})
        summaries = {}
        for size in sizes:
            values = [value for failed, value in self.accuracy.items() if len(failed) == size]
            exist = math.comb(self.devices, size)
            summaries[size] = SizeSummary(min(values), statistics.fmean(values), max(values), len(values), exist)
        return summaries

    def to_rows(self) -> list[dict[str, Any]]:
        """A dictionary for every failure set that was measured: who is ``down`` ("0,2"), how many have ``failed``, the
        ``accuracy`` that is left, and what it was measured of and on."""
        about = {
            "method": self.method,
            "wire": self.wire,
            "devices": self.devices,
            "memory_share": self.memory_share,
            "clean": self.clean,
            "samples": self.samples,
            "data": self.data,
        }
        return [
            {"down": ",".join(map(str, sorted(failed))), "failed": len(failed), "accuracy": accuracy, **about}
            for failed, accuracy in self.accuracy.items()
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_rows` to a CSV file; OutputError when that is not possible."""
        write_csv(Path(path), self.to_rows())

    def __repr__(self) -> str:
        left = ", ".join(f"{size} down {100 * s.worst:.1f} to {100 * s.best:.1f} %" for size, s in self.by_size.items())
        return f"<Evaluation of {self.method} on {self.samples:,} images of {self.data}: {left}>"

    def _repr_html_(self) -> str:
        """For notebooks: worst, mean and best for each number of failed devices."""
        rows = [
            [str(size), *(f"{100 * value:.1f} %" for value in (s.worst, s.mean, s.best)), f"{s.sets} of {s.of}"]
            for size, s in self.by_size.items()
        ]
        caption = (
            f"{self.method}, at most {self.memory_share:.1%} of the model each: top-1 accuracy on {self.samples:,} "
            f"images of {self.data}; the model alone {100 * self.clean:.1f} %"
        )
        return html_table(["devices down", "worst", "mean", "best", "failure sets"], rows, caption)


def evaluate(
    network: Network,
    plan: Plan,
    dataset: Dataset,
    *,
    max_failed: int | None = None,
    max_sets: int = MAX_SETS,
    seed: int = 0,
    scheduler: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    on_progress: Progress = silent,
) -> Evaluation:
    """Run ``dataset`` through the network as the plan leaves it for every failure set of up to ``max_failed``
    devices (default: all but one), or for ``max_sets`` of them, drawn with ``seed``, where there are more.

    ``checkpoint`` keeps what is finished when the work is interrupted, and is left to the caller; ``scheduler`` is a
    Dask scheduler's address; ``progress`` shows a bar, ``on_progress`` is told. PlanError when the plan was made for
    another model; DataError with a list of the bad images, before anything is computed as far as they can be told;
    OutputError when a checkpoint is of other work.
    """
    (result,) = evaluate_plans(
        network,
        [plan],
        dataset,
        max_failed=max_failed,
        max_sets=max_sets,
        seed=seed,
        scheduler=scheduler,
        checkpoint=checkpoint,
        progress=progress,
        on_progress=on_progress,
    )
    return result


def evaluate_plans(
    network: Network,
    plans: Sequence[Plan],
    dataset: Dataset,
    *,
    max_failed: int | None = None,
    max_sets: int = MAX_SETS,
    seed: int = 0,
    scheduler: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    on_progress: Progress = silent,
) -> list[Evaluation]:
    """As :func:`evaluate`, several plans of one network on the same images: what they have in common is shared."""
    for plan in plans:
        check_plan_fits(network, plan)
    if np.any(dataset.labels == UNKNOWN):
        raise DataError(f"{dataset.name} was loaded without labels; accuracy needs them")
    dataset = dataset.checked()
    chosen = [choose_failure_sets(plan.devices, max_failed, max_sets, seed) for plan in plans]
    states = _States(network, plans, chosen)
    size = images_at_once(network)
    kept = None
    if checkpoint is not None:
        sets = [[sorted(failed) for failed in of_plan] for of_plan in chosen]
        of = {"plans": [plan.digest for plan in plans], "sets": sets, "data": dataset.name, "batch": size}
        kept = Checkpoint(checkpoint, {"what": "evaluation", **of})
    # A batch is known by its images, so that what is finished stays of use when others are repaired.
    batches = {
        f"{start} {dataset.digest_of(start, start + size)[:32]}": slice(start, min(start + size, len(dataset)))
        for start in range(0, len(dataset), size)
    }
    read_ahead = _ReadAhead(lambda key: _read(dataset, batches[key]), list(batches))
    with shown("evaluating", progress, on_progress) as told, read_ahead as read:
        counts = run_tasks(
            _count,
            list(batches),
            read,
            states,
            recreate=partial(_recreate, network.reference, plans, chosen),
            scheduler=scheduler,
            checkpoint=kept,
            cost=lambda key: batches[key].stop - batches[key].start,
            on_progress=told,
        )
    totals = np.sum(list(counts.values()), axis=0) / len(dataset)
    return [
        Evaluation(
            clean=float(totals[states.clean]),
            samples=len(dataset),
            data=dataset.name,
            method=plan.method,
            devices=plan.devices,
            memory_share=plan.memory_share,
            accuracy={failed: float(totals[state]) for failed, state in zip(sets, of_plan, strict=True)},
            wire=plan.wire,
        )
        for plan, sets, of_plan in zip(plans, chosen, states.of_plans, strict=True)
    ]


def choose_failure_sets(
    devices: int, max_failed: int | None = None, max_sets: int = MAX_SETS, seed: int = 0
) -> list[FailureSet]:
    """The failure sets of up to ``max_failed`` devices (all but one) to measure, by size.

    All of them, as long as these are no more than ``max_sets``. Else every size gets its share, the small ones all
    that they have, and of the larger ones that many are drawn, each at most once.
    """
    check_max_failed(devices, max_failed)
    largest = devices - 1 if max_failed is None else max_failed
    sizes = sorted(range(largest + 1), key=lambda size: math.comb(devices, size))
    left, shares = max(max_sets, len(sizes)), {}
    for position, size in enumerate(sizes):
        shares[size] = min(math.comb(devices, size), left // (len(sizes) - position))
        left -= shares[size]
    chosen: list[FailureSet] = []
    for size in range(largest + 1):
        if shares[size] == math.comb(devices, size):
            chosen.extend(failure_sets(devices, size))
            continue
        generator = np.random.default_rng([seed, size])
        drawn: set[FailureSet] = set()
        while len(drawn) < shares[size]:
            drawn.add(frozenset(generator.choice(devices, size, replace=False).tolist()))
        chosen.extend(sorted(drawn, key=sorted))
    return chosen


class _States:
    """The different states that some plans leave a network in: ``states`` of each plan's weights, and their numbers.

    ``of_plans`` has the number of the state of every failure set of every plan, ``clean`` that of the intact network.
    """

    def __init__(self, network: Network, plans: Sequence[Plan], chosen: Sequence[Sequence[FailureSet]]) -> None:
        self.network = network
        self.runs: list[tuple[Copies, list[State]]] = [(Copies(network, {}), [])]
        """Plans without coarse weights share their passes, in the first of these; each other plan has its own."""
        numbers: dict[tuple[int, bytes], int] = {}
        placed: list[tuple[int, int]] = []  # in which run, and where in it

        def number(run: int, state: State) -> int:
            key = (run, state.key)
            if key not in numbers:
                numbers[key] = len(placed)
                placed.append((run, len(self.runs[run][1])))
                self.runs[run][1].append(state)
            return numbers[key]

        self.clean = number(0, intact(network))
        self.of_plans: list[list[int]] = []
        for plan, sets in zip(plans, chosen, strict=True):
            run = 0
            if plan.coarse:
                run = len(self.runs)
                self.runs.append((Copies.of(network, plan), []))
            self.of_plans.append([number(run, state_of(plan, failed)) for failed in sets])
        starts = np.cumsum([0, *(len(states) for _, states in self.runs)])
        self.order = [int(starts[run]) + position for run, position in placed]
        """Where each number's result stands among those of all runs."""


def _count(states: _States, batch: Batch) -> list[int]:
    """How many images of the batch each state answers rightly."""
    images = on_best_device(torch.from_numpy(batch[0]))
    labels = torch.from_numpy(batch[1]).to(images.device)
    counts = [
        count_correct(scores, labels)
        for copies, of_run in states.runs
        for scores in run_under(states.network, images, of_run, copies)
    ]
    return [counts[position] for position in states.order]


def _recreate(model: ModelReference, plans: Sequence[Plan], chosen: Sequence[Sequence[FailureSet]]) -> _States:
    return _States(reload_model(model), plans, chosen)


def _read(dataset: Dataset, batch: slice) -> Batch:
    return dataset.images(batch.start, batch.stop), dataset.labels[batch]


class _ReadAhead:
    """Items in the order of ``keys``, each read by a second thread while the one before it is worked on."""

    def __init__(self, read: Callable[[str], Batch], keys: Sequence[str]) -> None:
        self._read = read
        self._following = dict(itertools.pairwise(keys))
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[str, Future[Batch]] | None = None

    def __enter__(self) -> _ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, key: str) -> Batch:
        future = self._ahead[1] if self._ahead and self._ahead[0] == key else self._thread.submit(self._read, key)
        following = self._following.get(key)
        self._ahead = None if following is None else (following, self._thread.submit(self._read, following))
        return future.result()


def count_correct(scores: torch.Tensor, labels: torch.Tensor) -> int:
    """How many rows of class scores [n, classes] name the label [n]; a row without any class score names none."""
    answered = scores.isneginf().logical_not().any(1)
    return int(((scores.argmax(1) == labels) & answered).sum())
