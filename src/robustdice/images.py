"""From an image file to a network's input, the same way in the workshop and beside a device (NumPy, Pillow)."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from robustdice.errors import DataError, first_line
from robustdice.preprocessing import WHITE, check_preprocessing, fit_image, fit_size, normalise_pixels

__all__ = ["FORMATS", "SUFFIXES", "check_image", "check_preprocessing", "normalise_pixels", "read_image"]

# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".avif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ico", ".pcx", ".qoi",
    ".sgi", ".rgb", ".rgba", ".bw", ".tga",
))
# fmt: on
"""Of files that are taken for images; what is in them is found out by their content."""
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000", "MPO", "ICO", "DIB", "PCX", "QOI")
WEAKLY_MARKED = ("SGI", "TGA")
"""Formats of few or no magic bytes, which are tried last. Pillow knows more, some of which start other programs."""

_WHITE_IS_ZERO, _SIGNED = 0, 2  # of TIFF, in the tags of these numbers:
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_END_OF_JPEG = b"\xff\xd9"


def read_image(source: Path | bytes, preprocessing: Mapping[str, Any], name: str = "") -> NDArray[np.float32]:
    """An image file (or its content) as float32 [channels, height, width]; DataError when it does not fit.

    Of several frames the first is read. The turn that EXIF notes is made unless ``exif_orientation`` is false, what
    is transparent shows the ``background`` (white), more than 8 bits become 8, and colour profiles are not applied.
    """
    name = name or str(source)
    channels = _channels(preprocessing)
    with _opening(source, name) as opened:
        opened.load()
        if preprocessing.get("exif_orientation", True):
            with contextlib.suppress(Exception):  # damaged metadata turns nothing
                ImageOps.exif_transpose(opened, in_place=True)
        image = as_shown(opened, channels, name, preprocessing.get("background", WHITE))
    pixels = np.asarray(fit_image(image, preprocessing, name), dtype=np.float32) / np.float32(255)
    planes = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    return normalise_pixels(planes[::-1] if preprocessing.get("channels") == "BGR" else planes, preprocessing)


def check_image(source: Path | bytes, preprocessing: Mapping[str, Any], name: str = "") -> None:
    """DataError when an image is damaged or does not fit, as far as that shows without decoding the common formats.

    Of a PNG file all checksums are compared, of a JPEG file the header is read and the mark of its end looked for;
    what fails that, and anything else, is decoded.
    """
    name = name or str(source)
    _channels(preprocessing)
    with _opening(source, name) as opened:
        _check_depth(opened, name)
        width, height = opened.size
        try:
            fit_size((width, height), preprocessing, name)
        except DataError:
            fit_size((height, width), preprocessing, name)  # it may lie on its side
        whole = _is_whole(opened, source)
    if not whole:
        with _opening(source, name) as opened:
            opened.load()


def _channels(preprocessing: Mapping[str, Any]) -> int:
    channels: int = preprocessing["input_size"][0]
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the model takes {channels}")
    return channels


@contextlib.contextmanager
def _opening(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """An image whose header is read; whatever Pillow finds wrong with it, then or later, is a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata and the like: what counts is whether pixels come out
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_formats()) as image:
                yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"there is no image {name}") from None
    except UnidentifiedImageError:
        raise DataError(f"cannot read the image {name}: it is {_what_else(source)}") from None
    except Image.DecompressionBombError:
        raise DataError(f"the image {name} is too large to be decoded safely") from None
    except Exception as error:  # Pillow's decoders have no common root for what damaged files do to them
        raise DataError(f"cannot read the image {name}: {first_line(error)}") from None


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in (*FORMATS, *WEAKLY_MARKED) if name in Image.OPEN)


def _what_else(source: Path | bytes) -> str:
    if isinstance(source, Path):
        with source.open("rb") as file:
            source = file.read(64)
    if not source:
        return "empty"
    if source.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; 'git lfs pull' fetches the file"
    if source[4:8] == b"ftyp":
        return "HEIC or a film, or AVIF that is damaged or not read by this build of Pillow; save it as JPEG or PNG"
    return "damaged, or of a format or kind of pixels that is not read; save it as JPEG or PNG"


def _is_whole(opened: Image.Image, source: Path | bytes) -> bool:
    """Whether a file is known to be whole without decoding it. An image that was asked cannot be decoded any more."""
    if opened.format == "PNG":
        try:
            opened.verify()
        except Exception:
            return False
        return True
    if opened.format != "JPEG":
        return False
    if isinstance(source, Path):
        with source.open("rb") as file:
            file.seek(max(0, source.stat().st_size - 64))
            source = file.read()
    return source[-64:].rstrip(b"\0\r\n").endswith(_END_OF_JPEG)


def _check_depth(opened: Image.Image, name: str) -> None:
    """DataError unless it is known which of a file's numbers is white."""
    if opened.mode == "F":
        raise DataError(
            f"the image {name} has floating-point pixels, and nothing in it says which number is white; "
            "save it with 8 or 16 bits a channel"
        )
    signed = _SIGNED in getattr(opened, "tag_v2", {}).get(_SAMPLE_FORMAT, ())
    if signed or (opened.mode == "I" and opened.format not in ("PNG", "PPM")):  # those have no more than 16 bits
        raise DataError(
            f"the image {name} has pixels of 32 bits, or below zero, and nothing in it says which number is white; "
            "save it with 8 or 16 bits a channel"
        )


def as_shown(opened: Image.Image, channels: int, name: str, background: Sequence[int] = WHITE) -> Image.Image:
    """A decoded image of any mode as RGB, or L for one channel, with 8 bits and nothing transparent."""
    _check_depth(opened, name)
    transparent = opened.info.get("transparency")
    image = opened
    if opened.mode.startswith("I"):
        image = _eight_bits(opened)
        if transparent is not None:  # one grey level, as in PNG
            image.putalpha(Image.fromarray(np.where(np.asarray(opened) == transparent, 0, 255).astype(np.uint8)))
    elif transparent is not None or opened.mode in ("PA", "RGBa"):
        image = opened.convert("RGBA")
    elif opened.mode == "La":
        image = opened.convert("LA")
    elif opened.mode == "LAB":  # which becomes grey by way of RGB only
        image = opened.convert("RGB")
    if image.mode in ("LA", "RGBA"):
        ground = Image.new("RGBA", image.size, (*background, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def _eight_bits(opened: Image.Image) -> Image.Image:
    """A grey image of up to 16 bits as L: 0 stays 0, the largest number that its file can hold becomes 255."""
    tags = getattr(opened, "tag_v2", {})
    white = 2 ** tags.get(_BITS, (16,))[0] - 1  # where other files have fewer bits, Pillow has scaled them up to 16
    levels = np.clip(np.asarray(opened).astype(np.float64) / white, 0, 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 1 - levels
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))
