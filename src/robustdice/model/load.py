"""Model sources: ``torchvision:NAME``, ``timm:NAME``, ``.pt2`` and ``.onnx`` files, ``package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import os
import sys
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from robustdice.errors import ModelError, first_line
from robustdice.images import check_preprocessing
from robustdice.importable import importable_from_here
from robustdice.model.network import Network, build_network
from robustdice.plan import ModelReference

_EXPORT_ADVICE = "torch.export must be able to trace it (https://pytorch.org/docs/stable/export.html)"


def load_model(
    source: str,
    *,
    random_weights: bool = False,
    seed: int = 0,
    preprocessing: Mapping[str, Any] | None = None,
) -> Network:
    """Load a model and find its layers.

    ``preprocessing`` overrides single entries of what the source says (keys as in a sidecar, docs/formats.md).
    ``random_weights`` takes seeded random weights instead of pretrained ones. ModelError when the source cannot
    be found, has no weights, does not export, or holds an operation that cannot be placed.
    """
    library, _, name = source.partition(":")
    if source.endswith((".pt2", ".onnx")):
        program, found = _load_file(Path(source), random_weights, preprocessing)
        source = str(Path(source).resolve())
    elif name and library in _LIBRARIES:
        program, found = _LIBRARIES[library](name, random_weights, seed, preprocessing)
    elif name:
        program, found = _load_factory(source, random_weights, seed, preprocessing)
    else:
        raise ModelError(
            f"{source!r} is not a model: expected torchvision:NAME, timm:NAME, a .pt2 or .onnx file, "
            "or package.module:factory"
        )
    merged = check_preprocessing({**found, **(preprocessing or {})})
    network = build_network(program, source, merged, seed if random_weights else None)
    _check_preprocessing_fits(network)
    return network


def reload_model(reference: ModelReference) -> Network:
    """The model that a plan names; ModelError when it is gone or no longer the same."""
    seed = reference.random_weights_seed
    network = load_model(
        reference.source,
        random_weights=seed is not None,
        seed=seed or 0,
        preprocessing=reference.preprocessing,
    )
    if network.reference.digest != reference.digest:
        raise ModelError(
            f"{reference.source} has changed since the plan was made (digest {network.reference.digest[:12]}, "
            f"the plan expects {reference.digest[:12]}); make a new plan with 'robustdice plan'"
        )
    return network


def _check_preprocessing_fits(network: Network) -> None:
    declared = network.preprocessing
    size = tuple(declared.get("input_size", network.input_shape))
    if size != network.input_shape and sorted(size) == sorted(network.input_shape):
        raise ModelError(
            f"the model takes images as {list(network.input_shape)}, robustdice gives [channels, height, width]: "
            "export a module that permutes them"
        )
    if size != network.input_shape:
        raise ModelError(
            f"the model takes inputs of shape {list(network.input_shape)}, but input_size says {list(size)}; "
            "correct --size or the sidecar"
        )
    classes = declared.get("classes")
    if classes and len(classes) != network.outputs:
        raise ModelError(
            f"the model has {network.outputs} outputs, but {len(classes)} classes are named; "
            "correct --classes or the sidecar"
        )


def _load_file(
    path: Path, random_weights: bool, preprocessing: Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any]]:
    if random_weights:
        raise ModelError(
            f"--random-weights is for models that are built by name; a {path.suffix} file brings its weights"
        )
    if not path.is_file():
        raise ModelError(f"there is no model file {path}")
    declared = _sidecar(path)
    if path.suffix == ".onnx":
        return _load_onnx(path, {**declared, **(preprocessing or {})}), declared
    try:
        with quiet(), _nothing_unpickled():
            program = torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path} is not a torch.export program: {_what_else(path) or first_line(error)}") from None
    return _with_fixed_size(program, {**declared, **(preprocessing or {})}, path), declared


def _what_else(path: Path) -> str:
    """What a file is that was taken for a torch.export program, and what to do about it; empty when unknown."""
    way_out = "write one with torch.export.save(torch.export.export(model.eval(), ...), path)"
    try:
        with path.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                return "it is a pointer of Git LFS; 'git lfs pull' fetches the file"
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return ""
    if any("/code/" in name for name in names):
        return f"it is a TorchScript file; {way_out}"
    if any(name.endswith("/data.pkl") for name in names):
        return f"it is what torch.save writes; {way_out}"
    return ""


def _with_fixed_size(program: ExportedProgram, declared: Mapping[str, Any], path: Path) -> ExportedProgram:
    """The program for images of the declared size, when it takes images of any."""
    size = check_preprocessing(declared).get("input_size")
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    if size is None or not any(isinstance(side, torch.SymInt) for side in _sides(inputs)):
        return program
    return _export(program.module(check_guards=False), size, str(path))


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
        document = json.loads(sidecar.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read the sidecar {sidecar}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the sidecar {sidecar} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"the sidecar {sidecar} is not a JSON object; see docs/formats.md")
    return document


def _load_onnx(path: Path, declared: Mapping[str, Any]) -> ExportedProgram:
    from robustdice.model.onnx_import.file import load_onnx  # noqa: PLC0415 -- other sources need no ONNX

    with quiet():
        module, shape = load_onnx(path, check_preprocessing(declared).get("input_size"))
    return _export(module, shape, str(path))


def _load_torchvision(
    name: str, random_weights: bool, seed: int, preprocessing: Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any]]:
    torchvision = import_torchvision()
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except ValueError:
        raise ModelError(
            f"torchvision has no classification model {name!r}; see https://pytorch.org/vision/stable/models.html"
        ) from None
    transform = weights.transforms()
    declared: dict[str, Any] = {"input_size": [3, 224, 224]}
    if hasattr(transform, "crop_size"):
        declared = {
            "input_size": [3, transform.crop_size[0], transform.crop_size[0]],
            "resize": transform.resize_size[0],
            "interpolation": transform.interpolation.value,
            "mean": list(transform.mean),
            "std": list(transform.std),
        }
    try:
        with quiet(), _seeded(seed):
            model = torchvision.models.get_model(name, weights=None if random_weights else weights)
    except OSError as error:
        raise ModelError(
            f"the weights of torchvision:{name} are not on this machine and could not be fetched from {weights.url} "
            f"({first_line(error)}); put the file into {Path(torch.hub.get_dir()) / 'checkpoints'}, "
            "or go on with --random-weights"
        ) from None
    return _export(model, _input_size({**declared, **(preprocessing or {})}, name), f"torchvision:{name}"), declared


def _load_timm(
    name: str, random_weights: bool, seed: int, preprocessing: Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any]]:
    import_torchvision()  # which timm imports
    try:
        timm: Any = importlib.import_module("timm")  # takes seconds
    except ImportError:
        raise ModelError("timm is not installed; pip install 'robustdice[workshop]'") from None
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}; 'import timm; timm.list_models()' lists them")
    try:
        with quiet(), _seeded(seed):
            model = timm.create_model(name, pretrained=not random_weights)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"the weights of timm:{name} are not on this machine and could not be fetched ({first_line(error)}); "
            "fetch them on a machine with a network and copy its Hugging Face cache, or go on with --random-weights"
        ) from None
    found = timm.data.resolve_model_data_config(model)
    size = (preprocessing or {}).get("input_size") or found["input_size"]
    return _export(model, size, f"timm:{name}"), as_timm_prepares(found, size)


def as_timm_prepares(found: Mapping[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """The preprocessing that timm evaluates a model with, for images of ``size``, in the words of a sidecar."""
    box = [int(side / found["crop_pct"]) for side in size[1:]]
    fit: dict[str, Any] = {"resize": box}
    if found["crop_mode"] == "border":
        fit |= {"fit": "contain", "border": [round(255 * part) for part in (list(found["mean"]) * 3)[:3]]}
    elif found["crop_mode"] != "squash":
        fit = {"resize": box[0]} if box[0] == box[1] else {"resize": box, "fit": "cover"}
    declared = {key: found[key] for key in ("interpolation", "mean", "std")}
    return {"input_size": list(size), **fit, **declared}


def _load_factory(
    source: str, random_weights: bool, seed: int, preprocessing: Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any]]:
    module_name, _, attribute = source.partition(":")
    with importable_from_here():
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # whatever the module does on import
            raise ModelError(f"cannot import the model {source!r}: {first_line(error)}") from None
        if not callable(factory):
            raise ModelError(f"{source} is a {type(factory).__name__}; expected a function that returns the model")
        takes_flag = "random_weights" in inspect.signature(factory).parameters
        if random_weights and not takes_flag:
            raise ModelError(
                f"{source} takes no argument random_weights: --random-weights would change nothing, leave it out"
            )
        try:
            with _seeded(seed if random_weights else 0):
                model = factory(random_weights=random_weights) if takes_flag else factory()
        except Exception as error:
            raise ModelError(f"{source} failed: {type(error).__name__}: {first_line(error)}") from error
    if isinstance(model, ExportedProgram):
        return model, {}
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{source} returned a {type(model).__name__}; expected a torch.nn.Module")
    declared = dict(getattr(model, "preprocessing", {}))
    return _export(model, _input_size({**declared, **(preprocessing or {})}, source), source), declared


_LIBRARIES = {"torchvision": _load_torchvision, "timm": _load_timm}


def _input_size(declared: Mapping[str, Any], name: str) -> tuple[int, ...]:
    if declared.get("input_size") is None:
        raise ModelError(f"the input size of {name} is not known; say it with --size, as in --size 3,224,224")
    return tuple(check_preprocessing(declared)["input_size"])


def _export(model: torch.nn.Module, shape: Sequence[int], name: str) -> ExportedProgram:
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


def import_torchvision() -> types.ModuleType:
    """torchvision, also where its C++ operators do not load beside this build of torch.

    Its models and transforms need none of them, but it registers Python code for two operators on
    import, which fails unless somebody declares them.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    except ImportError:
        raise ModelError("torchvision is not installed; pip install 'robustdice[workshop]'") from None
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for operator in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # declared before
            _TORCHVISION_OPERATORS.define(f"{operator}{boxes}")  # type: ignore[no-untyped-call]
    return importlib.import_module("torchvision")


_TORCHVISION_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With torch's random numbers from ``seed`` on; the caller's own go on afterwards where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation warnings that torch raises about its own insides, and the tracebacks that it logs.

    What goes wrong is said once, by the error that follows.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
