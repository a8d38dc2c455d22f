"""The rewritten graph beside the exported program that it was made of: the same scores, for any batch."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from robustdice.errors import ModelError, first_line
from robustdice.model.execute import Shapes, attribute, measure_shapes

_DYNAMIC_BATCH = (
    "export it in eval mode with a dynamic batch size: "
    "torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))"
)


def check_types(module: fx.GraphModule, source: fx.Node) -> None:
    """Everything that is computed with is float32: plans count four bytes a parameter."""
    found = {f"input {source.name}": source.meta["val"].dtype}
    found |= {str(n.target): attribute(module, str(n.target)).dtype for n in module.graph.nodes if n.op == "get_attr"}
    for name, kind in found.items():
        if name.startswith("input ") and not kind.is_floating_point:
            raise ModelError(f"{name} is {kind}; robustdice gives float32 images: export a module that takes them")
        if kind != torch.float32 and (kind.is_floating_point or kind.is_complex):
            raise ModelError(
                f"{name} is {kind}; robustdice takes float32 models: export model.float(), its constants too"
            )


def run_beside(
    module: fx.GraphModule, program: ExportedProgram, example: torch.Tensor
) -> tuple[Shapes, frozenset[fx.Node]]:
    """Shapes for ``example``, and the tensors whose first axis is the batch; ModelError when the
    rewritten graph does not give an image the original's scores, whatever the batch that it is in."""
    try:
        output, shapes = measure_shapes(module, example)
        with torch.no_grad():
            expected = _original(program, example)
            expected = expected.reshape(len(example), -1) if expected.numel() == output.numel() else expected
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"the model does not run a batch of {len(example)} ({first_line(error)}); {_DYNAMIC_BATCH}"
        ) from None
    if output.ndim != 2 or output.dtype != torch.float32:
        raise ModelError(
            f"the model returns {output.dtype} of shape {tuple(output.shape)}; expected float32 [batch, classes] "
            "(further axes may have one entry): export a module that returns the class scores so"
        )
    if not bool(expected.isfinite().all()):
        raise ModelError("the model's scores for random images are not finite; look for NaN or infinity in its weights")
    more = torch.cat([example, example[:1]])
    try:
        larger, more_shapes = measure_shapes(module, more)
        single, _ = measure_shapes(module, example[:1])
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"the model runs batches of {len(example)} only ({first_line(error)}); {_DYNAMIC_BATCH}"
        ) from None
    for result, images in (
        (output, slice(None)),
        (larger[:-1], slice(None)),
        (larger[-1:], slice(1)),
        (single, slice(1)),
    ):
        wanted = expected[images]
        scale = wanted.abs().max().clamp_min(1e-12)
        if result.shape != wanted.shape or not float((result - wanted).abs().max() / scale) <= 1e-4:
            raise ModelError(
                f"the model's answers for an image depend on the batch that it is in, or on chance; {_DYNAMIC_BATCH}"
            )
    per_image = frozenset(
        node
        for node, shape in shapes.items()
        if shape and shape[0] == len(example) and more_shapes[node] == (len(more), *shape[1:])
    )
    return shapes, per_image


def _original(program: ExportedProgram, example: torch.Tensor) -> torch.Tensor:
    """What the program itself gives, called as it was exported: its image by name or in a dictionary, say."""
    arguments, keywords = program.example_inputs or ((example,), {})
    arguments, keywords = tree_map_only(torch.Tensor, lambda _: example, (arguments, keywords))
    results = tree_leaves(program.module(check_guards=False)(*arguments, **keywords))
    (result,) = (result for result in results if isinstance(result, torch.Tensor))
    return result
