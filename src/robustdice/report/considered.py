"""Plans that ``plan --method auto`` has considered: what each keeps and costs, and why one is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from robustdice.cost.counts import costs_of
from robustdice.cost.model import Judge, predict
from robustdice.cost.purpose import TOLERATED, Purpose, nearly_best
from robustdice.plan import MAX_SETS
from robustdice.report.sheet import Sheet
from robustdice.report.tables import percent

if TYPE_CHECKING:
    from robustdice.auto import Candidate

FASTER = 1.5
"""So many times as fast another plan has to be for that to be said."""


def considered_json(considered: Sequence[Candidate], judge: Judge) -> list[dict[str, Any]]:
    """Every plan that was considered, the one that is taken first; of those that do not fit, what they need."""
    found = []
    for each in considered:
        costs = costs_of(each.plan)
        modelled = predict(each.plan, judge.profile, judge.link)
        found.append(
            {
                "family": each.family,
                "fits": each.fits,
                "memory_share": each.plan.memory_share,
                "bytes_per_device": list(each.plan.bytes_per_device),
                "healthy_compute_share": costs.compute_share,
                "exchanges": costs.exchanges,
                "exchanged_activations": each.plan.exchanged_activations,
                "exchanged_bytes": costs.exchanged_bytes,
                "frame_parallel": costs.frame_parallel,
                "modelled_speedup": costs.speedup,
                "frames_per_second": modelled.frames_per_second,
                "latency_seconds": modelled.latency_seconds,
                "images": each.images,
                "unseen": each.unseen,
                "agreement": {str(size): share for size, share in enumerate(each.agreement)},
            }
        )
    return found


def considered_table(considered: Sequence[Candidate], judge: Judge) -> Sheet:
    """Every plan that was considered: what it keeps, and what it costs."""
    sizes = range(len(considered[0].agreement))
    devices = considered[0].plan.devices
    sample = ", or of a sample of them" if sum(math.comb(devices, size) for size in sizes) > MAX_SETS else ""
    table = Sheet(
        f"Answers like the intact network's, worst failure set{sample} (measured on "
        f"{considered[0].images} images that the plans were {'not ' if considered[0].unseen else ''}made with)",
        "considered",
        *("all up" if not size else f"{size} down" for size in sizes),
        "memory",
        "compute",
        "exchanges",
        "kB",
        "frames/s",
        "ms alone",
        caption="memory and compute: the largest device's share of the model; kB: handed over for an image in all "
        "exchanges; frames/s and ms alone: modelled, with several frames in flight and with one. Without exchanges "
        "frames go to the devices in turn.",
    )
    for each in considered:
        costs = costs_of(each.plan)
        memory = percent(each.plan.memory_share)
        family = each.family
        if each.fits and each.images < considered[0].images:
            family += f" (seen to be worse on {each.images})"
        if each.fits:
            exchanges = "none" if costs.frame_parallel else f"{costs.exchanges}"
            modelled = predict(each.plan, judge.profile, judge.link)
            figures = (percent(costs.compute_share), exchanges, f"{costs.exchanged_bytes / 1e3:.1f}")
            speed = (f"{modelled.frames_per_second:.3g}", f"{1e3 * modelled.latency_seconds:.3g}")
            table.add_row(family, *map(percent, each.agreement), memory, *figures, *speed)
        else:
            table.add_row(family, *("" for _ in sizes), f"needs {memory}")
    return table


def considered_summary(considered: Sequence[Candidate], judge: Judge, purpose: Purpose | None = None) -> str:
    """Which plan is taken, and what speaks for it."""
    taken = considered[0]
    costs = costs_of(taken.plan)
    kept = ", ".join(f"{percent(share)} with {size} down" for size, share in enumerate(taken.agreement) if size)
    kept = kept or f"{percent(taken.agreement[0])} while all are up"
    if taken.agreement[1:] and len(set(taken.agreement)) == 1:
        kept = f"{percent(taken.agreement[0])} with up to {len(taken.agreement) - 1} down"
    served = (
        "each frame is computed by one device alone, and frames go to the devices in turn"
        if costs.frame_parallel
        else f"each frame is computed by all devices together, in {costs.exchanges + 1} stages"
    )
    why, faster = ("", _faster(considered, judge)) if purpose is None else (_why(considered, judge, purpose), "")
    return f"Taken: {taken.family}.{why} It answers like the intact network in {kept}; {served}.{faster}"


def _faster(considered: Sequence[Candidate], judge: Judge) -> str:
    """What is worth knowing of the most accurate plan: that another one is much faster and keeps nearly as much."""
    as_well_known = [each for each in considered if each.images == considered[0].images]
    fastest = min(nearly_best(as_well_known), key=lambda each: judge.seconds(each.plan))
    if FASTER * judge.seconds(fastest.plan) > judge.seconds(considered[0].plan):
        return ""
    there, here = (_value(each, judge, judge.goal) for each in (fastest, considered[0]))
    return (
        f" Of the plans that answer like it at most {100 * TOLERATED:g} points less often, however many devices are "
        f"down, {fastest.family} is modelled to be the fastest: {there}, not {here}; with --for {judge.goal} speed "
        "decides."
    )


def _why(considered: Sequence[Candidate], judge: Judge, purpose: Purpose) -> str:
    """What the plan is better in than the others that keep as much, and than the most accurate one."""
    near = nearly_best(considered)
    taken, best = considered[0], max((each for each in considered if each.fits), key=lambda each: each.merit)
    rule = (
        f" Of the {len(near)} plans that answer like the intact network at most {100 * TOLERATED:g} points less often "
        f"than the most accurate one ({best.family}), however many devices are down, it is "
    )
    a, b = (_value(each, judge, purpose.name) for each in (taken, best))
    better = "the smallest" if purpose.name == "memory" else "modelled to be the fastest"
    said = f"{rule}{better}: {a}" + ("." if taken is best else f"; the most accurate one: {b}.")
    if purpose.name != "memory" and not taken.plan.exchanges:
        said += " No split of layers that keeps as much is modelled to be faster."
    return said


def _value(candidate: Candidate, judge: Judge, purpose: str) -> str:
    if purpose == "memory":
        return f"{percent(candidate.plan.memory_share)} of the model on a device"
    modelled = predict(candidate.plan, judge.profile, judge.link)
    if purpose == "latency":
        return f"{1e3 * modelled.latency_seconds:.3g} ms for a frame alone"
    return f"{modelled.frames_per_second:.3g} frames/s"
