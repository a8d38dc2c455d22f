"""Model sources: ``torchvision:NAME``, a ``.pt2`` file, ``package.module:factory``."""

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from robustdice.errors import ModelError
from robustdice.images import check_preprocessing
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
    if source.endswith(".pt2"):
        program, found = _load_pt2(Path(source), random_weights)
        source = str(Path(source).resolve())
    elif source.startswith("torchvision:"):
        program, found = _load_torchvision(source.removeprefix("torchvision:"), random_weights, seed, preprocessing)
    elif ":" in source:
        program, found = _load_factory(source, random_weights, seed, preprocessing)
    else:
        raise ModelError(
            f"{source!r} is not a model: expected torchvision:NAME, a .pt2 file, or package.module:factory"
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


def _load_pt2(path: Path, random_weights: bool) -> tuple[ExportedProgram, dict[str, Any]]:
    if random_weights:
        raise ModelError("--random-weights is for models that are built by name; a .pt2 file brings its weights")
    if not path.is_file():
        raise ModelError(f"there is no model file {path}")
    try:
        with quiet(), _nothing_unpickled():
            program = torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path} is not a torch.export program: {_first_line(error)}") from None
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return program, {}
    try:
        document = json.loads(sidecar.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read the sidecar {sidecar}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the sidecar {sidecar} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"the sidecar {sidecar} is not a JSON object; see docs/formats.md")
    return program, document


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
            f"({_first_line(error)}); put the file into {Path(torch.hub.get_dir()) / 'checkpoints'}, "
            "or go on with --random-weights"
        ) from None
    return _export(model, {**declared, **(preprocessing or {})}, f"torchvision:{name}"), declared


def _load_factory(
    source: str, random_weights: bool, seed: int, preprocessing: Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any]]:
    module_name, _, attribute = source.partition(":")
    with _importable_from_here():
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # whatever the module does on import
            raise ModelError(f"cannot import the model {source!r}: {_first_line(error)}") from None
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
            raise ModelError(f"{source} failed: {type(error).__name__}: {_first_line(error)}") from error
    if isinstance(model, ExportedProgram):
        return model, {}
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{source} returned a {type(model).__name__}; expected a torch.nn.Module")
    declared = dict(getattr(model, "preprocessing", {}))
    return _export(model, {**declared, **(preprocessing or {})}, source), declared


def _export(model: torch.nn.Module, declared: Mapping[str, Any], name: str) -> ExportedProgram:
    if declared.get("input_size") is None:
        raise ModelError(f"the input size of {name} is not known; say it with --size, as in --size 3,224,224")
    example = torch.zeros(2, *check_preprocessing(declared)["input_size"])
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                model.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    except Exception as error:
        raise ModelError(f"{name} does not export: {_first_line(error)}; {_EXPORT_ADVICE}") from None


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
def _importable_from_here() -> Iterator[None]:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
