"""What every plan must keep: whatever makes one, or edits its file, is held to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from robustdice.entropy_code import CODED
from robustdice.errors import PlanError
from robustdice.plan.pairs import pair_problem
from robustdice.plan.shards import check_devices, check_layer, check_shard, parity_problem
from robustdice.wire_format import WIRES

if TYPE_CHECKING:
    from robustdice.plan.plan import Plan


def check_plan(plan: Plan) -> None:
    """PlanError with the first thing that contradicts another."""
    check_devices(plan.devices)
    if not plan.layers or len(plan.layers) != len(plan.shards):
        raise PlanError(f"{len(plan.layers)} layers (at least one), but shards for {len(plan.shards)}")
    if len({layer.name for layer in plan.layers}) != len(plan.layers):
        raise PlanError("two layers have the same name")
    if plan.shared_weights < 0:
        raise PlanError(f"the number of shared weights must be 0 or more, got {plan.shared_weights}")
    for layer, shards in zip(plan.layers, plan.shards, strict=True):
        check_layer(layer)
        dealt = sorted(neuron for shard in shards for neuron in shard.neurons)
        if len(dealt) != layer.neurons or dealt != list(range(layer.neurons)):
            raise PlanError(f"layer {layer.name}: the shards do not hold each of its {layer.neurons} neurons once")
        for shard in shards:
            check_shard(plan.devices, layer, shard)
        if problem := parity_problem(shards):
            raise PlanError(f"layer {layer.name}: {problem}")
    check_wire(plan.wire, sums=any(map(plan.exchanged_before_tail, range(len(plan.layers)))))
    _check_coarse(plan)
    _check_strips(plan)
    _check_pairs(plan)
    for failed, of_layers in plan.corrections.items():
        of_this = len(of_layers) == len(plan.layers) and all(
            each is None or len(each.scale) == layer.neurons
            for layer, each in zip(plan.layers, of_layers, strict=False)
        )
        if not failed or not failed < set(range(plan.devices)) or not of_this:
            raise PlanError(f"the corrections for {sorted(failed)} down are not of this plan")


def check_wire(wire: str, sums: bool) -> None:
    """PlanError unless values can travel as ``wire``; ``sums``: some are sums of shards."""
    if wire not in WIRES:
        raise PlanError(f"values cannot travel as {wire!r}; known: {', '.join(WIRES)}")
    if sums and wire != "float32":
        raise PlanError(
            f"sums of shards cannot travel as {wire}: what is missing follows from them only if they are exact; "
            "leave out --wire, or choose a method without sums"
        )


def _check_coarse(plan: Plan) -> None:
    for index, (layer, shards) in enumerate(zip(plan.layers, plan.shards, strict=True)):
        if plan.held_by_all(index) and any(len({h.representation for h in shard.holders}) > 1 for shard in shards):
            raise PlanError(f"layer {layer.name}: every device computes it, but not all from the same copies")
    for (index, kind), kept in plan.coarse.items():
        if not 0 <= index < len(plan.layers) or kept.representation != kind:
            raise PlanError(f"coarse weights of layer {index} in {kind} are not of this plan")
        layer = plan.layers[index]
        if (len(kept.filter.codes), kept.filter.weights) != (layer.neurons, layer.filter_weights) or len(
            kept.tail
        ) != layer.tail_filters:
            raise PlanError(f"layer {layer.name}: its weights in {kind} have another shape than the layer")
    for index, (layer, shards) in enumerate(zip(plan.layers, plan.shards, strict=True)):
        for kind in {holder.representation for shard in shards for holder in shard.holders} - {"float32"}:
            if (index, kind) not in plan.coarse:
                raise PlanError(f"layer {layer.name}: there are no weights in {kind}")
    for index in plan.activations:
        if not 0 <= index < len(plan.layers):
            raise PlanError(f"layer {index}, whose input is to be rounded, is not of this plan")
        kinds = {holder.representation for shard in plan.shards[index] for holder in shard.holders}
        if fine := sorted(kinds & {"float32", "float16"}):
            raise PlanError(
                f"layer {plan.layers[index].name}: its input is rounded to 8 bits, so no copy can be in {fine[0]}"
            )


def _check_strips(plan: Plan) -> None:
    seen: set[int] = set()
    for run in plan.strips:
        if problem := run.problem(plan.devices):
            raise PlanError(f"the run of layers {list(run.layers)} cannot be computed in strips: {problem}")
        for index in run.layers:
            if not 0 <= index < len(plan.layers) or index in seen:
                raise PlanError(f"layer {index}, to be computed in strips, is not of this plan or in two runs")
            seen.add(index)
            kinds = {holder.representation for shard in plan.shards[index] for holder in shard.holders}
            if not plan.held_by_all(index) or kinds != {"float32"}:
                raise PlanError(
                    f"layer {plan.layers[index].name}: it is computed in strips, so every device has to hold the whole "
                    "layer in float32"
                )


def _check_pairs(plan: Plan) -> None:
    members = [index for pair in plan.pairs.items() for index in pair]
    if len(set(members)) < len(members) or not set(members) <= set(range(len(plan.layers))):
        raise PlanError(f"pairs of layers {sorted(plan.pairs.items())}: not of this plan, or a layer is in two of them")
    if not plan.owned <= plan.pairs.keys() or (plan.owned and plan.devices == 2):
        raise PlanError(f"owners of the sums of layers {sorted(plan.owned)}: no pairs, or just two devices")
    for pair in plan.pairs.items():
        (first, of_first), (second, of_second) = ((plan.layers[index], plan.shards[index]) for index in pair)
        problem = pair_problem(plan.devices, (first, second), of_first, of_second)
        for kind in {holder.representation for shard in of_first for holder in shard.holders} - {"float32"}:
            kept = plan.coarse.get((pair[1], kind))
            if kind in CODED:
                problem = f"filters of {second.name} in {kind} are had whole or not at all"
            elif kept is None or kept.filter.scales.shape[1] > 1:
                problem = f"there are no weights of {second.name} in {kind} with one scale for each neuron"
        if plan.held_by_all(pair[0]):
            problem = f"every device holds {first.name}, so there is nothing to be added up"
        if pair[1] in plan.activations or plan.run_of(pair[1]) is not None:
            problem = f"{second.name} reads rounded inputs or is computed in strips"
        if problem:
            raise PlanError(f"layers {first.name} and {second.name} cannot be dealt out as a pair: {problem}")
