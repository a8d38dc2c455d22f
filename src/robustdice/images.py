"""From an image file to a network's input, the same way in the workshop and beside a device (NumPy, Pillow).

*Preprocessing* is a dictionary with the keys of a sidecar (docs/formats.md): ``input_size`` [channels, height, width],
``resize`` (short side, or None), ``interpolation``, ``mean``, ``std``, ``classes``.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from robustdice.errors import DataError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_KEYS = {"input_size", "resize", "interpolation", "mean", "std", "classes"}


def check_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing as plain JSON values; DataError naming what is wrong with it."""
    if unknown := sorted(set(preprocessing) - _KEYS):
        raise DataError(f"unknown preprocessing key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    checked = {key: value for key, value in preprocessing.items() if value is not None}
    if (how := checked.get("interpolation")) is not None and how not in list(_FILTERS):
        raise DataError(f"unknown interpolation {how!r}; known: {', '.join(_FILTERS)}")
    try:
        for key, kind in (("input_size", int), ("mean", float), ("std", float)):
            if key in checked:
                checked[key] = [kind(number) for number in checked[key]]
        if "resize" in checked:
            checked["resize"] = int(checked["resize"])
        if "classes" in checked:
            if isinstance(checked["classes"], str):
                raise TypeError(f"classes is a list of names, not {checked['classes']!r}")
            checked["classes"] = [str(name) for name in checked["classes"]]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the preprocessing is damaged: {error}; see docs/formats.md") from None
    _check_values(checked)
    return checked


def _check_values(checked: Mapping[str, Any]) -> None:
    if "input_size" in checked and (len(checked["input_size"]) != 3 or min(checked["input_size"]) < 1):
        raise DataError(f"input_size is [channels, height, width], not {checked['input_size']}")
    channels = checked["input_size"][0] if "input_size" in checked else None
    for key in ("mean", "std"):
        if channels and key in checked and len(checked[key]) != channels:
            raise DataError(f"{key} has {len(checked[key])} entries for {channels} channels")
    if checked.get("resize", 1) < 1:
        raise DataError(f"resize is the length of an image's short side in pixels, not {checked['resize']}")
    if not all(0 < value < math.inf for value in checked.get("std", [])):
        raise DataError(f"std must be positive, not {checked['std']}")
    if not all(map(math.isfinite, checked.get("mean", []))):
        raise DataError(f"mean must be finite, not {checked['mean']}")
    names = checked.get("classes", [])
    if len(set(names)) != len(names):
        raise DataError(
            f"the class {max(names, key=names.count)!r} is named twice; give every output a name of its own"
        )


def read_image(source: Path | bytes, preprocessing: Mapping[str, Any], name: str = "") -> NDArray[np.float32]:
    """An image file (or its content) as float32 [channels, height, width]; DataError when it does not fit."""
    name = name or str(source)
    channels = preprocessing["input_size"][0]
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the model takes {channels}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata and the like: what counts is whether pixels come out
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
                image = opened.convert("RGB" if channels == 3 else "L")
    except FileNotFoundError:
        raise DataError(f"there is no image {name}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {name}: {error}") from None
    except Image.DecompressionBombError:
        raise DataError(f"the image {name} is too large to be decoded safely") from None
    pixels = np.asarray(_fit(image, preprocessing, name), dtype=np.float32) / np.float32(255)
    return normalise_pixels(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1), preprocessing)


def normalise_pixels(pixels: NDArray[np.float32], preprocessing: Mapping[str, Any]) -> NDArray[np.float32]:
    """Pixels in [0, 1] (float32 [..., channels, height, width]) with the mean taken off, over the deviation."""
    channels = preprocessing["input_size"][0]
    mean = np.asarray(preprocessing.get("mean", [0.0] * channels), dtype=np.float32)[:, None, None]
    std = np.asarray(preprocessing.get("std", [1.0] * channels), dtype=np.float32)[:, None, None]
    return np.ascontiguousarray((pixels - mean) / std, dtype=np.float32)


def _fit(image: Image.Image, preprocessing: Mapping[str, Any], name: str) -> Image.Image:
    """The short side resized, the centre cropped."""
    _, height, width = preprocessing["input_size"]
    short = preprocessing.get("resize")
    if short is None:
        if (image.width, image.height) != (width, height):
            raise DataError(
                f"the image {name} is {image.width}x{image.height}, the model takes {width}x{height}; "
                "resize the images, or give the model's sidecar a resize (short side)"
            )
        return image
    # The long side is cut off to whole pixels, as torchvision does: models were trained on that.
    resized = (int(short * image.width / min(image.size)), int(short * image.height / min(image.size)))
    if resized != image.size:
        image = image.resize(resized, _FILTERS[preprocessing.get("interpolation", "bilinear")])
    if image.width < width or image.height < height:
        raise DataError(
            f"the image {name} has a short side of {short} after resizing, too small for {width}x{height}; raise resize"
        )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def class_of(folder: str, classes: Sequence[str], name: str) -> int:
    """The class index of a folder name; DataError when it is no class of the model."""
    try:
        return classes.index(folder)
    except ValueError:
        raise DataError(
            f"the folder {folder!r} of {name} is no class of the model ({len(classes)} classes, "
            f"such as {', '.join(map(repr, classes[:3]))}); rename it, or name the classes with --classes FILE"
        ) from None
