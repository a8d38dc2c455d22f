"""What a sidecar says about images: checked here, and applied to pixels (NumPy, Pillow).

*Preprocessing* is a dictionary with the keys of a sidecar, as docs/formats.md describes them.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from robustdice.errors import DataError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CHOICES = {
    "interpolation": tuple(_FILTERS),
    "fit": ("squash", "cover", "contain"),
    "channels": ("RGB", "BGR"),
    "activation": ("softmax", "sigmoid"),
}
_KEYS = {
    *("input_size", "resize", "mean", "std", "classes", "exif_orientation", "background", "border"),
    *_CHOICES,
}
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


def check_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing as plain JSON values; DataError naming what is wrong with it."""
    if unknown := sorted(set(preprocessing) - _KEYS):
        raise DataError(f"unknown preprocessing key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    checked = {key: value for key, value in preprocessing.items() if value is not None}
    for key, known in _CHOICES.items():
        if key in checked and checked[key] not in list(known):
            raise DataError(f"unknown {key} {checked[key]!r}; known: {', '.join(known)}")
    try:
        for key, kind in (("input_size", _whole), ("mean", float), ("std", float)):
            if key in checked:
                checked[key] = [kind(number) for number in checked[key]]
        if "resize" in checked:
            several = isinstance(checked["resize"], (list, tuple))
            checked["resize"] = [_whole(n) for n in checked["resize"]] if several else _whole(checked["resize"])
        for key in {"background", "border"} & checked.keys():
            checked[key] = _colour(checked[key])
        if "classes" in checked:
            if isinstance(checked["classes"], str):
                raise TypeError(f"classes is a list of names, not {checked['classes']!r}")
            checked["classes"] = [unicodedata.normalize("NFC", str(name)) for name in checked["classes"]]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the preprocessing is damaged: {error}; see docs/formats.md") from None
    _check_values(checked)
    _check_sizes(checked)
    return checked


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"{value!r} is no whole number of pixels")
    return int(value)


def _colour(value: Any) -> list[int]:
    """A colour's name as CSS has them, or its red, green and blue from 0 to 255."""
    parts = ImageColor.getrgb(value) if isinstance(value, str) else [_whole(part) for part in value]
    if len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise ValueError(f"{value!r} is no colour such as 'white', '#7f7f7f' or [127, 127, 127]")
    return list(parts)


def _check_values(checked: Mapping[str, Any]) -> None:
    if "input_size" in checked and (len(checked["input_size"]) != 3 or min(checked["input_size"]) < 1):
        raise DataError(f"input_size is [channels, height, width], not {checked['input_size']}")
    channels = checked["input_size"][0] if "input_size" in checked else None
    for key in ("mean", "std"):
        if channels and key in checked and len(checked[key]) != channels:
            raise DataError(f"{key} has {len(checked[key])} entries for {channels} channels")
    if channels not in (None, 3) and checked.get("channels") == "BGR":
        raise DataError(f"channels can be BGR where there are three of them, the model takes {channels}")
    if not all(0 < value < math.inf for value in checked.get("std", [])):
        raise DataError(f"std must be positive, not {checked['std']}")
    if not all(map(math.isfinite, checked.get("mean", []))):
        raise DataError(f"mean must be finite, not {checked['mean']}")
    if not isinstance(checked.get("exif_orientation", True), bool):
        raise DataError(f"exif_orientation is true or false, not {checked['exif_orientation']!r}")


def _check_sizes(checked: Mapping[str, Any]) -> None:
    resize = checked.get("resize", 1)
    if isinstance(resize, int):
        if resize < 1:
            raise DataError(f"resize is the length of an image's short side in pixels, not {resize}")
        if "fit" in checked:
            raise DataError(f"fit {checked['fit']!r} goes with a resize of [height, width]")
    elif len(resize) != 2 or min(resize) < 1:
        raise DataError(f"resize is the short side, or [height, width], in pixels, not {resize}")
    elif checked.get("fit") != "contain" and "input_size" in checked:
        size = checked["input_size"][1:]
        if resize[0] < size[0] or resize[1] < size[1]:
            raise DataError(f"resize {resize} is smaller than the {size} that the model takes; raise resize")
    if "border" in checked and checked.get("fit") != "contain":
        raise DataError("a border is what 'fit': 'contain' leaves around an image; say that too, or leave out border")


def normalise_pixels(pixels: NDArray[np.float32], preprocessing: Mapping[str, Any]) -> NDArray[np.float32]:
    """Pixels in [0, 1] (float32 [..., channels, height, width]) with the mean taken off, over the deviation."""
    channels = preprocessing["input_size"][0]
    mean = np.asarray(preprocessing.get("mean", [0.0] * channels), dtype=np.float32)[:, None, None]
    std = np.asarray(preprocessing.get("std", [1.0] * channels), dtype=np.float32)[:, None, None]
    return np.ascontiguousarray((pixels - mean) / std, dtype=np.float32)


def fit_size(size: tuple[int, int], preprocessing: Mapping[str, Any], name: str) -> tuple[int, int]:
    """The (width, height) that an image of ``size`` is resized to; DataError unless it holds the model's input."""
    _, height, width = preprocessing["input_size"]
    resize = preprocessing.get("resize")
    if resize is None:
        if size != (width, height):
            raise DataError(
                f"the image {name} is {size[0]}x{size[1]}, the model takes {width}x{height}; resize the images, "
                "or give the model's sidecar a resize (the short side, or [height, width])"
            )
        return size
    if isinstance(resize, int):
        # The long side is cut off to whole pixels, as torchvision does: models were trained on that.
        resized = (int(resize * size[0] / min(size)), int(resize * size[1] / min(size)))
    else:
        fit = preprocessing.get("fit", "squash")
        ratios = size[1] / resize[0], size[0] / resize[1]
        ratio = max(ratios) if fit == "contain" else min(ratios)
        # Rounded, as timm does.
        kept = max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
        resized = (resize[1], resize[0]) if fit == "squash" else kept
        if fit == "contain":
            return resized
    if resized[0] < width or resized[1] < height:
        raise DataError(
            f"the image {name} has a short side of {min(resized)} after resizing, too small for {width}x{height}; "
            "raise resize, or make it [height, width]"
        )
    if resized[0] * resized[1] > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise DataError(f"the image {name} is {size[0]}x{size[1]}, too long and narrow to be resized safely")
    return resized


def fit_image(image: Image.Image, preprocessing: Mapping[str, Any], name: str) -> Image.Image:
    """The image (L or RGB) resized, and its centre cropped; what 'contain' leaves free has the border's colour."""
    _, height, width = preprocessing["input_size"]
    size = fit_size(image.size, preprocessing, name)
    if size != image.size:
        image = image.resize(size, _FILTERS[preprocessing.get("interpolation", "bilinear")])
    left, top = _margin(image.width, width), _margin(image.height, height)
    if size[0] >= width and size[1] >= height:
        return image.crop((left, top, left + width, top + height))
    border = Image.new("RGB", (width, height), tuple(preprocessing.get("border", BLACK))).convert(image.mode)
    border.paste(image, (-left, -top))
    return border


def _margin(has: int, wanted: int) -> int:
    """What is cut off before the centre, as torchvision rounds it; negative what is left free there."""
    return round((has - wanted) / 2) if has >= wanted else -((wanted - has) // 2)
