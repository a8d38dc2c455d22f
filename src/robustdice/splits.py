"""How each layer is best split, by the cost model: by neurons, in pairs, in strips of rows, or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from robustdice.cost.model import Judge
from robustdice.errors import PlanError
from robustdice.model.network import Network
from robustdice.model.pairs import choose_owned, choose_pairs, possible_pairs
from robustdice.model.strips import FEW_WEIGHTS, runs_of
from robustdice.partitioning import partition
from robustdice.plan import Plan, Strips

_SWEEPS = 3
_LEAST_GAIN = 1e-3
"""A change has to make this share of a frame's time less: modelled figures are no better."""


@dataclass(frozen=True)
class Splits:
    """What is not split by neurons: ``pairs``, first layer to second, those with owners by their first; a ``run`` in
    strips; layers on everyone."""

    pairs: dict[int, int] = field(default_factory=dict)
    run: Strips | None = None
    whole: frozenset[int] = frozenset()
    owned: frozenset[int] = frozenset()


NO_SPLITS = Splits()
"""Every layer by neurons."""


def plans_for_fewer(network: Network, made: Plan, judge: Judge) -> list[Plan]:
    """Plans for 2, 3, ... devices that split layers by the same rule as the one that was ``made``, which comes last."""
    if not made.exchanges:
        return [made]
    split, plans = str(made.settings.get("split", "neurons")), []
    for devices in range(2, made.devices):
        splits = splits_of(network, devices, split, judge, made.wire, pairs_too=bool(made.pairs))
        plans.append(even_plan(network, devices, splits, made.wire))
    return [*plans, made]


def splits_of(
    network: Network, devices: int, split: str, judge: Judge, wire: str = "float32", pairs_too: bool = True
) -> Splits:
    """The splits that a word asks for; PlanError where there are none, or the profile is of another model.

    ``hidden`` are the pairs that hand over least, ``rows`` the run that is modelled to be best, ``auto`` whatever is:
    without pairs unless ``pairs_too``."""
    if split == "hidden":
        pairs = choose_pairs(network, devices)
        return Splits(pairs=pairs, owned=choose_owned(network, pairs, devices))
    if split == "rows":
        return Splits(run=_best_run(network, devices, judge, wire))
    return choose_splits(network, devices, judge, wire, pairs_too) if split == "auto" else NO_SPLITS


def _best_run(network: Network, devices: int, judge: Judge, wire: str) -> Strips:
    if runs := runs_of(network, devices):
        return min(runs, key=lambda run: judge.seconds(even_plan(network, devices, Splits(run=run), wire)))
    raise PlanError(
        f"the model does not begin with layers of at most {FEW_WEIGHTS:.0%} of its weights whose maps have a row for "
        f"each of {devices} devices; plan without rows"
    )


def choose_splits(network: Network, devices: int, judge: Judge, wire: str, pairs_too: bool) -> Splits:
    """The splits with which a plan is modelled to be best: one thing is split otherwise after the other, as long as
    that makes it better. Layers that all devices hold have few weights together, so that plans still share out the
    model."""

    def seconds(splits: Splits) -> float:
        return judge.seconds(even_plan(network, devices, splits, wire))

    best = NO_SPLITS
    least = seconds(best)
    runs = runs_of(network, devices)
    for _ in range(_SWEEPS):
        before = best
        for change in _changes(network, runs, [False, True][: min(devices, 3) - 1] if pairs_too else []):
            other = change(best)
            if _few(network, other) and (needed := seconds(other)) < least * (1 - _LEAST_GAIN):
                best, least = other, needed
        if best == before:
            break
    return replace(best, owned=best.owned.intersection(best.pairs))


def _changes(network: Network, runs: Sequence[Strips], owned: Sequence[bool]) -> Iterator[Callable[[Splits], Splits]]:
    """Every single thing that can be split otherwise; pairs ``owned`` or not."""
    for run in (None, *runs):
        yield partial(_with_run, run)
    for run in runs:
        yield partial(_with_front, frozenset(run.layers))
    for pair, with_owners in itertools.product(possible_pairs(network).items(), owned):
        yield partial(_with_pair, pair, with_owners)
    for index in range(len(network.layers)):
        yield partial(_with_whole, index)


def _with_run(run: Strips | None, splits: Splits) -> Splits:
    layers = set(() if run is None else run.layers)
    return replace(splits, pairs=_without(splits.pairs, layers), run=run, whole=splits.whole - layers)


def _with_front(layers: frozenset[int], splits: Splits) -> Splits:
    """With a run's layers on everyone instead."""
    return replace(splits, pairs=_without(splits.pairs, set(layers)), run=None, whole=splits.whole | layers)


def _with_pair(pair: tuple[int, int], owned: bool, splits: Splits) -> Splits:
    """With the pair, with owners or without, or without the pair if it is there."""
    if pair in splits.pairs.items() and owned == (pair[0] in splits.owned):
        return replace(splits, pairs={a: b for a, b in splits.pairs.items() if (a, b) != pair})
    if splits.run is not None and set(pair) & set(splits.run.layers):
        return splits
    pairs = {**_without(splits.pairs, set(pair)), pair[0]: pair[1]}
    owners = splits.owned - {pair[0]} | ({pair[0]} if owned else set())
    return replace(splits, pairs=pairs, whole=splits.whole - set(pair), owned=owners)


def _with_whole(index: int, splits: Splits) -> Splits:
    """With the layer on everyone, or not if it is there."""
    if splits.run is not None and index in splits.run.layers:
        return splits
    return replace(splits, pairs=_without(splits.pairs, {index}), whole=splits.whole ^ {index})


def _without(pairs: Mapping[int, int], layers: set[int]) -> dict[int, int]:
    return {first: second for first, second in pairs.items() if not {first, second} & layers}


def _few(network: Network, splits: Splits) -> bool:
    """Whether the layers that all devices hold have few weights, and others are left."""
    by_all = {*splits.whole, *(() if splits.run is None else splits.run.layers)}
    weights = sum(layer.neurons * layer.neuron_weights for layer in (network.plan_layers[i] for i in by_all))
    return weights <= FEW_WEIGHTS * network.parameters and len(by_all) < len(network.layers)


def even_plan(network: Network, devices: int, splits: Splits, wire: str) -> Plan:
    """A plan with these splits in which devices hold as much of each layer, which is all that its costs depend on."""
    plan = partition(
        network.plan_layers,
        None,
        devices=devices,
        method="lop",
        shared_weights=network.shared_weights,
        model=network.reference,
        pairs=splits.pairs,
        run=splits.run,
        whole=splits.whole,
    )
    return replace(plan, wire=wire, owned=splits.owned.intersection(plan.pairs))
