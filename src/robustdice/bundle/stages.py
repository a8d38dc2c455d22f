"""Where a network is cut into stages, given which of its layers are exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network


@dataclass(frozen=True)
class StageGraph:
    """What is computed between two exchanges, in nodes of the network's graph.

    ``local_outputs`` are computed from ``local_inputs`` by every device; ``layers`` (positions in the network)
    are exchanged at the end; ``keep`` are the values that later stages need.
    """

    local_inputs: tuple[fx.Node, ...]
    local_outputs: tuple[fx.Node, ...]
    layers: tuple[int, ...]
    keep: tuple[fx.Node, ...]


def split_into_stages(network: Network, exchanged: Mapping[int, NetworkLayer]) -> list[StageGraph]:
    """Every node as early as possible: a stage has all layers whose inputs the exchanges before it complete.

    ``exchanged`` has the layers that are exchanged, by their position in the network, each from the node that begins it
    (in a run, its first layer's) up to the value that is handed over. Other layers are computed by every device, like
    all that lies between layers.
    """
    layers = {layer.node: index for index, layer in exchanged.items()}
    stage_of_value = {network.input: 0}  # the stage from which on a tensor is there
    stage_of_layer: dict[int, int] = {}
    computed: dict[fx.Node, int] = {}  # tensors computed by every device, and in which stage
    inside: set[fx.Node] = set()  # the inner nodes of exchanged layers and their tails
    for node in network.nodes:
        if node not in network.shapes or node.op != "call_function" or node in inside:
            continue
        stage = max((stage_of_value[used] for used in tensors_used(network, node)), default=0)
        if node in layers:
            layer = exchanged[layers[node]]
            stage_of_layer[layers[node]] = stage
            stage_of_value[layer.value] = stage + 1
            inside.update(_inside(network, layer))
        else:
            stage_of_value[node] = computed[node] = stage
    last = stage_of_value[network.output]
    needed = _last_uses(network, layers, stage_of_layer, computed, last)
    return [
        _stage(network, number, stage_of_value, stage_of_layer, computed, needed, exchanged)
        for number in range(last + 1)
    ]


def tensors_used(network: Network, node: fx.Node) -> list[fx.Node]:
    """The tensors a node is computed from, through sizes and tuples, without parameters; each once, in order."""
    found: dict[fx.Node, None] = {}
    for used in node.all_input_nodes:
        if used.op == "get_attr":
            continue
        if used in network.shapes:
            found[used] = None
        else:
            found.update(dict.fromkeys(tensors_used(network, used)))
    return list(found)


def _inside(network: Network, layer: NetworkLayer) -> set[fx.Node]:
    """The nodes that compute a layer's value from what the layer reads."""
    known = set(tensors_used(network, layer.node))
    found: set[fx.Node] = set()
    pending = [layer.value]
    while pending:
        node = pending.pop()
        if node not in known and node not in found and node.op == "call_function":
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _last_uses(
    network: Network,
    layers: dict[fx.Node, int],
    stage_of_layer: dict[int, int],
    computed: dict[fx.Node, int],
    last: int,
) -> dict[fx.Node, int]:
    """For every value: the last stage that reads it."""
    uses = {network.output: last}
    for node in network.nodes:
        stage = stage_of_layer[layers[node]] if node in layers else computed.get(node)
        if stage is not None:
            for used in tensors_used(network, node):
                uses[used] = max(stage, uses.get(used, 0))
    return uses


def _stage(
    network: Network,
    number: int,
    stage_of_value: dict[fx.Node, int],
    stage_of_layer: dict[int, int],
    computed: dict[fx.Node, int],
    needed: dict[fx.Node, int],
    exchanged: Mapping[int, NetworkLayer],
) -> StageGraph:
    here = [node for node, stage in computed.items() if stage == number]
    members = tuple(sorted(index for index, stage in stage_of_layer.items() if stage == number))
    read_by_layers = {used for index in members for used in tensors_used(network, exchanged[index].node)}
    outputs = tuple(node for node in here if node in read_by_layers or needed[node] > number or node is network.output)
    inputs: dict[fx.Node, None] = {}
    for node in here:
        inputs.update({used: None for used in tensors_used(network, node) if computed.get(used) != number})
    exchanged_here = {exchanged[index].value for index in members}
    keep = tuple(
        value
        for value, stage in stage_of_value.items()
        if (stage <= number or value in exchanged_here) and needed.get(value, -1) > number
    )
    return StageGraph(tuple(inputs), outputs, members, keep)


def merged(stages: Sequence[StageGraph], exchanged: Mapping[int, NetworkLayer]) -> list[list[StageGraph]]:
    """Stages that follow each other without an exchange, together."""
    groups: list[list[StageGraph]] = [[]]
    for stage in stages:
        groups[-1].append(stage)
        if any(index in exchanged for index in stage.layers):
            groups.append([])
    return groups if groups[-1] else groups[:-1]
