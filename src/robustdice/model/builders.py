"""Models that are built by name: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from robustdice.errors import ModelError, first_line
from robustdice.images import check_preprocessing
from robustdice.importable import importable_from_here
from robustdice.model.tracing import export_module, prepare_module, quiet


def load_torchvision(
    name: str, random_weights: bool, seed: int, preprocessing: Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any]]:
    """The pretrained model of that name, or one with random weights, and what its library says about images."""
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
    return export_module(
        model, _input_size({**declared, **(preprocessing or {})}, name), f"torchvision:{name}"
    ), declared


def load_timm(
    name: str, random_weights: bool, seed: int, preprocessing: Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any]]:
    """The pretrained model of that name, or one with random weights, and what its library says about images."""
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
    return export_module(model, size, f"timm:{name}"), as_timm_prepares(found, size)


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


def load_factory(
    source: str, random_weights: bool, seed: int, preprocessing: Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any]]:
    """The model that a function returns, or the program that it has exported, and its ``preprocessing``.

    What the function prints goes to standard error.
    """
    module_name, _, attribute = source.partition(":")
    with importable_from_here(), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions of torch, most of them
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
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {first_line(error)}{_about_prefixes(str(error))}"
            raise ModelError(f"{source} failed: {what}") from error
    if isinstance(model, ExportedProgram):
        return model, {}
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{source} returned TorchScript, which torch.export does not take: return the module itself")
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{source} returned a {type(model).__name__}; expected a torch.nn.Module")
    said = getattr(model, "preprocessing", None)
    model = prepare_module(model, source)
    said = said or getattr(model, "preprocessing", {})
    if not isinstance(said, Mapping):
        raise ModelError(
            f"the preprocessing of {source} is a {type(said).__name__}; expected a dictionary with a sidecar's keys "
            "(docs/formats.md)"
        )
    declared = check_preprocessing(said)
    return export_module(model, _input_size({**declared, **(preprocessing or {})}, source), source), declared


def _about_prefixes(message: str) -> str:
    """What to do about a state whose keys are those of the model behind something that wrapped it; else nothing."""
    missing, unexpected = (
        re.findall(r'"([^"]+)"', "".join(re.findall(rf"{kind} key\(s\) in state_dict: (.*)", message)))
        for kind in ("Missing", "Unexpected")
    )
    for key in unexpected[:100]:
        for wanted in missing[:100]:
            if key.endswith(f".{wanted}"):
                prefix = key[: -len(wanted)]
                return (
                    f". The keys begin with {prefix!r}; load without it: "
                    f"{{key.removeprefix({prefix!r}): value for key, value in state.items()}}"
                )
    return ""


def _input_size(declared: Mapping[str, Any], name: str) -> tuple[int, ...]:
    if declared.get("input_size") is None:
        raise ModelError(f"the input size of {name} is not known; say it with --size, as in --size 3,224,224")
    return tuple(check_preprocessing(declared)["input_size"])


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
