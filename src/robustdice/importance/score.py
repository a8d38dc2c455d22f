"""Network, images -> importance: the paper's three scores of every neuron (section III-A), settled as in the docs.

What is scored is what is dealt out: a neuron, or in a grouped convolution a whole group of them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.errors import DataError, PlanError
from robustdice.importance.exact import removal_divergences, removal_macs
from robustdice.importance.gradients import (
    EVERY_CLASS_UP_TO,
    LIKELIEST,
    divergences,
    sensitivities,
    sum_filters,
    units_of,
)
from robustdice.importance.values import COLUMNS, Importance, rounded
from robustdice.model.data import Dataset
from robustdice.model.execute import attribute
from robustdice.model.load import reload_model
from robustdice.model.network import Network, on_best_device
from robustdice.plan import ModelReference
from robustdice.progress import Progress, shown, silent
from robustdice.provenance import versions
from robustdice.tasks import Checkpoint, run_tasks

S3_METHODS = ("auto", "exact", "fisher")

AUTO_EXACT_MACS = 2 * 10**12
"""``auto`` computes s3 exactly up to this many multiply-adds: about a minute on two cores."""
TASK_MACS = 10**11
"""Roughly what a task costs: seconds, so that little is lost by an interruption."""
PREFIX_SHARE = 4
"""A task of exact s3 costs at least so many times what the intact network costs, which it runs first."""


def score(
    network: Network,
    images: NDArray[np.float32] | Dataset,
    *,
    columns: Sequence[str] = COLUMNS,
    s3: str = "auto",
    scheduler: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    on_progress: Progress = silent,
) -> Importance:
    """Score every unit of every layer with ``images``, float32 [n, channels, height, width], or those of a data set,
    whose name and seed are then recorded; no labels are needed.

    s1 is the L1 norm of filter and bias, s2 the connection sensitivity against the model's own answers, s3 the
    Jensen-Shannon divergence (natural logarithm) after removal of the unit at the exchange: ``exact``, ``fisher`` (from
    a few backward passes, which say to first order how every removal moves the answer) or ``auto``, exact
    where that takes about a minute. ``checkpoint`` keeps what is finished when the work is interrupted, and is
    left to the caller; ``scheduler`` is a Dask scheduler's address. As many tasks run at once as torch has threads,
    each in one of them: so their number changes no bit of the scores. ``progress`` shows a bar, ``on_progress`` is
    told. DataError when the images do not fit the model; PlanError when ``columns`` or ``s3`` name something else;
    OutputError when the checkpoint is of other work.
    """
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise PlanError(f"unknown score {unknown[0]!r}; known: {', '.join(COLUMNS)}")
    if not columns or len(set(columns)) < len(columns):
        raise PlanError(f"name one or more different scores, not {', '.join(columns)!r}")
    check_s3(s3)
    name, seed = (images.name, images.seed) if isinstance(images, Dataset) else (None, None)
    if isinstance(images, Dataset):
        images = images.checked().images()
    if images.shape[1:] != network.input_shape or not len(images):
        raise DataError(
            f"images of shape {list(images.shape)}, the model takes [n, {', '.join(map(str, network.input_shape))}]"
        )
    settings: dict[str, Any] = {"samples": len(images)}
    if "s3" in columns:
        settings["s3"] = choose_s3(network, len(images)) if s3 == "auto" else s3
        settings["s3_chosen_by"] = "auto" if s3 == "auto" else "request"
        if settings["s3"] == "fisher":
            few = network.outputs <= EVERY_CLASS_UP_TO
            settings["s3_classes"] = "all" if few else f"the {LIKELIEST} likeliest, all others as one"
    work = _Work(network, _prepared(images), tuple(columns), settings)
    digest = hashlib.sha256(images.astype("<f4", copy=False).tobytes()).hexdigest()
    kept = None
    if checkpoint is not None:
        of = {"model": network.reference.digest, "images": digest}
        kept = Checkpoint(checkpoint, {"what": "scores", **of, "columns": list(columns), **settings})
    costs = work.tasks()
    total = sum(costs.values())
    furthest = 0

    def forward(done: int, total: int) -> None:
        nonlocal furthest
        furthest = max(furthest, done)
        told(furthest, total)

    work.on_part = lambda done, parts: forward(costs["s2"] * done // parts, total)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with shown("scoring", progress, on_progress) as told:
            found = run_tasks(
                _run,
                list(costs),
                lambda key: key,
                work,
                recreate=partial(_recreate, network.reference, images, tuple(columns), settings),
                scheduler=scheduler,
                checkpoint=kept,
                cost=costs.__getitem__,
                on_progress=forward,
                threads=threads if work.images.device.type == "cpu" else 1,
                stop=work.stop,
            )
        by_column = {name: work.column(name, found) for name in columns}
    finally:
        torch.set_num_threads(threads)
    return Importance(
        names=tuple(layer.layer.name for layer in network.layers),
        scores=tuple(
            rounded(np.stack([by_column[name][index] for name in columns], axis=1))
            for index in range(len(network.layers))
        ),
        columns=tuple(columns),
        model=network.reference,
        settings=settings,
        provenance={
            "data": {"name": name, "samples": len(images), "digest": digest},
            "seed": seed,
            "versions": versions("torch", "numpy"),
        },
    )


def check_s3(method: str) -> None:
    """PlanError unless s3 can be computed so."""
    if method not in S3_METHODS:
        raise PlanError(f"s3 is computed as {', '.join(S3_METHODS)}, not {method!r}")


def choose_s3(network: Network, images: int) -> str:
    """``exact`` where that costs little enough, else ``fisher``."""
    removals = sum(units_of(layer) * removal_macs(network, index) for index, layer in enumerate(network.layers))
    prefixes = max(removals // PREFIX_SHARE, len(network.layers) * forward_macs(network))
    return "exact" if images * (removals + prefixes) <= AUTO_EXACT_MACS else "fisher"


def forward_macs(network: Network) -> int:
    """Multiply-adds that the network costs for one image."""
    return sum(layer.neurons * layer.neuron_macs for layer in network.plan_layers)


def filter_norms(network: Network) -> list[NDArray[np.float64]]:
    """s1: sum of |weights| and |bias| of every unit's filters, float64 [units] per layer."""
    return [
        sum_filters(layer, [attribute(network.module, name).detach().abs() for name in layer.filters])
        for layer in network.layers
    ]


@dataclass
class _Work:
    """What all tasks of a scoring run have in common, and how the run is made of tasks.

    Tasks are ``s2``, ``fisher FIRST LAST`` for images, and ``exact LAYER FIRST LAST`` for units of a layer.
    """

    network: Network
    images: torch.Tensor
    columns: tuple[str, ...]
    settings: dict[str, Any]
    on_part: Callable[[int, int], None] = silent
    stop: threading.Event = field(default_factory=threading.Event)

    def go_on(self, _done: int = 0, _total: int = 0) -> None:
        """Called now and then by tasks; ends them when nobody waits for their results any more."""
        if self.stop.is_set():
            raise CancelledError

    def go_on_with_s2(self, done: int, total: int) -> None:
        """As :meth:`go_on`; the longest task says how far it is."""
        self.go_on()
        self.on_part(done, total)

    def tasks(self) -> dict[str, int]:
        """Every task and the multiply-adds that it costs, roughly."""
        costs: dict[str, int] = {}
        count, forward = len(self.images), forward_macs(self.network)
        if "s2" in self.columns:
            costs["s2"] = 3 * count * forward
        if self.settings.get("s3") == "fisher":
            each = (1 + min(self.network.outputs, LIKELIEST + 1)) * forward
            for first, last in _ranges(count, TASK_MACS // max(1, each)):
                costs[f"fisher {first} {last}"] = (last - first) * each
        if self.settings.get("s3") == "exact":
            for index, layer in enumerate(self.network.layers):
                each = count * removal_macs(self.network, index)
                at_once = max(TASK_MACS, PREFIX_SHARE * count * forward) // max(1, each)
                for first, last in _ranges(units_of(layer), at_once):
                    costs[f"exact {index} {first} {last}"] = count * forward + (last - first) * each
        return costs

    def column(self, name: str, found: dict[str, Any]) -> list[NDArray[np.float64]]:
        """A score of every layer, from the tasks' results."""
        layers = range(len(self.network.layers))
        if name == "s1":
            return filter_norms(self.network)
        if name == "s2":
            return [np.array(values) for values in found["s2"]]
        if self.settings["s3"] == "exact":
            return [np.concatenate([v for key, v in found.items() if key.startswith(f"exact {i} ")]) for i in layers]
        parts = [result for key, result in found.items() if key.startswith("fisher ")]
        return [np.sum([part[i] for part in parts], axis=0) / len(self.images) for i in layers]


def _ranges(count: int, at_once: int) -> list[tuple[int, int]]:
    """``count`` things in parts of ``at_once``, at least one, as pairs of a first and an end."""
    step = max(1, at_once)
    return [(first, min(first + step, count)) for first in range(0, count, step)]


def _run(work: _Work, task: str) -> Any:
    # Other numbers of threads take sums in another order: that is what makes the last bits of scores differ.
    torch.set_num_threads(1)
    kind, *numbers = task.split()
    if kind == "s2":
        return [values.tolist() for values in sensitivities(work.network, work.images, on_progress=work.go_on_with_s2)]
    if kind == "fisher":
        first, last = map(int, numbers)
        found = divergences(work.network, work.images[first:last], on_progress=work.go_on)
        return [(values * (last - first)).tolist() for values in found]
    index, first, last = map(int, numbers)
    return removal_divergences(work.network, work.images, index, range(first, last), on_progress=work.go_on).tolist()


def _recreate(
    reference: ModelReference,
    images: NDArray[np.float32],
    columns: tuple[str, ...],
    settings: dict[str, Any],
) -> _Work:
    return _Work(reload_model(reference), _prepared(images), columns, settings)


def _prepared(images: NDArray[np.float32]) -> torch.Tensor:
    return on_best_device(torch.from_numpy(np.ascontiguousarray(images, np.float32)))
