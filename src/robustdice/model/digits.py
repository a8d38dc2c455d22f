"""The data source ``digits``: scikit-learn's handwritten digits, real images that come with a package.

1,797 images of 8x8 pixels, ten classes. They are enlarged to 32x32, so that a network can pool three times.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import DataError

Split = Literal["train", "test"]

SPLIT_SEED = 0
TRAIN_IMAGES_PER_CLASS = 100

PREPROCESSING: Mapping[str, Any] = {
    "input_size": [1, 32, 32],
    "resize": None,
    "interpolation": "bilinear",
    "mean": [0.305],
    "std": [0.323],
    "classes": [str(digit) for digit in range(10)],
}
"""How an image becomes an input, in the form of a sidecar (docs/formats.md). Mean and standard deviation are those
of the training images."""


def digits(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images of one split, uint8[images, 1, 32, 32], and their classes, int64[images].

    "train" has 100 images of each class, "test" the other 797. Both are the same on every machine, in random order.
    """
    if split not in ("train", "test"):
        raise DataError(f"digits has no split {split!r}, only 'train' and 'test'")
    images, classes = _all_digits()
    chosen = _split()[split]
    return images[chosen], classes[chosen]


@cache
def _all_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 -- only this data source needs it
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install 'robustdice[workshop]'") from None
    found = load_digits()
    return _enlarge(found.images.astype(np.int64))[:, None], found.target.astype(np.int64)


@cache
def _split() -> dict[str, NDArray[np.int64]]:
    _, classes = _all_digits()
    # RandomState and not default_rng: NumPy has frozen its streams (NEP 19), so the split never moves.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(classes))
    # How many images of the same class come before each image, in that order.
    one_hot = classes[order, None] == np.arange(10)
    rank = (np.cumsum(one_hot, axis=0) - 1)[one_hot]
    train = rank < TRAIN_IMAGES_PER_CLASS
    return {"train": order[train], "test": order[~train]}


def _enlarge(images: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Four times as large, bilinear (pixel centres aligned); grey levels 0..16 become 0..255.

    In integers, eighths along each axis, so that every machine gets the same bytes.
    """
    size = images.shape[-1]
    position = 2 * np.arange(4 * size) - 3  # centre of each new pixel in the old grid, in eighths
    low, eighths = position // 8, position % 8
    weights = np.zeros((4 * size, size), dtype=np.int64)
    rows = np.arange(4 * size)
    np.add.at(weights, (rows, np.clip(low, 0, size - 1)), 8 - eighths)
    np.add.at(weights, (rows, np.clip(low + 1, 0, size - 1)), eighths)
    enlarged = weights @ images @ weights.T  # 0 .. 16 * 64
    return ((enlarged * 255 + 512) // 1024).astype(np.uint8)
