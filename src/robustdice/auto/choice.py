"""What keeps to a budget, and which of it the table says costs least."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from robustdice.auto.table import ALIKE, Table, small_layers, spreads_of, thin_spreads, worth_choosing
from robustdice.errors import PlanError
from robustdice.model.network import Network
from robustdice.partitioning.allocation import Kept, Spread, allocate, held_bytes
from robustdice.partitioning.budget import share_of
from robustdice.plan import Layer, check_devices, check_max_failed
from robustdice.representation import CORRECTION_BYTES, REPRESENTATIONS

TRIES = 8
"""Layers are sized by their largest device, and with corrections where others may make them needed; what the devices
then have left is given out again so often: all of it, and half of it once that was too much."""
CLOSELY = 1.02
"""So closely it is said what devices of different memory would have to have."""

Rooms = tuple[float, ...] | None
"""How much room devices have, where it is not the same for all."""


def choose(
    table: Table,
    spreads: Sequence[Spread],
    kinds: Sequence[tuple[str, str]],
    weights: Sequence[float],
    budgets: Sequence[int],
    least_down: int = 1,
) -> tuple[list[Kept], Rooms] | None:
    """Of every layer how it is kept, with primaries and spares in which of the ``kinds``, so that the table's costs add
    up to the least, and by how much room the devices share what is not on all of them (None: evenly). ``weights`` are
    those of 0, 1, ... failed devices; there are corrections for ``least_down`` of them and more.

    Bytes are counted as parts of what a device has room for, and the device of which most is taken counts. None when
    even the least does not fit.
    """
    network, devices = table.network, table.devices
    layers = list(enumerate(zip(network.plan_layers, (tuple(of.tolist()) for of in table.units), strict=True)))
    choices = _choices(network, devices, spreads, kinds, table.offered(min(budgets)))
    corrections = CORRECTION_BYTES * _corrected_sets(spreads, devices, table.survive, least_down)
    costs = [np.array([table.sensitivity.cost(i, kept, weights) for kept in choices[i]]) for i, _ in layers]
    allowed, scale, rooms = _room(network, budgets)
    uneven = rooms is not None
    room = fits = int(allowed.min())
    too_much: int | None = None
    best: tuple[list[Kept], Rooms] | None = None
    least = math.inf
    for _ in range(TRIES):
        sizes = _sizes(layers, choices, devices, corrections, rooms, scale)
        if sum(int(of_layer.min()) for of_layer in sizes) > room:
            break
        numbers = allocate(costs, sizes, room)
        chosen = [choices[i][number] for i, number in enumerate(numbers)]
        everywhere, rest = _held(layers, chosen, devices, corrections, rooms)
        unused = math.floor(((allowed - everywhere - rest) * scale).min())
        cost = sum(float(costs[i][number]) for i, number in enumerate(numbers))
        if unused < 0:
            too_much = room
        else:
            fits = room
            if cost <= least:
                best, least = (chosen, rooms), cost
            if uneven:
                rooms = tuple((allowed - everywhere).tolist())
        before, room = room, fits + unused if too_much is None else (fits + too_much) // 2
        if room == before and not uneven:
            break
    return best


def check_room(network: Network, devices: int, survive: int | None, budgets: Sequence[int]) -> None:
    """PlanError, naming what is needed, when :func:`candidates` would find nothing that keeps to the budgets, or when
    there cannot be so many devices, or so many down. It takes no table."""
    check_devices(devices)
    check_max_failed(devices, survive)
    survive = devices - 1 if survive is None else survive
    needed = _least_needed(network, devices, survive, budgets)
    if needed <= min(budgets):
        return
    if len(set(budgets)) > 1:
        more = [max(1, budget) for budget in budgets]
        while (needed := _least_needed(network, devices, survive, more)) > min(more):
            factor, enough = max(needed / min(more), CLOSELY), 4 * network.parameters
            more = [max(budget, min(math.ceil(factor * budget), enough)) for budget in more]
        amounts = ",".join(f"{budget}B" for budget in more)
        raise PlanError(f"the smallest copies do not fit; they would if devices had more, as in --memory {amounts}")
    share = share_of(needed, 4 * network.parameters)
    raise PlanError(
        f"the smallest copies need {needed:,} bytes on each device, {min(budgets):,} are allowed: --memory {share}"
    )


def _least_needed(network: Network, devices: int, survive: int, budgets: Sequence[int]) -> int:
    """What the smallest copies that are offered for the budgets take of the least of these."""
    offered = worth_choosing(network, min(budgets))
    # Which units are important decides who holds which of them, not how many each device holds.
    layers = [(i, (of, (0.0,) * (of.neurons // of.group))) for i, of in enumerate(network.plan_layers)]
    _, scale, rooms = _room(network, budgets)
    spreads, thin = spreads_of(devices), thin_spreads(devices)
    needed = []
    for some in (spreads[:1], spreads, [*spreads, *thin]):  # the fewer holders, the more corrections
        corrections = CORRECTION_BYTES * _corrected_sets(some, devices, survive, least_down=survive)
        choices = _choices(network, devices, some, ALIKE, offered)
        sizes = _sizes(layers, choices, devices, corrections, rooms, scale)
        needed.append(sum(int(of_layer.min()) for of_layer in sizes))
    return 4 * network.shared_weights + min(needed)


def _choices(
    network: Network,
    devices: int,
    spreads: Sequence[Spread],
    kinds: Sequence[tuple[str, str]],
    offered: Sequence[Collection[str]],
) -> list[list[Kept]]:
    """Of every layer how it may be kept, in those of the ``kinds`` that are ``offered``: small layers by all."""
    small, by_all = small_layers(network.plan_layers), Spread(devices)
    return [
        [Kept(by_all, kind) for kind in REPRESENTATIONS if kind in of_layer]
        if i in small
        else [Kept(s, *of) for s in spreads for of in kinds if set(of) <= set(of_layer)]
        for i, of_layer in enumerate(offered)
    ]


def _room(network: Network, budgets: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float64], Rooms]:
    """What devices have for layers, in bytes; by what to scale it so that all have the same; and how much room that is
    where they have not."""
    allowed = np.maximum(np.array(budgets, dtype=np.int64) - 4 * network.shared_weights, 1)  # 1 fits nothing either
    return allowed, allowed.min() / allowed, tuple(allowed.tolist()) if len(set(budgets)) > 1 else None


def _sizes(
    layers: Sequence[tuple[int, tuple[Layer, tuple[float, ...]]]],
    choices: Sequence[Sequence[Kept]],
    devices: int,
    corrections: int,
    rooms: Rooms,
    scale: NDArray[np.float64],
) -> list[NDArray[np.int64]]:
    """What each choice of every layer takes on the device where that is most, bytes in which each has the same room."""

    def of_choice(index: int, layer: tuple[Layer, tuple[float, ...]], kept: Kept) -> int:
        # In front of the first layer nothing is lost that its neurons could be corrected for.
        corrected = index > 0 or len(set(kept.kinds)) > 1
        held = held_bytes(*layer, kept, devices, index, corrections if corrected else 0, rooms)
        return int(np.ceil((held * scale).max()))

    return [np.array([of_choice(index, layer, kept) for kept in choices[index]]) for index, layer in layers]


def _corrected_sets(spreads: Sequence[Spread], devices: int, survive: int, least_down: int = 1) -> int:
    """For how many failure sets of ``least_down`` devices and more a device that is up keeps corrections: all in which
    neurons can be lost."""
    fewest = max(least_down, min(spread.holders for spread in spreads))
    return sum(math.comb(devices - 1, size) for size in range(fewest, survive + 1))


def _held(
    layers: Sequence[tuple[int, tuple[Layer, tuple[float, ...]]]],
    kept: Sequence[Kept],
    devices: int,
    corrections: int,
    rooms: Rooms,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bytes on every device: of layers that all devices hold, and of the others. Layers up to the first of which
    something can be lost need no ``corrections``, unless that may come from coarser spares."""
    everywhere, rest = np.zeros(devices, dtype=np.int64), np.zeros(devices, dtype=np.int64)
    corrected = False
    for (index, layer), of_layer in zip(layers, kept, strict=True):
        corrected |= len(set(of_layer.kinds)) > 1
        held = held_bytes(*layer, of_layer, devices, index, corrections if corrected else 0, rooms)
        if of_layer.held_by_all(devices):
            everywhere += held
        else:
            rest += held
            corrected = True
    return everywhere, rest
