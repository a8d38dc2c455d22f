"""What each layer loses by each representation and by being on fewer devices: what all budgets choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from robustdice.entropy_code import CODED
from robustdice.failure.agreement import answers
from robustdice.failure.copies import Copies
from robustdice.failure.matching import Targets, targets_of
from robustdice.failure.sensitivity import Sensitivity, measure
from robustdice.importance.likeness import likeness
from robustdice.importance.score import forward_macs, score
from robustdice.importance.values import SCORING_SAMPLES, Importance, normalise
from robustdice.model.network import Network
from robustdice.partitioning.allocation import Spread
from robustdice.plan import Layer, check_max_failed
from robustdice.progress import Progress, part, silent
from robustdice.representation import TRIAL_SAMPLES, CoarseLayer, neuron_bytes
from robustdice.rounding.layer import Choice
from robustdice.rounding.network import IntactInputs, round_network

TABLE_IMAGES = 64
"""Enough to tell what one layer's choices cost."""
ROUNDING_IMAGES = 128
"""Enough to round by for the table, and to see which units are alike; the plan itself is rounded with all images."""
FEWEST_UNSEEN = 64
"""Of images that plans are not made with: on fewer, less could be told than on those that they are made with."""
PASS_MACS = 10**12
"""What a pass over images may cost; large networks make do with fewer images."""
FEWEST_IMAGES = 12
"""But not with less than so many."""
MEASURED = ("int8", *CODED)
"""Of float16 nobody sees a difference, nor how it is rounded; and codes of as many bits each keep less than others."""
COARSEST = 1 / 2
"""Of the bits for a weight that a budget has: with fewer no layer is kept, and these are not measured."""
FINE = ("float32", "float16", "int8")
"""In one of which layers that have next to nothing of the weights are kept, by everybody, as long as whole copies fit
so."""
SMALL = 0.005
"""Of all weights: that is next to nothing. Often these are early layers, where every trial takes longest."""
ALIKE = tuple((kind, kind) for kind in ("float32", "float16", *MEASURED))
"""Representations of primaries and spares that are the same."""


@dataclass(frozen=True, eq=False)
class Table:
    """What plans for any budget are chosen from: the ``network`` on ``devices`` devices, of which up to ``survive`` may
    be down, its neurons' ``importance``, what each choice of each layer costs (``sensitivity``), and the coarse weights
    that this was measured with (``rounded``, by layer and representation); ``wire`` is what values travel as. Plans are
    made with ``images``, and compared on ``others`` where there are enough. Made by :func:`tabulate`."""

    network: Network
    images: NDArray[np.float32]
    devices: int
    survive: int
    importance: Importance
    rounded: Mapping[tuple[int, str], CoarseLayer]
    sensitivity: Sensitivity
    wire: str = "float32"
    others: NDArray[np.float32] | None = None

    def offered(self, budget: int) -> list[set[str]]:
        """Of every layer the representations that are chosen from for ``budget``, bytes on each device."""
        measured = self.sensitivity.coarse
        return [
            {kind for kind in worth if kind not in MEASURED or (index, kind) in measured}
            for index, worth in enumerate(worth_choosing(self.network, budget))
        ]

    @property
    def units(self) -> list[NDArray[np.float64]]:
        """What is decisive within each layer: of every unit, the divergence after its removal, or all there is."""
        known = self.importance.columns
        chosen = self.importance.select(("s3",)) if "s3" in known else self.importance
        return [normalise(scores).mean(1) for scores in chosen.scores]

    @cached_property
    def inputs(self) -> IntactInputs:
        """What plans are rounded by, of all images."""
        return IntactInputs(self.network, range(len(self.network.layers)), self.images)

    @cached_property
    def targets(self) -> Targets:
        """What plans are corrected towards, of all images."""
        return targets_of(self.network, Copies(self.network, {}), self.images)

    @cached_property
    def likeness(self) -> list[NDArray[np.float16] | None]:
        """Of any two units of a layer: :func:`robustdice.importance.likeness.likeness`."""
        return likeness(self.network, affordable(self.network, self.images, ROUNDING_IMAGES))

    @cached_property
    def trial(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The images on which candidates are compared, and how the intact network answers them."""
        images = self.images if self.others is None else self.others
        images = affordable(self.network, images, TRIAL_SAMPLES)
        return images, answers(self.network, images)


def tabulate(
    network: Network,
    images: NDArray[np.float32],
    *,
    devices: int,
    others: NDArray[np.float32] | None = None,
    survive: int | None = None,
    importance: Importance | None = None,
    wire: str = "float32",
    least: int = 0,
    on_progress: Progress = silent,
) -> Table:
    """What :func:`candidates` chooses from, for any number of budgets. ``images`` are unlabelled, [n, channels, height,
    width], a few hundred, and so are the ``others`` that nothing is fitted to: plans are compared on these, or on
    ``images`` where they are fewer than ``FEWEST_UNSEEN``. ``survive`` is the number of devices that may be down at
    once (all but one). Scored with some of the images where ``importance`` is not given. What is worth choosing for
    larger budgets than ``least`` alone (bytes of a device) takes less time. PlanError when there are not so many
    devices."""
    check_max_failed(devices, survive)
    survive = devices - 1 if survive is None else survive
    images = affordable(network, images, len(images))
    if importance is None:
        scored = affordable(network, images, SCORING_SAMPLES)
        importance = score(network, scored, s3="fisher", on_progress=part(on_progress, 0, 0.1))
    offered = worth_choosing(network, least)
    anywhere = [Choice(kind) for kind in MEASURED if any(kind in of_layer for of_layer in offered)]
    every = dict.fromkeys(range(len(network.layers)), anywhere)
    fitted = affordable(network, images, ROUNDING_IMAGES)
    rounded = round_network(network, every, fitted, part(on_progress, 0.1, 0.5))
    unseen = None if others is None or len(others) < FEWEST_UNSEEN else others
    table = Table(network, images, devices, survive, importance, rounded, Sensitivity({}, {}, devices), wire, unseen)
    spreads = [*spreads_of(devices), *thin_spreads(devices)]
    seen = affordable(network, images, TABLE_IMAGES)
    coarse = {of: kept for of, kept in rounded.items() if of[1] in offered[of[0]]}
    small = small_layers(network.plan_layers)
    units = {index: of for index, of in enumerate(table.units) if index not in small}
    found = measure(network, coarse, units, spreads, devices, survive, seen, part(on_progress, 0.5, 1))
    return replace(table, sensitivity=found)


def small_layers(layers: Sequence[Layer]) -> frozenset[int]:
    """The smallest layers, as many as have next to nothing of the weights together."""
    weights = [layer.neurons * layer.neuron_weights for layer in layers]
    found: list[int] = []
    for index in sorted(range(len(layers)), key=weights.__getitem__):
        if sum(weights[i] for i in (*found, index)) > SMALL * sum(weights):
            break
        found.append(index)
    return frozenset(found)


def worth_choosing(network: Network, budget: int) -> list[tuple[str, ...]]:
    """Of every layer the representations in which it may be kept, for so many bytes on each device; for less there are
    no fewer. The finest in which whole copies fit is among them, or else all are."""
    layers, small, every = network.plan_layers, small_layers(network.plan_layers), tuple(dict(ALIKE))

    def whole(code: str) -> int:
        kinds = (FINE[-1] if index in small else code for index in range(len(layers)))
        return sum(of.neurons * neuron_bytes(of, kind) for of, kind in zip(layers, kinds, strict=True))

    fitting = [code for code in CODED if 4 * network.shared_weights + whole(code) <= budget]
    fine = FINE if fitting else every
    bits = min(COARSEST * 8 * budget / network.parameters, CODED[fitting[0]].bits) if fitting else 0
    other = tuple(kind for kind in every if kind not in CODED or CODED[kind].bits >= bits)
    return [fine if index in small else other for index in range(len(layers))]


def affordable(network: Network, images: NDArray[np.float32], wanted: int) -> NDArray[np.float32]:
    """``wanted`` of the images, or fewer where one of them takes the network long; the fewer are wanted, the more
    passes there will be. At even distances, as images tend to come class by class."""
    count = PASS_MACS * wanted // (TRIAL_SAMPLES * forward_macs(network))
    chosen = min(len(images), wanted, max(FEWEST_IMAGES, count))
    return images[np.arange(chosen) * len(images) // chosen] if chosen < len(images) else images


def spreads_of(devices: int) -> list[Spread]:
    """What is worth considering: neurons on all devices, on three quarters or half of them, or the decisive on all;
    the one that takes most bytes first, that which takes least last."""
    half = math.ceil(devices / 2)
    wide = [Spread(devices)] + [Spread(h) for h in sorted({math.ceil(0.75 * devices)} - {devices})]
    return [*wide, *(Spread(half, share) for share in (0.5, 0.25, 0.0) if half < devices)]


def thin_spreads(devices: int) -> list[Spread]:
    """Neurons on one device alone."""
    return [Spread(1, 0.5), Spread(1, 0.25), Spread(1)] if devices > 2 else []
