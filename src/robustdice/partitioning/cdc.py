"""CDC (Hadidi et al.): slices on all devices but one, and on that one their sum, from which any one slice follows."""

from __future__ import annotations

from robustdice.partitioning.lop import slices
from robustdice.partitioning.request import Answer, Request
from robustdice.plan import Holder, Shard


def cdc(request: Request) -> Answer:
    """Coded distributed computing; PlanError when a memory or a threshold is asked for.

    The last device is the parity device of every layer. What is lost with one device, whichever it is, can be computed
    exactly; with two devices down, what the other slices give is left.
    """
    request.refuse_budget("cdc")
    shards = tuple(
        (*members, Shard((), (Holder(request.devices - 1),), parity_of=tuple(range(len(members)))))
        for members in slices(request.layers, request.devices - 1)
    )
    return Answer(shards=shards, settings={})
