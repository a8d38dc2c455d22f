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
    gathered = sum(plan.layers[i].neurons * plan.layers[i].neuron_outputs for pair in plan.pairs.items() for i in pair)
    sums = sum(map(plan.exchanged, plan.pairs))
    return (
        f" Pairs of layers that are split hidden: {len(plan.pairs)}; {sums:,} of the activations are their partial "
        f"sums. Gathered they were {gathered:,}, in twice as many exchanges."
    )
