"""Why a plan's layers are split as they are, in sentences."""

from __future__ import annotations

import numpy as np

from robustdice.plan import Plan


def why_split(plan: Plan) -> str:
    """A sentence for each kind of split beside neurons; empty without any."""
    return _strips(plan) + _pairs(plan)


def _strips(plan: Plan) -> str:
    """What strips of rows are for."""
    layers = [index for run in plan.strips for index in run.layers]
    if not layers:
        return ""
    weights, all_work = 0, 0
    for layer in (plan.layers[index] for index in layers):
        weights += 4 * layer.neurons * layer.neuron_weights
        all_work += layer.neurons * layer.neuron_macs
    busiest = float(np.sum([plan.work(index) for index in layers], axis=0).max())
    return (
        f" Layers in strips of rows: {len(layers)}. Every device holds all of them, {weights / plan.total_bytes:.1%} "
        f"of the parameters, so that nothing of them can be lost, and computes {busiest / all_work:.1%} of them at "
        "most, the rows that strips have in common included."
    )


def _pairs(plan: Plan) -> str:
    """What pairs of layers are for."""
    if not plan.pairs:
        return ""
    layers = [index for pair in plan.pairs.items() for index in pair]
    gathered = sum(plan.layers[index].neurons * plan.layers[index].neuron_outputs for index in layers)
    handed = [plan.exchanged(index) for index in layers]
    owners = f", of {len(plan.owned)} by an owner of each slice, who hands it to all" if plan.owned else ""
    return (
        f" Pairs of layers that are split hidden: {len(plan.pairs)}. Their partial sums are added up{owners}. That are "
        f"{sum(handed):,} of the activations, in {np.count_nonzero(handed)} exchanges; gathered they were "
        f"{gathered:,}, in {len(layers)}."
    )
