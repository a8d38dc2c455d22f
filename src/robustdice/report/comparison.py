"""What a reproduction compares: methods, numbers of devices and memory, and the plans that follow from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from robustdice.errors import PlanError
from robustdice.importance.score import check_s3
from robustdice.importance.values import COLUMNS, Importance
from robustdice.model.data import Dataset
from robustdice.model.network import Network
from robustdice.partitioning import METHODS as KNOWN
from robustdice.partitioning import own
from robustdice.partitioning import partition as partition_layers
from robustdice.partitioning.budget import parse_memory
from robustdice.partitioning.robust import DEFAULT_MEMORY
from robustdice.plan import Plan, check_devices
from robustdice.report import paper
from robustdice.workshop import partition

METHODS = ("robustdice", "lop", "cdc", "full")
DEVICES = (4, 3, 2)
SUBSETS = tuple(subset for size in (1, 2, 3) for subset in itertools.combinations(COLUMNS, size))

Amount = float | str
"""Of memory: a share of the model (0.5), or bytes ("80MB")."""


@dataclass(frozen=True)
class Subject:
    """A model, and the images that it is scored with (no labels are used) and evaluated on.

    ``as_in_paper`` when model and images are the paper's: then the memory is, too, unless another one is asked for.
    ``scored_apart`` when it is scored with other images than it is evaluated on.
    """

    name: str
    network: Network
    scoring: Dataset
    dataset: Dataset
    as_in_paper: bool = False
    scored_apart: bool = False


@dataclass(frozen=True)
class Choices:
    """What is compared. PlanError when that makes no sense.

    ``memory`` is what the largest device may hold: for each number of devices, or on the largest number of them, and
    elsewhere what the threshold gives that gives it there (the paper's three shares are what one threshold gives). None
    is the paper's for what is as in the paper, and else a half. Methods of the user's own are asked for what RobustDiCE
    then holds, and compared whatever they take.
    """

    methods: Sequence[str] = METHODS
    devices: Sequence[int] = DEVICES
    memory: Amount | Mapping[int, Amount] | None = None
    s3: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(sorted(self.devices, reverse=True)))
        check_s3(self.s3)
        for what, values in (("methods", self.methods), ("numbers of devices", self.devices)):
            if not values or len(set(values)) < len(values):
                raise PlanError(f"name one or more different {what}, not {', '.join(map(str, values))!r}")
        for method in self.methods:
            if method not in KNOWN:
                if ":" not in method:
                    known = ", ".join(KNOWN)
                    raise PlanError(f"unknown method {method!r}; known: {known}, and package.module:function")
                own.find(method)
        for devices in self.devices:
            check_devices(devices)
        if isinstance(self.memory, Mapping) and set(self.memory) != set(self.devices):
            said, compared = (", ".join(map(str, sorted(numbers))) for numbers in (self.memory, self.devices))
            raise PlanError(f"memory is given for {said} devices, but {compared} are compared; give it for each")

    def memory_of(self, subject: Subject) -> Amount | Mapping[int, Amount]:
        """What ``memory`` means for a model; PlanError when the paper says nothing about a number of devices."""
        if self.memory is not None:
            return self.memory
        if not subject.as_in_paper:
            return DEFAULT_MEMORY
        shares = paper.MEMORY[subject.network.reference.source]
        if missing := [devices for devices in self.devices if devices not in shares]:
            raise PlanError(f"the paper has no memory for {missing[0]} devices; say it, as in --memory 0.5")
        return {devices: shares[devices] for devices in self.devices}


def check_memory(subject: Subject, choices: Choices) -> None:
    """PlanError when the memory is too little for the model without any replica."""
    memory = choices.memory_of(subject)
    amounts = memory if isinstance(memory, Mapping) else {max(choices.devices): memory}
    for devices, amount in amounts.items():
        least = partition(subject.network, devices=devices, method="lop")
        if parse_memory(amount, least.total_bytes) < max(least.bytes_per_device):
            raise PlanError(
                f"{devices} devices hold {least.memory_share:.1%} of {subject.name} each without any replica: "
                f"say --memory {math.ceil(100 * least.memory_share) / 100 + 0.01:.2f} or more, not {amount}"
            )


def figure2_plans(subject: Subject, scores: Importance, choices: Choices) -> tuple[dict[int, dict[str, Plan]], Plan]:
    """The plans to compare, by number of devices and by what they are called in tables (the method's name); and
    RobustDiCE's on the largest number of devices."""
    memory = choices.memory_of(subject)
    robust = partial(partition, subject.network, scores)
    largest = max(choices.devices)
    if isinstance(memory, Mapping):
        ours = {devices: robust(devices=devices, memory=memory[devices]) for devices in choices.devices}
    else:
        first = robust(devices=largest, memory=memory)
        others = {devices: robust(devices=devices, threshold=threshold_of(first)) for devices in choices.devices[1:]}
        ours = {largest: first, **others}
    plans: dict[int, dict[str, Plan]] = {}
    for devices, plan in ours.items():
        plans[devices] = {name: _plan(subject, scores, devices, name, plan) for name in choices.methods}
        if "robustdice" in choices.methods and subject.as_in_paper and devices in paper.PARAMETERS:
            share = paper.PARAMETERS[devices][1]
            plans[devices][in_parameters(share)] = robust(devices=devices, memory=share)
    return plans, ours[largest]


def _plan(subject: Subject, scores: Importance, devices: int, method: str, ours: Plan) -> Plan:
    network = subject.network
    if method == "robustdice":
        return ours
    if method in KNOWN:
        return partition(network, devices=devices, method=method)
    return partition_layers(
        network.plan_layers,
        scores,
        devices=devices,
        method=method,
        memory=ours.memory_share,
        shared_weights=network.shared_weights,
        model=network.reference,
        network=network,
    )


def in_parameters(share: float) -> str:
    """What RobustDiCE within a share of the parameters is called, beside RobustDiCE within the paper's memory."""
    return f"robustdice at {share:.0%}"


def table1_plans(
    subject: Subject, scores: Importance, choices: Choices, all_three: Plan
) -> dict[tuple[str, str], Plan]:
    """By scores and by what was kept the same, the threshold or the memory of ``all_three`` scores: RobustDiCE on the
    largest number of devices; nothing where RobustDiCE is not compared."""
    robust = partial(partition, subject.network, scores, devices=max(choices.devices))
    plans = {}
    for subset in SUBSETS if "robustdice" in choices.methods else ():
        plans["+".join(subset), "threshold"] = robust(threshold=threshold_of(all_three), columns=subset)
        plans["+".join(subset), "memory"] = robust(memory=all_three.memory_share, columns=subset)
    return plans


def threshold_of(plan: Plan) -> float:
    """The threshold of all its layers."""
    return float(plan.settings["thresholds"][0])  # float() knows "inf"
