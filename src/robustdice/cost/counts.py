"""What a plan costs while every device is up: what is counted, and what follows from counts alone (NumPy only)."""

from __future__ import annotations

from dataclasses import dataclass

from robustdice.plan import Plan


@dataclass(frozen=True)
class Costs:
    """Of one frame: the number of ``exchanges``, the bytes that are handed over in them (each activation counted
    once), and the share of the multiply-adds that the busiest device computes. ``frame_parallel``: nothing is
    exchanged, so that a device computes a frame alone while others compute the next ones.

    ``speedup`` is modelled: how many times the frames of one device with the whole model come out in a second. Devices
    are equally fast, multiply-adds alone take time, and exchanges none; links make it less where there are exchanges.
    """

    exchanges: int
    exchanged_bytes: int
    compute_share: float
    frame_parallel: bool
    speedup: float


def costs_of(plan: Plan) -> Costs:
    """The costs of a plan."""
    exchanges = plan.exchanges
    share = plan.healthy_compute_share
    speedup = float(plan.devices) if not exchanges else 1 / share
    return Costs(exchanges, sum(map(plan.exchanged_bytes, range(len(plan.layers)))), share, not exchanges, speedup)
