"""LOP, the paper's baseline: equal contiguous slices of every layer, and no copies."""

from __future__ import annotations

from collections.abc import Sequence

from robustdice.partitioning.request import Answer, Request
from robustdice.plan import Holder, Layer, Shard


def lop(request: Request) -> Answer:
    """Layer output partitioning; PlanError when a memory or a threshold is asked for."""
    request.refuse_budget("lop")
    return Answer(shards=slices(request.layers, request.devices), settings={})


def slices(layers: Sequence[Layer], devices: int) -> tuple[tuple[Shard, ...], ...]:
    """One shard per layer and device, in the order of the devices; none where a layer has too few units.

    Sizes differ by at most one unit within a layer. The devices with one more are the next in turn after those
    of the layers before, so that none of them gets the surplus of every layer.
    """
    shards = []
    turn = 0
    for layer in layers:
        size, surplus = divmod(layer.neurons // layer.group, devices)
        bounds = [0]
        for device in range(devices):
            larger = (device - turn) % devices < surplus
            bounds.append(bounds[-1] + (size + larger) * layer.group)
        turn = (turn + surplus) % devices
        shards.append(
            tuple(
                Shard(neurons=tuple(range(bounds[device], bounds[device + 1])), holders=(Holder(device),))
                for device in range(devices)
                if bounds[device] < bounds[device + 1]
            )
        )
    return tuple(shards)
