"""Models in files, ``.pt2`` and ``.onnx``, with the sidecar that says how images become their input."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from robustdice.errors import ModelError, first_line
from robustdice.files import read_json
from robustdice.images import check_preprocessing
from robustdice.model.foreign import ONNX, PROGRAM, recognise
from robustdice.model.tracing import export_module, is_float32, module_in_float32, quiet


def load_file(path: Path, preprocessing: Mapping[str, Any] | None) -> tuple[ExportedProgram, dict[str, Any]]:
    """The program of a file, and what its metadata and sidecar say; ``preprocessing`` is said beside them.

    What a file is, its content says, and its name where that is damaged. ModelError when it is no model.
    """
    kind = recognise(path)
    declared = _sidecar(path)
    if kind == ONNX:
        return _load_onnx(path, {**declared, **(preprocessing or {})})
    assert kind == PROGRAM
    try:
        with quiet(), _nothing_unpickled():
            program = torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path} is not a torch.export program: {first_line(error)}") from None
    return normalise_program(program, {**declared, **(preprocessing or {})}, str(path)), declared


def normalise_program(program: ExportedProgram, declared: Mapping[str, Any], name: str) -> ExportedProgram:
    """The program in float32, and for images of the declared size when it takes images of any."""
    size = check_preprocessing(declared).get("input_size")
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    sides = _sides(inputs)
    is_open = any(isinstance(side, torch.SymInt) for side in sides)
    shape = size if is_open else sides
    if shape is None or (not is_open and is_float32(program)):
        return program
    return export_module(module_in_float32(program), shape, name)


def _sides(inputs: Sequence[torch.fx.Node]) -> Sequence[Any]:
    """The axes of the first input behind that for the batch."""
    value = inputs[0].meta.get("val") if inputs else None
    return value.shape[1:] if isinstance(value, torch.Tensor) else ()


def _sidecar(path: Path) -> dict[str, Any]:
    """What the file beside a model file says about images and classes."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return {}
    try:
        document = read_json(sidecar.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read the sidecar {sidecar}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"the sidecar {sidecar} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"the sidecar {sidecar} is not a JSON object; see docs/formats.md")
    return document


def _load_onnx(path: Path, declared: Mapping[str, Any]) -> tuple[ExportedProgram, dict[str, Any]]:
    from robustdice.model.onnx_import.file import load_onnx  # noqa: PLC0415 -- other sources need no ONNX

    with quiet():
        module, shape, found = load_onnx(path, check_preprocessing(declared).get("input_size"))
    return export_module(module, shape, str(path)), {**found, **declared}


@contextlib.contextmanager
def _nothing_unpickled() -> Iterator[None]:
    """torch.export.load falls back to unpickling, and so to running, what is no plain data: not with us."""
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
