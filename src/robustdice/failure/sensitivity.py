"""What it costs to keep one layer coarsely, or on some devices only: the table that allocation chooses from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.failure.copies import Copies, State, intact
from robustdice.failure.matching import fit
from robustdice.importance.divergence import kullback_leibler
from robustdice.model.network import Network, together
from robustdice.partitioning.allocation import Kept, Spread, deal
from robustdice.progress import Progress, silent
from robustdice.representation import LOST, REPRESENTATIONS, CoarseLayer


@dataclass(frozen=True)
class Sensitivity:
    """Mean Kullback-Leibler divergence (nats) of the class probabilities from the intact network's, with one layer
    changed and what that does to the later ones corrected: ``coarse`` for each (layer, representation), ``lost`` for
    each (layer, spread, number of failed devices), on so many ``devices``."""

    coarse: Mapping[tuple[int, str], float]
    lost: Mapping[tuple[int, Spread, int], float]
    devices: int

    def cost(self, layer: int, kept: Kept, weights: Sequence[float]) -> float:
        """Of a choice, over 0, 1, 2, ... failed devices with these weights; what is coarse and what is lost add up, and
        of a layer that is partly from spares each part costs in proportion."""
        primary, spare = (self.coarse.get((layer, kind), 0.0) for kind in kept.kinds)
        found = 0.0
        for size, weight in enumerate(weights):
            gone = (1 - kept.spread.decisive) * float(lost_share(kept.spread, size, self.devices))
            from_spares = size / self.devices - gone
            lost = self.lost[layer, kept.spread, size] if gone else 0.0
            found += weight * ((1 - from_spares) * primary + from_spares * spare + lost)
        return found


def lost_share(spread: Spread, failed: int, devices: int) -> Fraction:
    """Which share is lost of what is not on all devices."""
    return Fraction(math.comb(failed, spread.holders), math.comb(devices, spread.holders))


def measure(
    network: Network,
    coarse: Mapping[tuple[int, str], CoarseLayer],
    importance: Mapping[int, NDArray[np.float64]],
    spreads: Iterable[Spread],
    devices: int,
    survive: int,
    images: NDArray[np.float32],
    on_progress: Progress = silent,
) -> Sensitivity:
    """The table for all of ``coarse``, and for ``spreads`` of some layers with up to ``survive`` devices down.
    ``importance`` has a number for every unit of each of these; ``images`` as for calibration, of which less are
    enough."""
    base = intact(network)
    states: dict[bytes, tuple[int, State]] = {}
    coarse_keys: dict[tuple[int, str], bytes] = {}
    lost_keys: dict[tuple[int, Spread, int], bytes] = {}
    alike: dict[tuple[int, float, Fraction], bytes] = {}

    def changed(layer: int, copies: NDArray[np.int8]) -> bytes:
        state = State((*base.copies[:layer], copies, *base.copies[layer + 1 :]))
        states.setdefault(state.key, (len(states), state))
        return state.key

    for layer, kind in coarse:
        coarse_keys[layer, kind] = changed(layer, np.full_like(base.copies[layer], REPRESENTATIONS.index(kind)))
    for spread in spreads:
        for layer, units in importance.items():
            held = deal(units.tolist(), spread, devices, layer)
            for size in range(1, survive + 1):
                # What of the rest is lost, whichever holders it had: two thirds of it cost what two thirds cost.
                share = lost_share(spread, size, devices)
                if (layer, spread.decisive, share) not in alike:
                    survivors = set(range(size, devices))
                    lost = np.repeat([not holders & survivors for holders in held], network.plan_layers[layer].group)
                    alike[layer, spread.decisive, share] = changed(layer, np.where(lost, LOST, 0).astype(np.int8))
                lost_keys[layer, spread, size] = alike[layer, spread.decisive, share]
    different = [state for key, (_, state) in states.items() if key != base.key]
    by_key = {base.key: 0.0}
    fitted = fit(network, Copies(network, coarse), base, different, images)
    with torch.no_grad():
        exact = network.run(together(network, images))
    for done, (number, _, scores) in enumerate(fitted, start=1):
        by_key[different[number].key] = float(kullback_leibler(exact, scores))
        on_progress(done, len(different))
    return Sensitivity(
        {of: by_key[key] for of, key in coarse_keys.items()},
        {of: by_key[key] for of, key in lost_keys.items()},
        devices,
    )
