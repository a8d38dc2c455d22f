"""Which rows of a value are needed for which rows of what is computed from it.

Convolutions, pooling and what acts on each row by itself can be computed in strips: some rows of a result from some
rows of the input. A strip computes rows that its neighbour computes as well (the halo); rows are padded at the map's
true border only, so that a strip is what the whole map would have there. Rows lie along axis 2, behind the batch and
the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from robustdice.errors import PlanError
from robustdice.model.canonical import CONVOLUTIONS, arguments, aten, per_axis
from robustdice.model.channelwise import ARITHMETIC, ELEMENTWISE, overloads
from robustdice.model.network import Network
from robustdice.plan import Strips

ROWS = 2
"""The axis that rows lie along."""

FEW_WEIGHTS = 0.05
"""The share of a model's parameters that a run may have when nothing else is known: every device holds all of it."""

Rows = tuple[int, int]
"""The first row, and the one after the last."""


@dataclass(frozen=True)
class Window:
    """Row j of a result is computed from ``extent`` rows of its input, from ``step * j - padding`` on."""

    extent: int = 1
    step: int = 1
    padding: int = 0

    def reads(self, rows: Rows, height: int, whole: int) -> Rows:
        """The rows that ``rows`` of a result of ``height`` rows are computed from, of an input with ``whole`` rows. The
        last one takes what is left, as it does in the whole map, where rows may be left over."""
        first, end = rows
        last = whole if end == height else min(whole, self.step * (end - 1) - self.padding + self.extent)
        return max(0, self.step * first - self.padding), last

    def pads(self, rows: Rows, height: int, whole: int) -> Rows:
        """How many rows of padding come before and after what :meth:`reads` says."""
        first, end = rows
        behind = self.padding if end == height else self.step * (end - 1) - self.padding + self.extent - whole
        return max(0, self.padding - self.step * first), max(0, behind)


ONE_ROW = Window()


@dataclass(frozen=True)
class Region:
    """The ``nodes`` between the value ``source`` and the last of them, ``end``, in the graph's order; nobody else reads
    what they give. ``reads`` says for each of them which values it reads, and in which window. ``layers`` are positions
    in the network."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    reads: Mapping[fx.Node, tuple[tuple[fx.Node, Window], ...]]
    layers: tuple[int, ...]

    @property
    def end(self) -> fx.Node:
        """What is handed over."""
        return self.nodes[-1]


def window_of(node: fx.Node, network: Network) -> Window | None:
    """How ``node`` reads the rows of each tensor that it is computed from, or None where rows do not stay rows."""
    rule = _RULES.get(node.target)
    if rule is None or node not in network.per_image or len(network.shapes[node]) <= ROWS:
        return None
    return rule(node, network)


def regions(network: Network) -> list[Region]:
    """What can be computed in strips from the first layer's input on: for each number of layers the longest region, the
    shortest ones first. A region ends where one value is all that is needed of it."""
    starts = {layer.node: index for index, layer in enumerate(network.layers)}
    source = arguments(network.layers[0].node)[0]
    reads: dict[fx.Node, tuple[tuple[fx.Node, Window], ...]] = {}
    found: dict[tuple[int, ...], Region] = {}
    for node in network.nodes:
        used = [each for each in node.all_input_nodes if each.op != "get_attr"]
        window = window_of(node, network) if used and all(u is source or u in reads for u in used) else None
        if window is None:
            if any(each in reads for each in used):
                break
            continue
        reads[node] = tuple((each, window) for each in used)
        layers = tuple(starts[each] for each in reads if each in starts)
        if layers and all(each is node or reads.keys() >= each.users.keys() for each in reads):
            found[layers] = Region(source, tuple(reads), dict(reads), layers)
    return list(found.values())


def region_of(network: Network, layers: Sequence[int]) -> Region:
    """The region of these layers; PlanError when they are none."""
    for region in regions(network):
        if region.layers == tuple(layers):
            return region
    names = ", ".join(network.layers[index].layer.name for index in layers)
    raise PlanError(f"the layers {names} cannot be computed in strips of rows; make a new plan with 'robustdice plan'")


def runs_of(network: Network, devices: int) -> list[Strips]:
    """The runs at the network's front that have few weights, in strips for so many devices; the shortest first."""
    found = []
    for region in regions(network):
        weights = sum(layer.neurons * layer.neuron_weights for layer in (network.plan_layers[i] for i in region.layers))
        if weights <= FEW_WEIGHTS * network.parameters and network.shapes[region.end][ROWS] >= devices:
            found.append(strips_of(network, region, devices))
    return found


def rows_needed(network: Network, region: Region, rows: Rows) -> dict[fx.Node, Rows]:
    """For every value of a region, its source included: the rows that ``rows`` of its end are computed from."""
    needed = {region.end: rows}
    for node in reversed(region.nodes):
        height = network.shapes[node][ROWS]
        for value, window in region.reads[node]:
            first, end = window.reads(needed[node], height, network.shapes[value][ROWS])
            before = needed.get(value, (first, end))
            needed[value] = (min(first, before[0]), max(end, before[1]))
    return needed


def strips_of(network: Network, region: Region, devices: int) -> Strips:
    """The region in one strip for each device, so that the busiest computes as little as possible; PlanError where it
    does not have so many rows."""
    shape = network.shapes[region.end]
    if shape[ROWS] < devices:
        raise PlanError(f"{shape[ROWS]} rows are too few for strips on {devices} devices")
    bounds = [shape[ROWS] * device // devices for device in range(devices + 1)]
    work = [_work(network, region, rows) for rows in pairwise(bounds)]
    while True:
        # A row of the busiest device goes to a neighbour, as long as that makes the busiest less busy.
        busiest = work.index(max(work))
        better = []
        for inner, change in ((busiest, 1), (busiest + 1, -1)):
            moved = [bound + change * (number == inner) for number, bound in enumerate(bounds)]
            if 0 < inner < devices and all(a < b for a, b in pairwise(moved)):
                better.append((max(tried := [_work(network, region, rows) for rows in pairwise(moved)]), moved, tried))
        if not better or min(better)[0] >= max(work):
            break
        _, bounds, work = min(better)
    return strips_between(network, region, bounds)


def strips_between(network: Network, region: Region, bounds: Sequence[int]) -> Strips:
    """The region in strips of its end's rows ``bounds[d]`` to ``bounds[d + 1]``."""
    needed = [rows_needed(network, region, rows) for rows in pairwise(bounds)]
    nodes = [network.layers[index].node for index in region.layers]
    elements = 1
    for size in network.shapes[region.end][1:]:
        elements *= size
    return Strips(
        layers=region.layers,
        bounds=tuple(bounds),
        heights=tuple(network.shapes[node][ROWS] for node in nodes),
        computed=tuple(tuple(rows[node][1] - rows[node][0] for rows in needed) for node in nodes),
        activations=elements,
    )


def _work(network: Network, region: Region, rows: Rows) -> float:
    """Multiply-adds of a strip."""
    needed = rows_needed(network, region, rows)
    total = 0.0
    for layer in (network.layers[index] for index in region.layers):
        first, end = needed[layer.node]
        total += layer.layer.neurons * layer.layer.neuron_macs * (end - first) / network.shapes[layer.node][ROWS]
    return total


def _first(value: Any) -> int:
    """Of what is said for each axis that a window slides along: the rows'."""
    return int(value if isinstance(value, int) else value[0])


def _convolution(node: fx.Node, network: Network) -> Window | None:
    _, weight, _, stride, padding, dilation, _ = arguments(node, None, None, None, 1, 0, 1, 1)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    axes = len(network.shapes[node]) - ROWS
    step, pad, spread = (per_axis(given, axes)[0] for given in (stride, padding, dilation))
    return Window(spread * (network.shapes[weight][ROWS] - 1) + 1, step, pad)


def _max_pool(node: fx.Node, _: Network) -> Window | None:
    _, kernel, stride, padding, dilation, _ = arguments(node, None, None, [], 0, 1, False)
    return Window(_first(dilation) * (_first(kernel) - 1) + 1, _first(stride or kernel), _first(padding))


def _avg_pool(node: fx.Node, _: Network) -> Window | None:
    _, kernel, stride, padding, _, _, divisor = arguments(node, None, None, [], 0, False, True, None)
    return None if divisor else Window(_first(kernel), _first(stride or kernel), _first(padding))


def _each_row(node: fx.Node, network: Network) -> Window | None:
    """Every row from the same row of all tensors; parameters say the same to all rows."""
    height = network.shapes[node][ROWS]
    rank = len(network.shapes[node])
    for used in node.all_input_nodes:
        shape = network.shapes[used]
        if used.op == "get_attr":
            aligned = ROWS - (rank - len(shape))
            if aligned >= 0 and shape[aligned] != 1:
                return None
        elif len(shape) != rank or shape[ROWS] != height:
            return None
    return ONE_ROW


def _each_channel(node: fx.Node, network: Network) -> Window | None:
    """Parameters, if there are any, have an entry for each channel."""
    values = [used for used in node.all_input_nodes if used.op != "get_attr"]
    return ONE_ROW if all(network.shapes[value] == network.shapes[node] for value in values) else None


def _concatenation(node: fx.Node, network: Network) -> Window | None:
    axis = arguments(node, None, 0)[1] % len(network.shapes[node])
    return ONE_ROW if axis == 1 and all(used.op != "get_attr" for used in node.all_input_nodes) else None


_RULES: dict[Any, Callable[[fx.Node, Network], Window | None]] = {
    **dict.fromkeys(CONVOLUTIONS.values(), _convolution),
    **dict.fromkeys(overloads("max_pool1d.default", "max_pool2d.default", "max_pool3d.default"), _max_pool),
    **dict.fromkeys(overloads("avg_pool2d.default", "avg_pool3d.default"), _avg_pool),
    **dict.fromkeys((*ELEMENTWISE, *ARITHMETIC), _each_row),
    aten.batch_norm.default: _each_channel,
    aten.prelu.default: _each_channel,
    aten.cat.default: _concatenation,
}
