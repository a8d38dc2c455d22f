"""Full replication, the paper's Optimal (DMR, TMR, QMR): every device holds everything."""

from __future__ import annotations

from robustdice.partitioning.request import Answer, Request
from robustdice.plan import Holder, Layer, Shard


def full(request: Request) -> Answer:
    """Full replication; PlanError when a memory or a threshold is asked for."""
    request.refuse_budget("full")
    return Answer(shards=tuple(whole(layer, request.devices) for layer in request.layers), settings={})


def whole(layer: Layer, devices: int) -> tuple[Shard]:
    """A layer that every device holds, as one shard: all compute it, so that the order does not matter."""
    return (Shard(neurons=tuple(range(layer.neurons)), holders=tuple(map(Holder, range(devices)))),)
