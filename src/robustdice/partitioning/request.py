"""What every partitioning method is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from robustdice.errors import PlanError
from robustdice.importance.values import Importance
from robustdice.plan import Layer, ModelReference, Shard


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`robustdice.partitioning.partition`, as they were given."""

    layers: Sequence[Layer]
    importance: Importance | None
    devices: int
    memory: float | str | None
    threshold: float | Sequence[float] | None
    columns: Sequence[str] | None
    normalisation: str
    shared_weights: int
    model: ModelReference

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
