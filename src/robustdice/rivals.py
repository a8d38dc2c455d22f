"""What anybody could do by hand within a budget: plans that the chosen one has to beat, made as well as they can be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from robustdice.auto import Candidate, Table, least_to_matter, tried_out
from robustdice.entropy_code import CODED
from robustdice.errors import PlanError
from robustdice.partitioning import partition
from robustdice.partitioning.paired import kinds_with_pairs
from robustdice.partitioning.precision import Kinds, kinds_of, represented
from robustdice.plan import Plan
from robustdice.progress import Progress, silent
from robustdice.representation import REPRESENTATIONS, CoarseLayer, neuron_bytes
from robustdice.rounding.layer import Choice
from robustdice.rounding.network import round_network, round_together
from robustdice.splits import NO_SPLITS, Splits

Coarse = dict[tuple[int, str], CoarseLayer]


def rivals(
    table: Table, budgets: Sequence[int], on_progress: Progress = silent, to_beat: float | None = None
) -> list[Candidate]:
    """Whole copies in one representation, the finest that fits, and the finest that is not entropy-coded, rounded to
    the nearest and by GPTQ; the paper's method and plain slices in float32 and in 8 bits; coded slices. Those that do
    not fit into ``budgets`` (bytes of each device) are made as small as they can be, for what they would need.
    ``to_beat`` as for :func:`robustdice.auto.candidates`."""
    made = [*_whole(table, budgets), *_partitioned(table, budgets)]
    return try_all(table, made, budgets, on_progress, to_beat)


def try_all(
    table: Table,
    made: Sequence[tuple[str, Plan]],
    budgets: Sequence[int],
    on_progress: Progress = silent,
    to_beat: float | None = None,
) -> list[Candidate]:
    """Plans, each with its family, one after another; ``to_beat`` as for :func:`robustdice.auto.candidates`."""
    found: list[Candidate] = []
    for family, plan in made:
        on_progress(len(found), len(made))
        least = -1.0 if to_beat is None else max(to_beat, least_to_matter(found))
        found.append(tried_out(table, family, plan, budgets, least))
    return found


def _whole(table: Table, budgets: Sequence[int]) -> Iterator[tuple[str, Plan]]:
    network = table.network

    def held(kind: str) -> int:
        kinds = kinds_of(network.plan_layers, kind, kind)
        layers = zip(network.plan_layers, kinds, strict=True)
        return 4 * network.shared_weights + sum(of.neurons * neuron_bytes(of, each.primary) for of, each in layers)

    every = REPRESENTATIONS, [kind for kind in REPRESENTATIONS if kind not in CODED]
    finest = [next((kind for kind in of if held(kind) <= min(budgets)), of[-1]) for of in every]
    for kind in dict.fromkeys(finest):  # what is entropy-coded takes longer to unpack
        kinds = kinds_of(network.plan_layers, kind, kind)
        wanted = {i: [Choice(of.primary)] for i, of in enumerate(kinds) if of.primary != "float32"}
        nearest = _plan(table, "full", kind, round_network(network, wanted))
        yield f"whole, {kind} to the nearest", nearest
        if kind not in ("float32", "float16"):
            if held(kind) <= min(budgets):
                (coarse,) = round_together(network, [wanted], table.images, table.inputs)
                nearest = replace(nearest, coarse=coarse)
            yield f"whole, {kind} by GPTQ", nearest


def _partitioned(table: Table, budgets: Sequence[int]) -> Iterator[tuple[str, Plan]]:
    for kind in ("float32", "int8"):
        yield from dealt_out(table, kind, budgets)
    yield "slices and their sum (CDC), float32", _plan(table, "cdc", "float32", {})


def dealt_out(
    table: Table, kind: str, budgets: Sequence[int], splits: Splits = NO_SPLITS
) -> Iterator[tuple[str, Plan]]:
    """The paper's method and plain slices in one representation, split so."""
    eight = {(index, kind): kept for (index, kind), kept in table.rounded.items() if kind == "int8"}
    try:
        plan = _plan(table, "robustdice", kind, eight, splits, memory=f"{min(budgets)}B")
    except PlanError:  # it does not fit
        plan = _plan(table, "robustdice", kind, eight, splits, threshold=math.inf)
    yield f"the paper's method, {kind}", plan
    yield f"slices (LOP), {kind}", _plan(table, "lop", kind, eight, splits)


def _plan(
    table: Table,
    method: str,
    kind: str,
    coarse: Coarse,
    splits: Splits = NO_SPLITS,
    memory: str | None = None,
    threshold: float | None = None,
) -> Plan:
    network = table.network
    plan = partition(
        network.plan_layers,
        table.importance,
        devices=table.devices,
        method=method,
        memory=memory,
        threshold=threshold,
        shared_weights=network.shared_weights,
        model=network.reference,
        precision=(kind, kind),
        pairs=splits.pairs,
        run=splits.run,
        whole=splits.whole,
    )
    wanted = kinds_with_pairs(plan.layers, plan.pairs, kind, kind)
    kinds = [Kinds() if plan.run_of(i) else of for i, of in enumerate(wanted)]
    return replace(
        plan,
        shards=tuple(represented(shards, of, plan.devices) for shards, of in zip(plan.shards, kinds, strict=True)),
        coarse={} if kind == "float32" else coarse,
        settings={**plan.settings, "precision": [of.primary for of in kinds]},
        owned=splits.owned.intersection(plan.pairs),
        wire="float32" if method == "cdc" else table.wire,  # sums travel as they are
    )
