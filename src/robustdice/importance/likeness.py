"""How alike the units of a layer are: how much of what one hands over another one's values tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.importance.gradients import units_of
from robustdice.model.execute import execute, forget, readers
from robustdice.model.network import Network, together

PLACES = 16
"""Of a unit's values for an image, at even distances, that are looked at."""
MOST_UNITS = 8192
"""Of a layer; of more, all pairs would take too much memory."""


def likeness(network: Network, images: NDArray[np.float32]) -> list[NDArray[np.float16] | None]:
    """For every layer the squared correlations of what its units hand over, over ``images`` [n, channels, height,
    width] and places: [units, units], from 0 to 1; 0 for a unit that always hands over the same. None for a layer of
    more than ``MOST_UNITS``."""
    first = together(network, images)
    values: dict[fx.Node, Any] = {**network.constants(first.device), network.input: first}
    ends = {layer.value: index for index, layer in enumerate(network.layers) if units_of(layer) <= MOST_UNITS}
    left = readers(network.nodes)
    found: list[NDArray[np.float16] | None] = [None] * len(network.layers)
    for node in network.nodes:
        with torch.no_grad():
            execute(network.module, [node], values)
        if (index := ends.get(node)) is not None:
            layer = network.layers[index]
            by_unit = values[node].movedim(layer.axis, 1).reshape(len(first), units_of(layer), -1)
            found[index] = _squared_correlations(by_unit[:, :, :: -(-by_unit.shape[2] // PLACES)])
        forget(node, values, left)
    return found


def _squared_correlations(values: torch.Tensor) -> NDArray[np.float16]:
    rows = values.movedim(1, 0).flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    length = rows.norm(dim=1, keepdim=True)
    rows = torch.where(length > 1e-6, rows / length.clamp_min(1e-6), 0.0)
    return (rows @ rows.T).square_().clamp_(0, 1).half().cpu().numpy()
