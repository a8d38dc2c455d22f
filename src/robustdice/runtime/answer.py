"""What a client gets: answers, and what they are answers of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Answer:
    """What came back for one frame.

    ``outputs`` are the network's, float32 [outputs] (minus infinity for class scores that were lost), and
    ``probabilities`` their softmax (or the sigmoid of each, where the model's outputs are several labels); both are
    None, and ``class_index`` too, when no answer came in time or nothing is left to answer with. ``coverage`` is the
    least, over the exchanges, of the share of neurons that were present; ``from_spares`` the largest of the share that
    came from a spare; ``down`` the devices that took no part. ``refused`` says why there is no answer, where that is
    known. ``expected_accuracy`` is what ``evaluate`` measured of the plan for the devices that were down, if the plan
    was certified when it was built and the frame was computed from first to last in that state.
    """

    number: int
    outputs: NDArray[np.float32] | None
    probabilities: NDArray[np.float32] | None
    class_index: int | None
    coverage: float
    from_spares: float
    down: tuple[int, ...]
    latency_seconds: float
    device: int | None
    sources: tuple[tuple[int, ...], ...] = ()
    refused: str | None = None
    expected_accuracy: float | None = None


@dataclass(frozen=True)
class Model:
    """What the devices serve: ``input_shape`` [C, H, W], class names (may be empty), how an image becomes an input, the
    ``activation`` that makes probabilities of the outputs (``softmax``, or ``sigmoid`` where each is a label of its
    own), the number of exchanges, and whether frames go to the devices ``in_turn``: without exchanges each is computed
    by one device, or, where spares are hot, by all of them."""

    input_shape: tuple[int, ...]
    outputs: int
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    activation: str
    exchanges: int
    in_turn: bool


def probabilities_of(outputs: NDArray[np.float32], activation: str) -> NDArray[np.float32] | None:
    """Class scores as probabilities, by ``softmax`` or by the ``sigmoid`` of each; None when every score was lost."""
    top = float(outputs.max())
    if not np.isfinite(top):
        return None
    scores = outputs.astype(np.float64)
    if activation == "sigmoid":
        small = np.exp(-np.abs(scores))  # which never overflows
        return np.asarray(np.where(scores < 0, small, 1.0) / (1 + small), np.float32)
    powers = np.exp(scores - top)
    return np.asarray(powers / powers.sum(), np.float32)
