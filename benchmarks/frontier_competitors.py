"""What `plan --method auto` has to beat: plans that one could make without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

import robustdice as rd
from robustdice.failure.copies import Copies, State, intact
from robustdice.failure.passes import run_under
from robustdice.importance.divergence import kullback_leibler
from robustdice.model.network import Network, images_at_once
from robustdice.partitioning.allocation import allocate
from robustdice.partitioning.budget import parse_memory
from robustdice.partitioning.precision import Kinds
from robustdice.plan import Plan
from robustdice.representation import REPRESENTATIONS, neuron_bytes
from robustdice.rounding.layer import Choice
from robustdice.rounding.network import round_network
from robustdice.workshop import with_precision

WIDTHS = tuple(reversed(REPRESENTATIONS[1:]))
SCORED_BY = 64
"""Images for the paper's scores, and for how sensitive layers are."""


@dataclass(frozen=True)
class Entry:
    """One plan of a competitor: of what ``method``, in which ``variant``, for which ``budget`` (a share of the float32
    bytes; None where it has the size it has). ``make`` makes it; PlanError where it does not fit."""

    method: str
    variant: str
    budget: float | None
    make: Callable[[], Plan]


class Competitors:
    """The competitors of one network; ``images`` are unlabelled, [n, channels, height, width]."""

    def __init__(self, network: Network, images: NDArray[np.float32], devices: int, budgets: Sequence[float]) -> None:
        """Nothing is made yet."""
        self._network, self._images, self._devices, self._budgets = network, images, devices, budgets
        # Images come sorted by class: some at even distances are of all classes.
        self._some = images[:: max(1, len(images) // SCORED_BY)][:SCORED_BY]

    def entries(self) -> Iterator[Entry]:
        """All of them: those that say most for their time first."""
        for kind in WIDTHS:
            yield Entry("whole, nearest", kind, None, partial(self._whole, kind, None))
            if kind != "float16":  # which leaves nothing to choose
                yield Entry("whole, GPTQ", kind, None, partial(self._whole, kind, self._images))
        for budget in self._budgets:
            yield Entry("whole, mixed by sensitivity", "", budget, partial(self._mixed, budget))
        yield Entry("LOP", "int8", None, partial(self._sliced, "lop", "int8"))
        yield Entry("LOP", "float32", None, partial(self._sliced, "lop", "float32"))
        yield Entry("CDC", "float32", None, partial(self._sliced, "cdc", "float32"))
        # Every third budget first, so that an unfinished run spans them all.
        for budget in (each for start in (1, 0, 2) for each in self._budgets[start::3]):
            yield Entry("the paper's method, int8", "int8", budget, partial(self._paper, budget, "int8"))
            yield Entry("the paper's method, float32", "float32", budget, partial(self._paper, budget, "float32"))

    def _whole(self, kind: str, images: NDArray[np.float32] | None) -> Plan:
        return rd.partition(self._network, devices=self._devices, method="full", precision=kind, images=images)

    def _sliced(self, method: str, kind: str) -> Plan:
        return rd.partition(
            self._network, devices=self._devices, method=method, precision=kind, images=self._for_rounding(kind)
        )

    def _paper(self, budget: float, kind: str) -> Plan:
        if kind == "float32":
            return rd.partition(self._network, self._scores, devices=self._devices, memory=budget)
        plan = rd.partition(self._network, self._scores, devices=self._devices, memory=budget, precision=kind)
        return replace(plan, coarse=self._whole_in_int8.coarse)  # whoever holds what, the weights are the same

    def _for_rounding(self, kind: str) -> NDArray[np.float32] | None:
        return None if kind == "float32" else self._images

    @cached_property
    def _whole_in_int8(self) -> Plan:
        return self._whole("int8", self._images)

    @cached_property
    def _scores(self) -> rd.Importance:
        return rd.score(self._network, self._some)

    def _mixed(self, budget: float) -> Plan:
        """Whole copies: of every layer the representation with which the sum of what each costs is least."""
        plan = rd.partition(self._network, devices=self._devices, method="full")
        sizes = [
            np.array([layer.neurons * neuron_bytes(layer, kind) for kind in REPRESENTATIONS]) for layer in plan.layers
        ]
        room = parse_memory(budget, plan.total_bytes) - 4 * plan.shared_weights
        kinds = [REPRESENTATIONS[kind] for kind in allocate(self._sensitivity, sizes, room)]
        return with_precision(self._network, plan, [Kinds(kind, kind) for kind in kinds], self._images)

    @cached_property
    def _sensitivity(self) -> list[NDArray[np.float64]]:
        """Of every layer what each of ``REPRESENTATIONS`` costs when all others are intact: divergence in nats."""
        network, base = self._network, intact(self._network)
        every = [Choice(kind) for kind in WIDTHS]
        copies = Copies(network, round_network(network, dict.fromkeys(range(len(network.layers)), every), self._some))
        states = [
            State((*base.copies[:index], np.full_like(base.copies[index], kind), *base.copies[index + 1 :]))
            for index in range(len(network.layers))
            for kind in range(1, len(REPRESENTATIONS))
        ]
        found = np.zeros(len(states))
        for start in range(0, len(self._some), images_at_once(network)):
            batch = torch.from_numpy(self._some[start : start + images_at_once(network)])
            exact, *changed = run_under(network, batch, [base, *states], copies)
            found += [len(batch) / len(self._some) * float(kullback_leibler(exact, scores)) for scores in changed]
        return [np.array([0.0, *of_layer]) for of_layer in found.reshape(len(network.layers), -1)]
