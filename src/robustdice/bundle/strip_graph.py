"""Models of strips: some rows of a region's end, from the whole of its source."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper

from robustdice.bundle.onnx_graph import Array, Cut, OnnxGraph, cut
from robustdice.errors import ModelError
from robustdice.model.network import Network
from robustdice.model.strips import ONE_ROW, ROWS, Region, Rows, Window, rows_needed

_SLIDING = {"Conv", "MaxPool", "AveragePool"}


def cut_strip(
    graph: OnnxGraph, network: Network, region: Region, rows: Rows, prefix: str, given: Iterable[str] = ()
) -> Cut:
    """What computes ``rows`` of a region's end from its source and the values ``given`` from outside. Everything inside
    gets ``prefix`` before its name. All strips of a region have the same weights, under the same names."""
    given = list(given)
    needed = rows_needed(network, region, rows)
    nodes: dict[str, onnx.NodeProto] = {}
    arrays: dict[str, Array] = {}
    weights: set[str] = set()
    for node in region.nodes:
        height = network.shapes[node][ROWS]
        rename: dict[str, str] = {}
        for value, window in region.reads[node]:
            whole = network.shapes[value][ROWS]
            start = needed[value][0] if value is not region.source else 0
            there = needed[value] if value is not region.source else (0, whole)
            wanted = window.reads(needed[node], height, whole)
            own = value.name if value is region.source else prefix + value.name
            rename[value.name] = own
            if wanted != there:
                first, end = (row - start for row in wanted)
                rename[value.name] = taken = f"{prefix}{value.name}/rows-{first}-{end}"
                bounds = {f"{taken}/first": first, f"{taken}/end": end, f"{taken}/axis": ROWS}
                arrays.update({name: np.array([number], np.int64) for name, number in bounds.items()})
                nodes.setdefault(taken, helper.make_node("Slice", [own, *bounds], [taken]))
        part = cut(graph, [*rename, *given], [node.name])
        names = {*part.arrays, *(output for each in part.nodes for output in each.output if output)}
        rename |= {name: prefix + name for name in names}
        arrays.update({prefix + name: array for name, array in part.arrays.items()})
        weights |= {prefix + name for name in part.weights}
        for each in part.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(each)
            copy.name = ""
            copy.input[:] = [rename.get(name, name) for name in each.input]
            copy.output[:] = [rename.get(name, name) for name in each.output]
            nodes.setdefault(copy.output[0], copy)
        ((value, window), *_) = region.reads[node]
        if window != ONE_ROW:
            _pad(nodes, prefix + node.name, window, needed[node], height, network.shapes[value][ROWS])
    return Cut(tuple(nodes.values()), arrays, frozenset(weights))


def _pad(nodes: dict[str, onnx.NodeProto], name: str, window: Window, rows: Rows, height: int, whole: int) -> None:
    """Pad what slides along the rows at the map's true border only."""
    node = nodes[name]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type not in _SLIDING or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ModelError(f"{name} cannot be computed in strips: it is exported as {node.op_type}; plan without rows")
    pads = list(attributes["pads"])
    pads[0], pads[len(pads) // 2] = window.pads(rows, height, whole)
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(key, value) for key, value in {**attributes, "pads": pads}.items())
