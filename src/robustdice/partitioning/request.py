"""What every partitioning method is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from robustdice.errors import PlanError
from robustdice.importance.values import Importance
from robustdice.partitioning.precision import Kinds, kinds_of
from robustdice.plan import Layer, ModelReference, Shard


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`robustdice.partitioning.partition`, as they were given; of the scores, those columns that
    were asked for. ``network`` is the :class:`robustdice.Network`, where there is one: methods may look into it.
    ``precision`` says what primaries and spares will be kept in: it matters to the bytes that a method counts."""

    layers: Sequence[Layer]
    importance: Importance | None
    devices: int
    memory: float | str | None
    threshold: float | Sequence[float] | None
    normalisation: str
    shared_weights: int
    model: ModelReference
    network: Any = None
    precision: tuple[str, str] = ("float32", "float32")

    @property
    def kinds(self) -> list[Kinds]:
        """The representations of every layer's primaries and spares."""
        return kinds_of(self.layers, *self.precision)

    def refuse_budget(self, method: str) -> None:
        """PlanError when a memory or a threshold was given to a method that has no use for it."""
        for name, value in (("memory", self.memory), ("threshold", self.threshold)):
            if value is not None:
                raise PlanError(
                    f"method {method} takes no {name} (got {value!r}): what each device holds follows from the "
                    "number of devices alone; leave it out, or take method robustdice"
                )


@dataclass(frozen=True)
class Answer:
    """The shards of every layer, the settings worth recording in the plan, and where it comes from."""

    shards: tuple[tuple[Shard, ...], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def check_scores_fit(importance: Importance, layers: Sequence[Layer], model: ModelReference) -> None:
    """PlanError when scores are of another model."""
    names = tuple(layer.name for layer in layers)
    if importance.names != names:
        differing = next(
            (
                f"layer {i} is {a!r} in the model, {b!r} in the scores"
                for i, (a, b) in enumerate(zip(names, importance.names, strict=False))
                if a != b
            ),
            f"{len(names)} layers in the model, {len(importance.names)} in the scores",
        )
        raise PlanError(f"the scores are of another model ({differing}); score this model")
    if importance.model.digest != model.digest:
        raise PlanError(
            f"the scores are of {importance.model.source} with digest {importance.model.digest[:12]}, the model is "
            f"{model.source} with {model.digest[:12]}; score this model"
        )
    for layer, scores in zip(layers, importance.scores, strict=True):
        units = layer.neurons // layer.group
        if len(scores) != units:
            raise PlanError(
                f"layer {layer.name} has {units} units to deal out, the scores have {len(scores)}; score this model"
            )
