"""Which device holds which neurons (NumPy only)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from robustdice.errors import PlanError
from robustdice.importance.values import Importance
from robustdice.partitioning import own
from robustdice.partitioning.cdc import cdc
from robustdice.partitioning.distribute import to_shards
from robustdice.partitioning.lop import lop
from robustdice.partitioning.paired import check_pairs, with_all, without_some
from robustdice.partitioning.replicate import full
from robustdice.partitioning.request import Answer, Request, check_scores_fit
from robustdice.partitioning.robust import robustdice
from robustdice.plan import Layer, ModelReference, Plan, Strips, check_devices
from robustdice.provenance import versions

__all__ = ["METHODS", "SPLITS", "Answer", "Method", "Request", "partition", "to_shards"]

METHODS: dict[str, Callable[[Request], Answer]] = {"robustdice": robustdice, "lop": lop, "cdc": cdc, "full": full}
"""The ways to partition, by name."""
WITHOUT_SCORES = frozenset({"lop", "cdc", "full"})
"""Those that look at no scores."""
SPLITS = ("neurons", "hidden", "rows", "auto")
"""The ways to split layers that a plan can be asked for."""

JUDGED = ("rows", "auto")
"""Those among which the cost model chooses, for a goal."""

Method = str | own.Own
"""A way to partition: one of these names, ``package.module:function``, or a function."""


def check_split(split: str, method: object = "", goal: str | None = None) -> None:
    """PlanError for a way to split layers that is not known, that a method has no use for, or where nothing is chosen
    for a goal."""
    if split not in SPLITS:
        raise PlanError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if method == "full" and split in ("hidden", "auto"):
        raise PlanError(
            f"method full has every layer on every device: there is nothing to split {split}; leave out the split, or "
            "take rows"
        )
    if goal is not None and split not in JUDGED:
        raise PlanError(
            f"nothing is chosen for {goal} where layers are split by {split}: take split {' or '.join(JUDGED)} "
            "or method auto, or leave out the goal (--for)"
        )


def partition(
    layers: Sequence[Layer],
    importance: Importance | None,
    *,
    devices: int,
    method: Method = "robustdice",
    memory: float | str | None = None,
    threshold: float | Sequence[float] | None = None,
    columns: Sequence[str] | None = None,
    normalisation: str = "minmax",
    shared_weights: int,
    model: ModelReference,
    network: Any = None,
    precision: tuple[str, str] = ("float32", "float32"),
    pairs: Mapping[int, int] = MappingProxyType({}),
    run: Strips | None = None,
    whole: Collection[int] = (),
) -> Plan:
    """A plan for ``layers`` on ``devices`` devices (2 to 16).

    ``method`` is one of :data:`METHODS`, or a function (or its name, ``package.module:function``) from a
    :class:`Request` to the shards of every layer, or to an :class:`Answer`. ``robustdice`` needs the layers'
    ``importance`` and takes either ``memory``, what the largest device may hold (a share of the model such as 0.5, or
    an amount such as ``"80MB"``; 0.5 when nothing is said), or ``threshold``, the distance in scores below which
    neurons count as similar (one for all layers or one per layer). ``columns`` are the scores that distances are
    taken over (all there are), after ``normalisation`` (``minmax``, ``rank`` or ``none``) within each layer.
    ``shared_weights`` counts the parameters outside of all layers. Functions find ``network`` in their request.
    The plan's copies are float32; ``precision`` are the representations of primaries and spares that they will be
    rounded to, for which ``memory`` is meant. Of ``pairs``, layers and the one layer that reads each alone
    (:func:`robustdice.model.pairs.possible_pairs`), methods are asked about the first, as a layer whose neurons come
    with the weights that read them; about those of a ``run`` that is computed in strips, and about those that are to be
    ``whole`` on every device, they are not asked. PlanError when no such plan exists.
    """
    if isinstance(method, str) and method not in METHODS and ":" not in method:
        raise PlanError(f"unknown method {method!r}; known: {', '.join(METHODS)}, and package.module:function")
    check_devices(devices)
    if not layers:
        raise PlanError("the model has no layer that can be partitioned: no convolution, no linear layer")
    if method in WITHOUT_SCORES:
        importance = None
    if importance is not None:
        check_scores_fit(importance, layers, model)
        importance = importance if columns is None else importance.select(columns)
    name = method if isinstance(method, str) else own.name_of(method)
    check_pairs(name, pairs, precision)
    request = Request(
        layers=layers,
        importance=importance,
        devices=devices,
        memory=memory,
        threshold=threshold,
        normalisation=normalisation,
        shared_weights=shared_weights,
        model=model,
        network=network,
        precision=precision,
    )
    by_all = frozenset(whole) | frozenset(() if run is None else run.layers)
    asked = without_some(request, pairs, by_all)
    if name in METHODS:
        return _plan(request, name, METHODS[name](asked), pairs, by_all, run)
    function = own.find(method) if isinstance(method, str) else method
    try:
        return _plan(request, name, own.ask(function, name, asked), pairs, by_all, run)
    except PlanError as error:
        raise error if name in str(error) else PlanError(f"method {name}: {error}") from error


def _plan(
    request: Request,
    method: str,
    answer: Answer,
    pairs: Mapping[int, int],
    by_all: frozenset[int],
    run: Strips | None,
) -> Plan:
    scores, (shards, left) = request.importance, with_all(answer.shards, request, pairs, by_all)
    used = {} if scores is None else {"scores": {"digest": scores.digest, **scores.settings, **scores.provenance}}
    return Plan(
        devices=request.devices,
        layers=tuple(request.layers),
        shards=shards,
        pairs=left,
        strips=() if run is None else (run,),
        shared_weights=request.shared_weights,
        method=method,
        model=request.model,
        settings=answer.settings,
        provenance={**used, **answer.provenance, "versions": versions("numpy")},
    )
