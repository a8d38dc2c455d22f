"""What a network's last operations say about its output: where the class scores are, and how they become probabilities.

Networks end in scores, in a softmax or sigmoid of them, in one score for a yes or no; as [batch, classes] or with
further axes of one entry. Whatever it was, the graph's output is a score for every class, [batch, classes], afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from robustdice.errors import ModelError
from robustdice.model.canonical import aten
from robustdice.model.execute import Shapes

SOFTMAX, SIGMOID = "softmax", "sigmoid"
"""How scores become probabilities: one class is right, or each class is a question of its own."""

_SOFTMAXES = {aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default}
_SIGMOIDS = {aten.sigmoid.default, aten.log_sigmoid.default}
_KEEPS_ORDER = {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.log.default}
"""What leaves the order of probabilities as it is, and may end a model."""
_MOVES = {
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.permute.default,
    aten.transpose.int,
}
"""What leaves entries in their order as long as they lie along one axis."""

ONE_SCORE = (
    "the model returns one score and says nothing about it. If it is a yes or no before its sigmoid, say so: "
    '{"activation": "sigmoid"} in the sidecar, a file NAME.json beside NAME.pt2 or NAME.onnx '
    "(or in the module's attribute preprocessing). "
    "A model of a quantity is none that robustdice can run: it expects a score for every class"
)


def flatten_scores(graph: fx.Graph) -> None:
    """Bring an output [batch, 1, classes, 1], or one with such axes in other places, to [batch, classes]."""
    end = graph.output_node()
    output = end.args[0]
    assert isinstance(output, fx.Node)
    value = output.meta.get("val")
    source = next(node for node in graph.nodes if node.op == "placeholder").meta["val"]
    if not isinstance(value, torch.Tensor) or not value.ndim or str(value.shape[0]) != str(source.shape[0]):
        return
    sizes = value.shape[1:]
    if value.ndim == 2 or sum(size != 1 for size in sizes) > 1:
        return
    with graph.inserting_before(end):
        if sizes:
            scores = graph.call_function(aten.flatten.using_ints, (output, 1))
        else:
            scores = graph.call_function(aten.unsqueeze.default, (output, 1))
    scores.meta = {"val": value.reshape(-1, math.prod(sizes))}
    end.args = (scores,)


def read_output(module: fx.GraphModule, shapes: Shapes, declared: Mapping[str, Any]) -> tuple[fx.Node, int, str]:
    """Make the class scores the output; their node and number, and how they become probabilities.

    ``shapes`` are those of the tensors so far; ``declared`` (a sidecar) may say the ``activation`` that the graph
    leaves out. One score z behind a sigmoid becomes two, [0, z], whose softmax is the sigmoid's. ModelError when what
    one score means is not known.
    """
    graph = module.graph
    end = graph.output_node()
    output = end.args[0]
    assert isinstance(output, fx.Node)
    scores, found = _without_activation(output, shapes)
    said = declared.get("activation")
    if said == SIGMOID and found == SOFTMAX:
        raise ModelError("the model ends in a softmax, but its activation is said to be a sigmoid; correct the sidecar")
    outputs, activation = shapes[output][1], said or found or SOFTMAX
    if outputs == 1:
        if SIGMOID not in (found, said):
            raise ModelError(ONE_SCORE)
        with graph.inserting_before(end):
            scores = graph.call_function(aten.constant_pad_nd.default, (scores, [1, 0], 0.0))
        outputs, activation = 2, SOFTMAX
    end.args = (scores,)
    graph.eliminate_dead_code()
    module.recompile()
    return scores, outputs, activation


def _without_activation(output: fx.Node, shapes: Shapes) -> tuple[fx.Node, str | None]:
    """The scores before a softmax or sigmoid that ends the graph, in the output's shape, and which of the two it was;
    the output itself when there is none."""
    batch, classes = shapes[output]
    behind: list[fx.Node] = []
    node = output
    while node.target in _KEEPS_ORDER | _MOVES and isinstance(node.args[0], fx.Node):
        behind.append(node)
        node = node.args[0]
    shape = shapes[node]
    if shape[:1] != (batch,) or math.prod(shape[1:]) != classes or sum(size != 1 for size in shape[1:]) > 1:
        return output, None
    if node.target in _SIGMOIDS:
        found = SIGMOID
    elif node.target in _SOFTMAXES and classes > 1 and shape[int(node.args[1])] == classes:  # type: ignore[arg-type]
        found = SOFTMAX
    else:
        return output, None
    scores = node.args[0]
    assert isinstance(scores, fx.Node)
    for following in reversed(behind):
        if following.target in _MOVES:
            following.args = (scores, *following.args[1:])
            scores = following
    return scores, found
