"""Model sources: ``torchvision:NAME``, ``timm:NAME``, ``.pt2`` and ``.onnx`` files, ``package.module:factory``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustdice.errors import ModelError
from robustdice.images import check_preprocessing
from robustdice.model.builders import load_factory, load_timm, load_torchvision
from robustdice.model.classes import some
from robustdice.model.files import load_file
from robustdice.model.foreign import FILE_SUFFIXES, about_folder
from robustdice.model.network import Network, build_network
from robustdice.plan import ModelReference

_LIBRARIES = {"torchvision": load_torchvision, "timm": load_timm}


def load_model(
    source: str | os.PathLike[str],
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
    source = os.fspath(source)
    path = Path(source)
    library, _, name = source.partition(":")
    if "://" in source:
        raise ModelError(f"{source} is an address; fetch the file, and name it as it is on this machine")
    if path.is_file() or (path.suffix.lower() in FILE_SUFFIXES and not path.is_dir()):
        if random_weights:
            raise ModelError(
                f"--random-weights is for models that are built by name; a {path.suffix} file brings its weights"
            )
        if not path.is_file():
            raise ModelError(f"there is no model file {path}")
        program, found = load_file(path, preprocessing)
        source = str(path.resolve())
    elif name and library in _LIBRARIES:
        program, found = _LIBRARIES[library](name, random_weights, seed, preprocessing)
    elif name:
        program, found = load_factory(source, random_weights, seed, preprocessing)
    else:
        raise ModelError(
            f"{source!r} is {(source and about_folder(path)) or 'not a model'}: expected torchvision:NAME, timm:NAME, "
            "a .pt2 or .onnx file, or package.module:factory"
        )
    merged = check_preprocessing({**found, **(preprocessing or {})})
    network = build_network(program, source, merged, seed if random_weights else None)
    _check_preprocessing_fits(network)
    return network


def reload_model(
    reference: ModelReference, source: str | os.PathLike[str] | None = None, near: Path | None = None
) -> Network:
    """The model that a plan names; ModelError when it is gone or no longer the same.

    ``source`` says where it is now, when it has moved; a file that is gone from its place is also looked for in the
    folder ``near``, the plan's own.
    """
    place = os.fspath(source or reference.source)
    if source is None and Path(place).suffix.lower() in FILE_SUFFIXES and not Path(place).is_file():
        beside = near / Path(place).name if near is not None else None
        if beside is None or not beside.is_file():
            copied = "" if beside is None else f", or copy it to {beside}"
            raise ModelError(f"the plan's model is no longer at {place}; say where it is now with --model PATH{copied}")
        place = str(beside)
    seed = reference.random_weights_seed
    network = load_model(
        place,
        random_weights=seed is not None,
        seed=seed or 0,
        preprocessing=reference.preprocessing,
    )
    if network.reference.digest != reference.digest:
        found = f"(digest {network.reference.digest[:12]}, the plan expects {reference.digest[:12]})"
        if source is not None:
            raise ModelError(f"{source} is not the model that the plan was made of {found}; name that one with --model")
        raise ModelError(
            f"{place} has changed since the plan was made {found}; make a new plan with 'robustdice plan', "
            "or name the old model with --model PATH"
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
            f"the model has {network.outputs} outputs, but {len(classes)} classes are named ({some(classes)}); "
            "correct --classes or the sidecar"
        )
