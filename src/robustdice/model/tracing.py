"""Modules traced by torch.export, in float32 and on the CPU, whatever they were before, and without torch's dumps."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from robustdice.errors import ModelError, first_line

_EXPORT_ADVICE = "torch.export must be able to trace it (https://pytorch.org/docs/stable/export.html)"


def export_module(model: torch.nn.Module, shape: Sequence[int], name: str) -> ExportedProgram:
    """The program of a module for images of ``shape`` and any batch; ModelError saying why ``name`` does not export."""
    with contextlib.suppress(NotImplementedError):  # what has been exported before is as it is
        model.eval()
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                model, (torch.zeros(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name} does not export: {first_line(error)}; {_EXPORT_ADVICE}") from None


def prepare_module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module that DataParallel, torch.compile and their like are wrapped around, on the CPU and in float32.

    ModelError when it has no weights yet.
    """
    model = _unwrapped(model)
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise ModelError(f"{name} has weights without values (on the device 'meta'): load them in the factory")
    return model.to("cpu").float()


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    while True:
        inner = module._modules.get("_orig_mod")  # of torch.compile
        if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            break
        module = inner
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _unwrapped(child)
    module._compiled_call_impl = None  # what Module.compile() leaves
    return module


def is_float32(program: ExportedProgram) -> bool:
    """Whether all that a program computes with, its input included, is float32 (or no float at all)."""
    inputs = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    tensors = [*program.state_dict.values(), *program.constants.values(), *inputs]
    kinds = {value.dtype for value in tensors if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return kinds <= {torch.float32}


def module_in_float32(program: ExportedProgram) -> torch.nn.Module:
    """The module of a program, where every half, bfloat16 or double became float32."""
    module = program.module(check_guards=False)
    if is_float32(program):
        return module
    assert isinstance(module, torch.fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
            continue
        node.args, node.kwargs = tree_map_only(torch.dtype, _float32, (node.args, node.kwargs))
        value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and value.is_floating_point():
            setattr(module, str(node.target), value.float())
    module.recompile()
    return module.float()


def _float32(kind: torch.dtype) -> torch.dtype:
    return torch.float32 if kind.is_floating_point else kind


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation warnings that torch raises about its own insides, and what it logs and prints.

    What goes wrong is said once, by the error that follows.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
