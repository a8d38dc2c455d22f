"""Which layers of a plan read inputs in 8 bits, and in which steps: chosen on what they see while everyone is up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.failure.copies import Copies, State, rounded
from robustdice.model.canonical import CONVOLUTIONS
from robustdice.model.execute import execute, readers
from robustdice.model.fits import check_plan_fits
from robustdice.model.network import Network, together
from robustdice.plan import Plan
from robustdice.progress import Progress, silent
from robustdice.representation import Steps

MIN_WEIGHTS = 64
"""Smaller filters, such as those of images, gain nothing from products of whole numbers."""
SHRINKS = 24
"""How many ranges are tried, from all that was seen down to half of it."""
_MOST = 2**17
"""Numbers on which they are tried."""


def activation_steps(
    network: Network, plan: Plan, images: NDArray[np.float32], on_progress: Progress = silent
) -> dict[int, Steps]:
    """Steps for the input of every layer of ``plan`` that devices can multiply in whole numbers, with the least squared
    error on ``images`` (unlabelled, [n, channels, height, width]) with the layers before it rounded already: those that
    are not grouped and whose copies are all in int8, with one scale for each neuron. PlanError when the plan is of
    another model."""
    check_plan_fits(network, plan)
    wanted = [index for index in range(len(network.layers)) if _multiplies(network, plan, index)]
    found: dict[int, Steps] = {}
    first = together(network, images)
    values: dict[fx.Node, Any] = {**network.constants(first.device), network.input: first}
    copies, here = Copies.of(network, replace(plan, activations=found)), State(plan.copies(()))
    starts = {layer.node: index for index, layer in enumerate(network.layers)}
    left = readers(network.nodes)
    with torch.no_grad():
        for node in network.nodes:
            if (index := starts.get(node, -1)) in wanted:
                found[index] = steps_for(values[node.all_input_nodes[0]])
                on_progress(len(found), len(wanted))
            if node in starts:
                copies.compute_in(here, index, values)
            else:
                execute(network.module, [node], values)
            for used in node.all_input_nodes:
                left[used] -= 1
                if not left[used]:
                    values.pop(used, None)
    return found


def steps_for(value: torch.Tensor) -> Steps:
    """The steps with the least squared error for ``value``."""
    flat = value.flatten()
    low, high = min(float(flat.min()), 0.0), max(float(flat.max()), 0.0)
    # Not at even distances, which may be those of a map's columns.
    chosen = torch.randint(flat.numel(), (_MOST,), generator=torch.Generator().manual_seed(0))
    some = flat if flat.numel() <= _MOST else flat[chosen.to(flat.device)]
    tried = []
    for shrink in torch.linspace(1.0, 0.5, SHRINKS).tolist():
        scale = max((high - low) * shrink / 255, 1e-12)
        steps = Steps(scale, int(np.clip(round(-low * shrink / scale), 0, 255)))
        tried.append((float((rounded(some, steps) - some).square().mean()), -shrink, steps))
    return min(tried, key=lambda each: each[:2])[2]


def _multiplies(network: Network, plan: Plan, index: int) -> bool:
    layer = network.layers[index]
    if plan.split(index) == "hidden":
        return False  # of pairs, few neurons are unpacked at a time
    if layer.input_channels or layer.node.target is CONVOLUTIONS[3] or layer.layer.filter_weights < MIN_WEIGHTS:
        return False
    kinds = {holder.representation for shard in plan.shards[index] for holder in shard.holders}
    return kinds == {"int8"} and plan.coarse[index, "int8"].filter.scales.shape[1] == 1
