"""Running a canonical graph: its nodes one after the other, and the shapes of what they compute."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

Shapes = Mapping[fx.Node, tuple[int, ...]]


def attribute(module: fx.GraphModule, name: str) -> torch.Tensor:
    """The parameter or buffer that a ``get_attr`` node names."""
    value = operator.attrgetter(name)(module)
    assert isinstance(value, torch.Tensor)
    return value


def execute(module: fx.GraphModule, nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
    """Run ``nodes`` in order. ``values`` has what they need from outside and receives what they compute; what it
    has already is not computed again."""
    for node in nodes:
        if node in values:
            continue
        if node.op == "get_attr":
            values[node] = attribute(module, str(node.target))
        elif node.op == "call_function":
            arguments = fx.map_arg(node.args, values.__getitem__)
            keywords = fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*arguments, **keywords)  # type: ignore[operator]


def readers(nodes: Sequence[fx.Node]) -> Counter[fx.Node]:
    """By how many of the ``nodes`` each value is read."""
    return Counter(used for node in nodes for used in node.all_input_nodes)


def forget(node: fx.Node, values: dict[fx.Node, Any], left: Counter[fx.Node]) -> None:
    """Drop the ``values`` that nobody reads any more behind a node; ``left`` counts those who still will."""
    for used in node.all_input_nodes:
        left[used] -= 1
        if not left[used]:
            values.pop(used, None)


def measure_shapes(module: fx.GraphModule, example: torch.Tensor) -> tuple[torch.Tensor, Shapes]:
    """Run the module on ``example``; its output, and the shape of every tensor on the way."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = example
    with torch.no_grad():
        execute(module, list(module.graph.nodes), values)
    shapes = {node: tuple(value.shape) for node, value in values.items() if isinstance(value, torch.Tensor)}
    output = module.graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    return values[output], shapes
