"""An exported program rewritten into the few forms that the rest of the project reasons about.

Exporters say the same thing in several ways (a linear layer as ``linear`` or as ``addmm`` with a transposed
weight, flattening as a ``view`` with the batch size spelled out). After :func:`canonicalise` the graph
is functional, computes any batch size, has one input and one output, and each layer is one node.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from robustdice.errors import ModelError, first_line
from robustdice.model.execute import attribute, execute

aten = torch.ops.aten

_IDENTITIES = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.lift_fresh_copy.default,
    aten._assert_tensor_metadata.default,
}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
"""By the number of axes that they slide along."""
_PADDED_BY_NAME = {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_BATCH_NORMS = {
    aten._native_batch_norm_legit_no_training.default: 5,
    aten._native_batch_norm_legit.default: 6,
    aten.native_batch_norm.default: 6,
}
"""Decomposed batch norms and the position of their momentum, which epsilon follows."""

_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
_SUMS_AND_PRODUCTS = {*_COMMUTATIVE, aten.sub.Tensor, aten.div.Tensor}

COPY_MARK = "__use"
"""What stands between the name of a parameter and the number of its use, from the second use on."""


def canonicalise(program: ExportedProgram) -> fx.GraphModule:
    """The program as a graph module with parameters as attributes; ModelError naming a node that cannot be placed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates parts of itself that it still uses
            module = program.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        raise ModelError(f"torch cannot decompose the exported model: {first_line(error)}") from None
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    _check_signature(graph)
    batch = _exported_batch(graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and "guard" in str(node.target):
            graph.erase_node(node)
        elif node.op not in {"placeholder", "get_attr", "call_function", "output"}:
            raise ModelError(f"node {node.name} ({node.op} {node.target}) cannot be placed: it is control flow")
        elif node.op == "call_function":
            _reject_unplaceable(node)
            _rewrite(graph, node, batch)
    graph.eliminate_dead_code()
    _join_linear_layers(graph)
    _fold_constants(module)
    _inline_numbers(module)
    _unshare(module)
    graph.lint()
    module.recompile()
    return module


def _check_signature(graph: fx.Graph) -> None:
    every = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = [node for node in every if node.users] or every[:1]
    for node in set(every) - set(inputs):  # flags that the export has decided about, say
        graph.erase_node(node)
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs)
        raise ModelError(f"the model takes {len(inputs)} inputs ({names}); robustdice runs models of one image tensor")
    if not inputs[0].meta["val"].shape:
        raise ModelError("the model takes a single number; robustdice runs models of one image tensor")
    output = graph.output_node()
    results = output.args[0]
    if isinstance(results, (tuple, list)):
        tensors = [result for result in results if isinstance(result, fx.Node)]
        if len(tensors) > 1:
            raise ModelError(
                f"the model has {len(tensors)} outputs; expected one tensor, a score per class: "
                "export a module that returns the class scores only"
            )
        output.args = tuple(tensors) or (None,)
    if not isinstance(output.args[0], fx.Node):
        raise ModelError("the model does not return a tensor; expected one score per class")
    graph._codegen = fx.graph.CodeGen()  # the exported calling convention (nested tuples) is gone


def _exported_batch(graph: fx.Graph) -> int | torch.SymInt:
    node = next(node for node in graph.nodes if node.op == "placeholder")
    batch: int | torch.SymInt = node.meta["val"].shape[0]
    return batch


def _reject_unplaceable(node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise ModelError(f"node {node.name} ({target}) cannot be placed: it is control flow; export without")
    if not isinstance(target, torch._ops.OpOverload):
        return
    if target._schema.is_mutable or target is aten._native_batch_norm_legit_functional.default:
        raise ModelError(
            f"node {node.name} ({target}) cannot be placed: it changes what the model holds, as training does; "
            "export in eval mode, and without counters"
        )
    if torch.Tag.nondeterministic_seeded in target.tags:
        given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False))
        given = {argument.name: argument.default_value for argument in target._schema.arguments} | given | node.kwargs
        training = given.get("train", given.get("training"))
        if training is not False and given.get("dropout_p") != 0:
            raise ModelError(f"node {node.name} ({target}) cannot be placed: it is random; export in eval mode")


def _rewrite(graph: fx.Graph, node: fx.Node, batch: int | torch.SymInt) -> None:
    target = node.target
    if target in _IDENTITIES or _is_whole_slice(node):
        if node.args and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    elif target is operator.getitem:
        _rewrite_item(graph, node)
    elif target is aten.convolution.default:
        x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
        if not transposed:
            dimensions = len(stride)  # type: ignore[arg-type]
            _replace(graph, node, CONVOLUTIONS[dimensions], (x, weight, bias, stride, padding, dilation, groups))
    elif target in _PADDED_BY_NAME:
        _rewrite_padding(graph, node)
    elif target in _VIEWS:
        _rewrite_view(graph, node, batch)
    elif target is aten.squeeze.default:
        _rewrite_squeeze(graph, node, batch)
    else:
        _rewrite_arithmetic(graph, node)


def _rewrite_item(graph: fx.Graph, node: fx.Node) -> None:
    """The first result of an operation that has several for training's sake."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or node.args[1] != 0:
        return
    if source.target in _BATCH_NORMS:
        _replace(graph, node, aten.batch_norm.default, _batch_norm_arguments(source))
    elif source.target is aten.max_pool2d_with_indices.default:
        _replace(graph, node, aten.max_pool2d.default, source.args)
    elif source.target is aten.adaptive_max_pool2d.default and list(source.args[1]) == [1, 1]:  # type: ignore[arg-type]
        _replace(graph, node, aten.amax.default, (source.args[0], [2, 3], True))


def _rewrite_arithmetic(graph: fx.Graph, node: fx.Node) -> None:
    target = node.target
    if target is aten.addmm.default and not node.kwargs:
        bias, x, matrix = node.args
        if bias.meta["val"].ndim == 1:  # type: ignore[union-attr]
            _replace(graph, node, aten.linear.default, (x, _transpose(graph, node, matrix), bias))
    elif target in {aten.mm.default, aten.matmul.default} and node.args[1].meta["val"].ndim == 2:  # type: ignore[union-attr]
        _replace(graph, node, aten.linear.default, (node.args[0], _transpose(graph, node, node.args[1]), None))
    elif target is aten.copy.default and _alike(*node.args[:2]):
        node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
        graph.erase_node(node)
    elif target is aten.clamp.default and node.meta["val"].is_floating_point():
        bounds = [None if bound is None else float(bound) for bound in arguments(node, None, None, None)[1:]]
        _replace(graph, node, target, (node.args[0], *bounds))
    elif target is aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:  # type: ignore[arg-type]
        _replace(graph, node, aten.mean.dim, (node.args[0], [2, 3], True))
    elif target is aten.mul.Tensor:
        _rewrite_swish(graph, node)


def arguments(node: fx.Node, *defaults: Any) -> tuple[Any, ...]:
    """The positional arguments of a node, those that are left out from ``defaults`` (one for every position)."""
    return (*node.args, *defaults[len(node.args) :])


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """A convolution's stride, padding or dilation along each of ``axes`` axes, of which one number stands for all."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers


def _replace(graph: fx.Graph, node: fx.Node, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, arguments)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    _, _, start, end, step = arguments(node, None, 0, None, None, 1)
    return start in {0, None} and end in {None, 2**63 - 1} and bool(step == 1)


def _batch_norm_arguments(norm: fx.Node) -> tuple[Any, ...]:
    momentum = _BATCH_NORMS[norm.target]  # type: ignore[index]
    if momentum == 6 and norm.args[5]:
        raise ModelError(f"node {norm.name} ({norm.target}) cannot be placed: it learns; export in eval mode")
    return (*norm.args[:5], False, norm.args[momentum], norm.args[momentum + 1], False)


def _transposed(node: Any) -> fx.Node | None:
    """The matrix whose transpose ``node`` is, or None."""
    if not isinstance(node, fx.Node):
        return None
    swaps = node.target is aten.t.default or (
        node.target in {aten.permute.default, aten.transpose.int} and list(_flat(node.args[1:])) in ([1, 0], [0, 1])
    )
    return node.args[0] if swaps and isinstance(node.args[0], fx.Node) else None


def _transpose(graph: fx.Graph, before: fx.Node, matrix: Any) -> fx.Node:
    """The transpose of a matrix, which is there already or computed before a node."""
    found = _transposed(matrix)
    if found is None:
        with graph.inserting_before(before):
            found = graph.call_function(aten.t.default, (matrix,))
        found.meta = {"val": matrix.meta["val"].T}
    return found


def _alike(a: Any, b: Any) -> bool:
    """Whether two nodes are tensors of one type and shape."""
    first, second = a.meta["val"], b.meta["val"]
    return bool(first.dtype == second.dtype and list(map(str, first.shape)) == list(map(str, second.shape)))


def _flat(values: Any) -> Sequence[int]:
    return [number for value in values for number in (value if isinstance(value, (list, tuple)) else [value])]


def _rewrite_view(graph: fx.Graph, node: fx.Node, batch: int | torch.SymInt) -> None:
    """Say a view without the batch size: as a flatten where it is one, else with -1 for the batch."""
    source, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    before, after = source.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if not before or not after or str(before[0]) != str(batch) or str(after[0]) != str(batch):
        _replace(graph, node, aten.reshape.default, (source, sizes))  # which takes any layout in memory
        return
    kept = len(after) - 1
    if len(after) < len(before) and tuple(before[:kept]) == tuple(after[:kept]):
        rest = before[kept:]
        if all(isinstance(size, int) for size in rest) and math.prod(rest) == after[-1]:
            _replace(graph, node, aten.flatten.using_ints, (source, kept))
            return
    if all(isinstance(size, int) for size in after[1:]):
        _replace(graph, node, aten.reshape.default, (source, [-1, *map(int, after[1:])]))
        return
    raise ModelError(f"node {node.name} (view to {sizes}) cannot be placed: more than the batch size is dynamic")


def _rewrite_padding(graph: fx.Graph, node: fx.Node) -> None:
    """Say a convolution's padding in numbers, what cannot be the same on both sides as a node of its own."""
    x, weight, bias, stride, padding, dilation, groups = arguments(node, None, None, None, [1], "valid", [1], 1)
    kernel = weight.meta["val"].shape[2:]
    stride, dilation = ([*given] * len(kernel) if len(given) == 1 else [*given] for given in (stride, dilation))
    total = [step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation, kernel, strict=True)]
    if any(both % 2 for both in total):
        sides = [side for both in reversed(total) for side in (both // 2, both - both // 2)]
        with graph.inserting_before(node):
            padded = graph.call_function(aten.constant_pad_nd.default, (x, sides, 0.0))
        x, total = padded, [0] * len(total)
    half = [both // 2 for both in total]
    _replace(graph, node, CONVOLUTIONS[len(kernel)], (x, weight, bias, stride, half, dilation, groups))


def _rewrite_squeeze(graph: fx.Graph, node: fx.Node, batch: int | torch.SymInt) -> None:
    """Name the axes that go, so that a batch of one image stays a batch."""
    before = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if before and str(before[0]) == str(batch):
        axes = [axis for axis, size in enumerate(before) if axis and isinstance(size, int) and size == 1]
        _replace(graph, node, aten.squeeze.dims, (node.args[0], axes))


def _rewrite_swish(graph: fx.Graph, node: fx.Node) -> None:
    """x * sigmoid(x) as the one operation that it is, so that it can be part of a tail."""
    for x, gate in (node.args, node.args[::-1]):
        if isinstance(gate, fx.Node) and gate.target is aten.sigmoid.default and gate.args[0] is x:
            _replace(graph, node, aten.silu.default, (x,))
            return


def _join_linear_layers(graph: fx.Graph) -> None:
    """Take away the views around a linear layer that flatten all but the last axis and bring them back."""
    for node in list(graph.nodes):
        if node.target is not aten.linear.default or len(node.users) != 1:
            continue
        flat, back = node.args[0], next(iter(node.users))
        if flat.target not in _VIEWS or back.target not in _VIEWS:
            continue
        source = flat.args[0].meta["val"].shape
        rows, result = flat.meta["val"].shape, back.meta["val"].shape
        same = (
            len(rows) == 2 and str(source[-1]) == str(rows[-1]) and str(result[-1]) == str(node.meta["val"].shape[-1])
        )
        if same and list(map(str, source[:-1])) == list(map(str, result[:-1])):
            _replace(graph, back, aten.linear.default, (flat.args[0], *node.args[1:]))
    graph.eliminate_dead_code()


def _unshare(module: fx.GraphModule) -> None:
    """Give every use of a parameter a parameter of its own: whoever computes one of them may not hold the others."""
    graph = module.graph
    uses: dict[str, int] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        value = operator.attrgetter(name)(module)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        for user in list(node.users):
            uses[name] = uses.get(name, 0) + 1
            if uses[name] > 1:
                path, _, own = name.rpartition(".")
                copy = f"{own}{COPY_MARK}{uses[name]}"
                module.get_submodule(path).register_buffer(copy, value.detach().clone())
                with graph.inserting_before(user):
                    again = graph.get_attr(f"{path}.{copy}" if path else copy)
                again.meta = dict(node.meta)
                user.replace_input_with(node, again)
    graph.eliminate_dead_code()


def _fold_constants(module: fx.GraphModule) -> None:
    """Compute what depends on parameters alone (standardised or normalised weights) once and for all."""
    graph = module.graph
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and node.all_input_nodes and constant.issuperset(node.all_input_nodes)
        ):
            constant.add(node)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        execute(module, [node for node in graph.nodes if node in constant], values)
    for node in graph.nodes:
        boundary = node in constant and node.op == "call_function" and not constant.issuperset(node.users)
        if boundary and isinstance(values[node], torch.Tensor):
            name = f"folded_{node.name}"
            module.register_buffer(name, values[node].clone())
            with graph.inserting_before(node):
                folded = graph.get_attr(name)
            folded.meta = dict(node.meta)
            node.replace_all_uses_with(folded)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()


def _inline_numbers(module: fx.GraphModule) -> None:
    """A parameter with one entry (a temperature, a gain, the slope of all channels) becomes a number, where it is a
    number to each neuron alike: so what it scales stays in the neurons' tails."""
    graph = module.graph
    for node in graph.nodes:
        if node.target not in {*_SUMS_AND_PRODUCTS, aten.prelu.default}:
            continue
        x, other = node.args
        if isinstance(x, fx.Node) and x.op == "get_attr" and node.target in _COMMUTATIVE:
            x, other = other, x
        if not isinstance(x, fx.Node) or not isinstance(other, fx.Node) or other.op != "get_attr":
            continue
        value = attribute(module, str(other.target))
        if value.numel() == 1 and value.dtype != torch.bool and _alike(x, node):
            node.args = (x, value.item())
            if node.target is aten.prelu.default:
                node.target = aten.leaky_relu.default
    graph.eliminate_dead_code()
