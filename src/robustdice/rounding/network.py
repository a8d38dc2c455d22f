"""All layers of a network in the representations that somebody holds them in, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.model.execute import attribute, execute
from robustdice.model.network import Network, together
from robustdice.progress import Progress, silent
from robustdice.representation import CoarseLayer
from robustdice.rounding.affine import can_shift, coarse_parameters, fold
from robustdice.rounding.inputs import columns
from robustdice.rounding.layer import Choice, Seen, coarse_layer, target


def round_network(
    network: Network,
    wanted: Mapping[int, Sequence[Choice]],
    images: NDArray[np.float32] | None = None,
    on_progress: Progress = silent,
) -> dict[tuple[int, str], CoarseLayer]:
    """Coarse weights of the layers in ``wanted`` (by position), in all the representations asked for.

    With ``images`` (unlabelled, [n, channels, height, width], a few hundred) every layer is fitted to what it sees when
    the layers before it are coarse already, each in the first of its representations; without, weights are rounded to
    their nearest levels.
    """
    found: dict[tuple[int, str], CoarseLayer] = {}
    if images is None:
        for done, (index, choices) in enumerate(wanted.items(), start=1):
            found |= _coarse(network, index, choices, None)
            on_progress(done, len(wanted))
        return found
    first = together(network, images)
    own: dict[fx.Node, Any] = {**network.constants(first.device), network.input: first}
    intact = dict(own)
    layers = {layer.node: index for index, layer in enumerate(network.layers)}
    parameters = {str(node.target): node for node in network.nodes if node.op == "get_attr"}
    left = {node: len(node.users) for node in network.nodes}
    with torch.no_grad():
        for node in network.nodes:
            if wanted.get(index := layers.get(node, -1)):
                layer = network.layers[index]
                size = tuple(attribute(network.module, layer.own_filter).shape)
                source = node.all_input_nodes[0]
                inputs = [columns(layer, values[source].cpu(), size) for values in (own, intact)]
                seen = None if inputs[0] is None or inputs[1] is None else Seen(inputs[0], inputs[1])
                found |= _coarse(network, index, wanted[index], seen)
                published = found[index, wanted[index][0].representation]
                own |= {
                    parameters[name]: tensor.to(own[source].device)
                    for name, tensor in coarse_parameters(network, layer, published).items()
                }
                on_progress(len({index for index, _ in found}), len(wanted))
            execute(network.module, [node], own)
            execute(network.module, [node], intact)
            for used in node.all_input_nodes:
                left[used] -= 1
                if not left[used]:
                    own.pop(used, None)
                    intact.pop(used, None)
    return found


def _coarse(
    network: Network, index: int, choices: Sequence[Choice], seen: Seen | None
) -> dict[tuple[int, str], CoarseLayer]:
    layer = network.layers[index]
    tail = {name: attribute(network.module, name).detach().cpu() for name in layer.tail_filters}
    folded = fold(network, layer)
    for_all = target(folded.filters, seen)
    return {
        (index, choice.representation): coarse_layer(folded, tail, choice, for_all, can_shift(layer))
        for choice in choices
    }
