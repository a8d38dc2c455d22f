"""Modelled figures as tables and documents: what plans for 2, 3, ... devices give, beside devices that do not share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from robustdice.cost.model import Prediction, alone, predict
from robustdice.cost.profile import Profile
from robustdice.plan import Plan
from robustdice.report.sheet import Sheet


@dataclass(frozen=True)
class Outlook:
    """Plans for 2, 3, ... devices, the last one being the plan that was made, and what they are judged by: ``source``
    says where the profile comes from, ``link`` is in bits per second (None: no bound)."""

    plans: Sequence[Plan]
    profile: Profile
    source: str
    link: float | None = None

    @property
    def made(self) -> Prediction:
        """What the plan gives that was made."""
        return predict(self.plans[-1], self.profile, self.link)

    def replicas(self, devices: int = 1) -> Prediction:
        """What devices give that have the whole model each."""
        return alone(self.profile, self.plans[0].layers, devices)

    @property
    def pays(self) -> dict[str, bool]:
        """In what splitting is faster than one device that has the whole model."""
        return {
            "throughput": self.made.frames_per_second > self.replicas().frames_per_second,
            "latency": self.made.latency_seconds < self.replicas().latency_seconds,
        }


def outlook_json(outlook: Outlook) -> dict[str, Any]:
    """What ``plan --json`` says under ``modelled``."""
    found = [predict(plan, outlook.profile, outlook.link) for plan in outlook.plans]
    return {
        "profile": outlook.source,
        "link_bits_per_second": outlook.link,
        "splitting_pays": outlook.pays,
        "plans": [asdict(each) for each in found],
        "replicas": [asdict(outlook.replicas(each.devices)) for each in found],
    }


def outlook_table(outlook: Outlook) -> Sheet:
    """The same for people."""
    link = outlook.link
    limited = "links that are no bound" if link is None else f"links of {link / 1e6:g} Mbit/s"
    table = Sheet(
        "Modelled speed while every device is up",
        "devices",
        "frames/s",
        "ms alone",
        "kB sent",
        "replicas: frames/s",
        caption=f"modelled from {outlook.source}, for devices of one core each and {limited}; plans for fewer "
        "devices deal out neurons evenly, in float32, without a limit to memory. frames/s: with several frames in "
        "flight; ms alone: of a frame with no other in flight; kB sent: by the busiest device for a frame; replicas: "
        "of the whole model in float32 on every device, which take frames in turn "
        f"({1e3 * outlook.replicas().latency_seconds:.3g} ms each).",
    )
    for plan in outlook.plans:
        found = predict(plan, outlook.profile, link)
        table.add_row(
            str(plan.devices),
            f"{found.frames_per_second:.3g}",
            f"{1e3 * found.latency_seconds:.3g}",
            f"{found.sent_bytes / 1e3:.1f}",
            f"{outlook.replicas(plan.devices).frames_per_second:.3g}",
        )
    return table


def outlook_summary(outlook: Outlook) -> str:
    """Whether splitting makes anything faster, in a sentence."""
    made, single = outlook.made, outlook.replicas()
    whole = f"a device that holds the whole model ({outlook.plans[-1].total_bytes / 1e6:.1f} MB)"
    both = (
        f"{made.frames_per_second / single.frames_per_second:.2f} times the frames per second of {whole}, and "
        f"{made.latency_seconds / single.latency_seconds:.2f} of its time for a frame alone"
    )
    pays = any(outlook.pays.values())
    return f"Modelled: {both}." + ("" if pays else " In speed, splitting does not pay: it does in memory and failures.")


def profile_table(profile: Profile) -> Sheet:
    """What ``profile`` prints."""
    wires = ", ".join(f"{1e9 * seconds:.1f} ns as {wire}" for wire, seconds in profile.value_seconds.items())
    unpacking = ", ".join(f"{kind} {1e9 * seconds:.2g}" for kind, seconds in profile.unpack_seconds.items())
    table = Sheet(
        "Measured on one thread",
        "layer",
        "ms",
        "half: ms",
        caption=f"beside the layers: {1e3 * profile.rest_seconds:.3g} ms a frame. Handing over: "
        f"{1e3 * profile.exchange_seconds:.3g} ms of processor an exchange and {1e3 * profile.peer_seconds:.3g} for "
        f"each peer in it, {wires} a value that is sent or received, {1e3 * profile.hop_seconds:.3g} ms of waiting; "
        f"{1e3 * profile.frame_seconds:.3g} ms a frame for taking it and answering. "
        f"Unpacking a weight takes, in ns: {unpacking}.",
    )
    for name, each in profile.layers.items():
        table.add_row(name, f"{1e3 * each.whole:.3g}", f"{1e3 * each.of(0.5):.3g}")
    return table


def held_summary(profile: Profile, layers: int) -> str:
    """What a profile of a bundle was measured of, where the model has so many layers, and what was not measured."""
    shares = [each.share for each in profile.layers.values()]
    least, most = min(shares), max(shares)
    part = f"{least:.0%}" if least == most else f"{least:.0%} to {most:.0%}"
    text = f"The bundle has {part} of each layer's neurons; all of them are taken to need as many times as long."
    if missing := layers - len(shares):
        text += f" {missing} of {layers} layers have no model in it: they are modelled from their multiply-adds."
    return f"{text} What handing over takes is typical, not measured: it takes two devices. "
