"""What a plan's models must give in a device's trial, as PyTorch computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from robustdice.bundle.trial import stand_in
from robustdice.failure.copies import Copies
from robustdice.model.execute import execute
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network
from robustdice.model.strips import ROWS, Region, Rows
from robustdice.plan import Plan
from robustdice.representation import REPRESENTATIONS

Array = NDArray[Any]


class Expected:
    """The values of one frame in which the input, and every exchanged value, is what stands for it in a trial."""

    def __init__(
        self, network: Network, plan: Plan, exchanged: Mapping[int, NetworkLayer], regions: Mapping[int, Region]
    ) -> None:
        """``exchanged`` has the layers that are exchanged, each up to the value that is handed over; ``regions``, by
        their last layers, what is computed in strips."""
        self._network, self._layers = network, {**dict(enumerate(network.layers)), **exchanged}
        self._copies, self._pairs = Copies.of(network, plan), plan.pairs
        self._coarse_pairs = {second for first, second in plan.pairs.items() if plan.is_coarse_pair(first)}
        self._kept = plan.copies(())
        self._of_layers: dict[tuple[int, str], torch.Tensor] = {}
        self._values: dict[fx.Node, Any] = {
            **network.constants(torch.device("cpu")),
            network.input: torch.from_numpy(stand_in(network.input.name, network.input_shape)),
        }
        starts = {layer.node: index for index, layer in enumerate(network.layers)}
        inside: set[fx.Node] = set()
        in_regions = {node for region in regions.values() for node in region.nodes}
        ends = {region.end: index for index, region in regions.items()}
        with torch.no_grad():
            for node in network.nodes:
                if node in in_regions:
                    execute(network.module, [node], self._values)
                    if node in ends:
                        self._of_layers[ends[node], "float32"] = self._values[node]
                        shape = network.shapes[node][1:]
                        self._values[node] = torch.from_numpy(stand_in(node.name, shape))
                elif node in starts:
                    inside.update(self._compute_layer(starts[node], plan, exchanged))
                elif node not in inside:
                    execute(network.module, [node], self._values)

    def value(self, name: str) -> Array:
        """A tensor of the network's graph outside of layers, or the whole of one that is not exchanged."""
        return _numbers(next(value for node, value in self._values.items() if node.name == name))

    def of_layer(self, index: int, kind: str, neurons: NDArray[np.int64]) -> Array:
        """What a layer hands over of some of its neurons, from their copies of one representation."""
        layer, whole = self._layers[index], self._of_layers[index, kind]
        entries = (neurons[:, None] * layer.features + np.arange(layer.features)).ravel()
        return _numbers(whole.index_select(layer.axis, torch.from_numpy(entries)))

    def of_strip(self, index: int, rows: Rows) -> Array:
        """What the region that ends with a layer hands over of some rows."""
        first, end = rows
        return _numbers(self._of_layers[index, "float32"].narrow(ROWS, first, end - first))

    def of_pair(self, index: int, kind: str, neurons: NDArray[np.int64]) -> Array:
        """What copies of some neurons of a pair's first layer add to its second one's pre-activations."""
        first, second = self._layers[index], self._network.layers[self._pairs[index]]
        entries = torch.from_numpy((neurons[:, None] * first.features + np.arange(first.features)).ravel())
        hidden = self._of_layers[index, kind]
        alone = torch.zeros_like(hidden).index_copy_(first.axis, entries, hidden.index_select(first.axis, entries))
        values = self._of_second(self._pairs[index], kind) | {first.value: alone}
        del values[second.node]  # what is there is not computed again
        execute(self._network.module, [second.node], values)
        return _numbers(values[second.node] - self._bias(second, values))

    def _of_second(self, index: int, kind: str = "float32") -> dict[fx.Node, Any]:
        """The values with the parameters of a pair's second layer, for neurons of the first in such copies."""
        values = dict(self._values)
        if index in self._coarse_pairs:
            of_first = np.array([REPRESENTATIONS.index(kind)], np.int8)
            values |= self._copies.parameters_of_second(index, self._kept[index], of_first, values)
        return values

    def _bias(self, layer: NetworkLayer, values: Mapping[fx.Node, Any]) -> torch.Tensor:
        """A layer's bias in the shape that is added to what its filters give."""
        if layer.own_bias is None:
            return torch.zeros(())
        bias = next(value for node, value in values.items() if node.op == "get_attr" and node.target == layer.own_bias)
        return layer.without_tail.broadcast(bias)

    def of_sum(self, index: int, members: Sequence[NDArray[np.int64]]) -> Array:
        """What a layer's parity shard of these members hands over."""
        axis = self._layers[index].axis
        parts = [self.of_layer(index, "float32", neurons) for neurons in members]
        longest = max(parts, key=lambda part: part.shape[axis])
        total = np.zeros(longest.shape)
        for part in parts:
            total[(slice(None),) * axis + (slice(part.shape[axis]),)] += part
        return total

    def _compute_layer(self, index: int, plan: Plan, exchanged: Mapping[int, NetworkLayer]) -> list[fx.Node]:
        """Compute a layer from all of its copies, and go on with what follows from the plan; its nodes."""
        layer, neurons = self._layers[index], plan.layers[index].neurons
        nodes = [layer.node]
        while nodes[-1] is not layer.value:
            nodes.append(next(iter(nodes[-1].users)))
        if index in self._pairs.values():
            values = self._of_second(index)
            values[layer.node] = values[layer.node.all_input_nodes[0]] + self._bias(layer, values)
            execute(self._network.module, nodes[1:], values)
            self._values |= {node: values[node] for node in nodes}
            if index in exchanged:
                self._of_layers[index, "float32"] = values[layer.value]
                self._values[layer.value] = torch.from_numpy(stand_in(layer.value.name, layer.shape))
            return nodes
        kinds = {holder.representation for shard in plan.shards[index] for holder in shard.holders}
        for kind in kinds:
            copies = np.full(neurons, REPRESENTATIONS.index(kind), np.int8)
            values = dict(self._values)
            self._copies.compute(index, copies, values)
            execute(self._network.module, nodes, values)
            self._of_layers[index, kind] = values[layer.value]
        if index in exchanged:
            handed = self._network.layers[self._pairs[index]].without_tail if index in self._pairs else layer
            self._values[layer.value] = torch.from_numpy(stand_in(layer.value.name, handed.shape))
            return nodes
        whole = torch.empty_like(values[layer.value])
        for shard in plan.shards[index]:
            mine = np.array(shard.neurons)
            entries = torch.from_numpy((mine[:, None] * layer.features + np.arange(layer.features)).ravel())
            of_kind = self._of_layers[index, shard.holders[0].representation]
            whole.index_copy_(layer.axis, entries, of_kind.index_select(layer.axis, entries))
        self._values[layer.value] = whole
        return nodes


def _numbers(value: torch.Tensor) -> Array:
    found: Array = value.numpy()
    return found
