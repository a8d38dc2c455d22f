"""From a plan, a device's profile and a link: frames per second, latency, bytes. Everything here is modelled.

Devices are alike, and compute on one core each. Several frames in flight: the slower of a device's processor and its
link bounds the rate. One frame alone: in every stage all wait for the slowest, then for what is handed over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustdice.cost.profile import TYPICAL, Profile
from robustdice.errors import PlanError
from robustdice.plan import Layer, Plan

GOALS = ("throughput", "latency")
"""What can be chosen for: frames per second with several in flight, or seconds for one alone."""
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Prediction:
    """Modelled, on ``devices`` devices: frames per second with several in flight, seconds for a frame alone, and of the
    busiest device: seconds of its processor and bytes that it sends for a frame."""

    devices: int
    frames_per_second: float
    latency_seconds: float
    processor_seconds: float
    sent_bytes: float


@dataclass(frozen=True)
class Judge:
    """By what plans are compared: a device's profile, bits per second of its link (None: no bound), and the goal, one
    of :data:`GOALS`. PlanError for another goal."""

    profile: Profile = TYPICAL
    link: float | None = None
    goal: str = "throughput"

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise PlanError(f"unknown goal {self.goal!r}; known: {', '.join(GOALS)}")

    def seconds(self, plan: Plan) -> float:
        """What a plan takes for a frame, alone or of a stream, as the goal has it."""
        found = predict(plan, self.profile, self.link)
        return found.latency_seconds if self.goal == "latency" else 1 / found.frames_per_second


def parse_link(text: str) -> float:
    """Bits per second of a link such as ``1Gbit`` or ``100Mbit``; PlanError for anything else."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmg]?)bit(/s|ps)?\s*", text, re.IGNORECASE)
    if match is None or not (rate := float(match[1]) * _UNITS[match[2].lower()]):
        raise PlanError(f"link {text!r} is not a rate; give bits per second such as '1Gbit' or '100Mbit'")
    return rate


def alone(profile: Profile, layers: Sequence[Layer], devices: int = 1) -> Prediction:
    """Devices that have the whole model each, in float32, and take frames in turn."""
    return _in_turn(profile, devices, sum(profile.seconds(layer, 1.0) for layer in layers))


def _in_turn(profile: Profile, devices: int, arithmetic_seconds: float) -> Prediction:
    seconds = profile.frame_seconds + profile.rest_seconds + arithmetic_seconds
    return Prediction(devices, devices / seconds, seconds, seconds, 0.0)


def predict(plan: Plan, profile: Profile, link_bits_per_second: float | None = None) -> Prediction:
    """What a plan gives while every device is up; without a link's rate, nothing waits for it. PlanError when the
    profile is of another model."""
    profile.check_fits(plan.model)
    if not plan.exchanges:
        everything = sum(float(arithmetic(plan, profile, index).max()) for index in range(len(plan.layers)))
        return _in_turn(profile, plan.devices, everything)
    peers = plan.devices - 1
    rate = np.inf if link_bits_per_second is None else link_bits_per_second / 8
    processor = np.full(plan.devices, profile.frame_seconds + profile.rest_seconds)
    sent, link = np.zeros(plan.devices), np.zeros(plan.devices)
    latency = profile.frame_seconds + profile.rest_seconds
    stage = np.zeros(plan.devices)
    for index in range(len(plan.layers)):
        stage += arithmetic(plan, profile, index)
        if not plan.exchanged(index):
            continue
        published = handed_over(plan, index)
        handled = published * peers + (published.sum() - published)
        own = profile.exchange_seconds + peers * profile.peer_seconds
        own = own + handled * profile.value_seconds[plan.wires[index]]
        width = plan.exchanged_bytes(index) / plan.exchanged(index)
        passed = width * np.maximum(published * peers, published.sum() - published) / rate
        processor += stage + own
        latency += (stage + own + passed).max() + profile.hop_seconds
        sent, link = sent + width * published * peers, link + passed
        stage = np.zeros(plan.devices)
    processor, latency = processor + stage, latency + stage.max()
    busiest = float(np.maximum(processor, link).max())
    return Prediction(plan.devices, 1 / busiest, float(latency), float(processor.max()), float(sent.max()))


def arithmetic(plan: Plan, profile: Profile, index: int) -> NDArray[np.float64]:
    """Seconds that each device takes for a layer while all are up, [devices]."""
    found, layer = np.zeros(plan.devices), plan.layers[index]
    for kind, part in dealt(plan, index).items():
        # Whole numbers, where inputs are rounded to 8 bits, take about as long as float32.
        read = "float32" if index in plan.activations else kind
        found += [profile.seconds(layer, share, read) if share else 0.0 for share in part]
    return found


def shares(plan: Plan, index: int) -> NDArray[np.float64]:
    """The share of a layer's neurons, or rows, that each device computes while all are up, [devices]."""
    return np.asarray(sum(dealt(plan, index).values()), np.float64)


def dealt(plan: Plan, index: int) -> dict[str, NDArray[np.float64]]:
    """These shares by the representation of what is computed with; of a pair, both layers' are the first one's."""
    run = plan.run_of(index)
    if run is not None:
        return {"float32": run.shares(index)}
    first = next((a for a, b in plan.pairs.items() if b == index), index)
    found: dict[str, NDArray[np.float64]] = {}
    by_all = plan.held_by_all(first)
    for shard in plan.shards[first]:
        for holder in shard.holders if by_all else shard.holders[:1]:
            part = found.setdefault(holder.representation, np.zeros(plan.devices))
            part[holder.device] += len(shard.neurons) / plan.layers[first].neurons
    return found


def handed_over(plan: Plan, index: int) -> NDArray[np.float64]:
    """The values that each device hands to every other one after a layer, [devices]; to an owner, its slice."""
    run = plan.run_of(index)
    if run is not None:
        part = np.diff(np.array(run.bounds, np.float64))
    elif plan.owned_first(index) is not None:
        part = np.ones(plan.devices)
    else:
        part = shares(plan, index)
        if index in plan.pairs:  # whoever has a part in the sums hands over as many
            part = np.ceil(part)
    return np.asarray(plan.exchanged(index) * part / part.sum(), np.float64)
