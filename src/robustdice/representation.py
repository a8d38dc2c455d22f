"""Coarse copies of a layer's neurons: arrays <-> packed bytes, and what they are worth as numbers (NumPy only).

A weight of a coarse copy is ``(code + offset) * scale``: codes are small whole numbers, one scale holds for a whole
neuron or for each ``group`` weights of its filter. What evaluator and devices compute with are exactly these values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robustdice import entropy_code
from robustdice.entropy_code import CODED, excess

if TYPE_CHECKING:
    from robustdice.plan.shards import Layer

REPRESENTATIONS = (
    *("float32", "float16", "int8"),
    *("ec4", "int4", "ec3", "int3", "ec2", "int2", "ec1.5", "ec1", "ec0.7"),
)
"""What a copy can be kept in, finest first; ``ec``: entropy-coded. A copy's representation is often told by its
position here."""

ACTIVATIONS = ("float32", "int8")
"""What layers can read."""

BITS: dict[str, float] = {"float32": 32, "float16": 16, "int8": 8, "int4": 4, "int3": 3, "int2": 2}
BITS |= {kind: code.bits for kind, code in CODED.items()}
"""Bits of one weight of a filter, scales not counted."""

LOST = -1
"""In the place of a representation's position: nobody has the neuron."""

ROUNDING_SAMPLES = 256
"""Images that coarse weights are fitted to unless somebody says otherwise."""
TRIAL_SAMPLES = 256
"""Images beyond these on which plans are compared."""
CALIBRATION_SAMPLES = 256
"""Images that corrections are fitted to, likewise."""

SCALE_BYTES = 2
SHIFT_BYTES = 2
SUM_SHIFT_BYTES = 4
"""Where sums of copies are shifted, which may be in float32."""
LARGEST_SHIFT = float(np.finfo(np.float16).max)
TAIL_REPRESENTATION = "int8"
"""Depthwise filters in a layer's tail are a few weights each, on which much depends."""


def code_range(representation: str) -> tuple[int, int]:
    """The least and the largest code, symmetric about ``-offset``."""
    if representation in CODED:
        return -CODED[representation].largest, CODED[representation].largest
    bits = int(BITS[representation])
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if bits == 2 else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def code_offset(representation: str) -> float:
    """What is added to a code before scaling. Two bits have no code to spare for zero: their levels lie at halves."""
    return 0.5 if representation == "int2" else 0.0


def _frozen(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    copy = np.ascontiguousarray(array, dtype=dtype)
    if copy is array or copy.base is not None:
        copy = copy.copy()
    copy.flags.writeable = False
    return copy


@dataclass(frozen=True, eq=False)
class CoarseFilter:
    """The filters of some neurons, K weights each, in one representation.

    ``codes`` [neurons, K] are int8, or float16 where the representation is ``float16`` and nothing is scaled;
    ``scales`` float16 [neurons, groups], where each scale holds for ``group`` weights that follow each other (the last
    group may be shorter). Those that are entropy-coded fill what their code has room for. ValueError when the arrays do
    not belong together.
    """

    representation: str
    codes: NDArray[Any]
    scales: NDArray[np.float16]
    group: int

    def __post_init__(self) -> None:
        exact = self.representation == "float16"
        if self.representation not in REPRESENTATIONS[1:] or self.group < 1 or np.ndim(self.codes) != 2:
            raise ValueError(f"no coarse filter of {self.representation} in groups of {self.group}")
        neurons, weights = len(self.codes), self.weights
        groups = 0 if exact else -(-weights // self.group)
        if self.scales.shape != (neurons, groups):
            raise ValueError(f"scales of shape {self.scales.shape}, expected {(neurons, groups)}")
        if not (np.isfinite(self.scales).all() and np.isfinite(self.codes).all()):
            raise ValueError("scales and weights must be finite")
        if not exact and self.codes.size:
            low, high = code_range(self.representation)
            if self.codes.min() < low or self.codes.max() > high:
                raise ValueError(f"codes of {self.representation} lie between {low} and {high}")
        object.__setattr__(self, "codes", _frozen(self.codes, np.float16 if exact else np.int8))
        if self.representation in CODED and weights and self.group < weights:
            raise ValueError(f"filters in {self.representation} have one scale")
        if self.representation in CODED and excess(self.codes, self.representation).any():
            raise ValueError(f"filters in {self.representation} that do not fill what their code has room for")
        object.__setattr__(self, "scales", _frozen(self.scales, np.float16))

    @property
    def weights(self) -> int:
        """Of one neuron's filter (K)."""
        return int(self.codes.shape[1])

    def values(self) -> NDArray[np.float32]:
        """The weights that the copies compute with, float32 [neurons, K]."""
        if self.representation == "float16":
            return np.asarray(self.codes, np.float32)
        levels = self.codes.astype(np.float32) + np.float32(code_offset(self.representation))
        wide = self.scales.astype(np.float32)
        if wide.shape[1] > 1:
            wide = np.repeat(wide, self.group, axis=1)[:, : levels.shape[1]]
        levels *= wide
        return levels

    @property
    def neuron_bytes(self) -> int:
        """Bytes of one neuron: its packed codes, padded to whole bytes, and its scales."""
        return filter_bytes(self.weights, self.representation, self.group)


def filter_bytes(weights: int, representation: str, group: int | None = None) -> int:
    """Bytes of one filter of ``weights`` weights with a scale for every ``group`` of them (one for all)."""
    groups = -(-weights // (group or max(weights, 1))) if is_scaled(representation) else 0
    return packed_bytes(weights, representation) + groups * SCALE_BYTES


def packed_bytes(weights: int, representation: str) -> int:
    """Bytes of so many weights alone, padded to whole ones."""
    if representation in CODED:
        return CODED[representation].bytes(weights)
    return int(-(-weights * BITS[representation] // 8))


def is_scaled(representation: str) -> bool:
    """Whether weights are codes that scales go with."""
    return representation not in ("float32", "float16")


def pack(codes: NDArray[Any], representation: str) -> NDArray[np.uint8]:
    """Codes [neurons, K] as uint8 [neurons, bytes]: bits of one after the other, least significant first, or as
    :func:`robustdice.entropy_code.pack` says."""
    if representation in CODED:
        return entropy_code.pack(codes, representation)
    bits = int(BITS[representation])
    low, _ = code_range(representation)
    unsigned = (codes.astype(np.int16) - low).astype(np.uint8)
    spread = np.unpackbits(unsigned[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(spread.reshape(len(codes), -1), axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], representation: str, weights: int) -> NDArray[Any]:
    """The inverse of :func:`pack`, for filters of ``weights`` weights. ValueError where these are none."""
    if representation in CODED:
        return entropy_code.unpack(packed, representation, weights)
    bits = int(BITS[representation])
    low, _ = code_range(representation)
    spread = np.unpackbits(packed, axis=1, count=weights * bits, bitorder="little").reshape(len(packed), weights, bits)
    unsigned = np.packbits(spread, axis=2, bitorder="little")[:, :, 0]
    return (unsigned.astype(np.int16) + low).astype(np.int8)


@dataclass(frozen=True, eq=False)
class CoarseLayer:
    """All neurons of one layer in one representation.

    What scales and shifts each neuron by parameters directly behind the layer (its affine chain: bias, batch norm,
    ...) is part of ``filter``'s scales and of ``shift``, float16 [neurons]. ``tail`` has the depthwise filters of the
    layer's tail by their parameters' names. Every other parameter of the tail stays as it is.
    """

    filter: CoarseFilter
    shift: NDArray[np.float16]
    tail: Mapping[str, CoarseFilter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        neurons = len(self.filter.codes)
        with np.errstate(over="ignore"):
            object.__setattr__(self, "shift", _frozen(self.shift, np.float16))
        if self.shift.shape != (neurons,) or not np.isfinite(self.shift).all():
            raise ValueError(f"shifts of shape {self.shift.shape}, expected ({neurons},), all finite in float16")
        if any(len(each.codes) != neurons for each in self.tail.values()):
            raise ValueError("the tail's filters are of another number of neurons")

    @property
    def representation(self) -> str:
        """Of the layer's own filters."""
        return self.filter.representation


def neuron_bytes(layer: Layer, representation: str, group: int | None = None) -> int:
    """Bytes of one neuron of a layer with its tail in a representation; ``group`` weights share a scale (all)."""
    if representation == "float32":
        return 4 * layer.neuron_weights
    rest = layer.neuron_weights - layer.filter_weights - layer.affine_weights - layer.tail_filter_weights
    tail = filter_bytes(layer.tail_filter_weights, TAIL_REPRESENTATION) + SCALE_BYTES * (layer.tail_filters - 1)
    return (
        filter_bytes(layer.filter_weights, representation, group)
        + (SHIFT_BYTES if layer.affine_weights else 0)
        + (tail if layer.tail_filters else 0)
        + 4 * rest
    )


@dataclass(frozen=True, eq=False)
class Correction:
    """What makes up for what a layer's neurons compute under one failure set: ``scale * y + shift`` of each neuron's
    value behind the affine chain, float32 [neurons] each.

    Both are kept in 8 bits for a neuron: ``codes``, int8 [2, neurons], times ``steps``, float16 [2], which hold for all
    neurons, are the logarithms of the scales and the shifts. ValueError for what is no scale and shift of each neuron.
    """

    codes: NDArray[np.int8]
    steps: NDArray[np.float16]

    def __post_init__(self) -> None:
        if np.ndim(self.codes) != 2 or len(self.codes) != 2 or self.steps.shape != (2,):
            raise ValueError(f"codes and steps of scales and shifts, not {self.codes.shape} and {self.steps.shape}")
        object.__setattr__(self, "codes", _frozen(self.codes, np.int8))
        object.__setattr__(self, "steps", _frozen(self.steps, np.float16))
        with np.errstate(over="ignore", invalid="ignore"):
            values = corrections_of(self.codes, self.steps)
        if not (np.isfinite(values).all() and (values[0] > 0).all()):
            raise ValueError("corrections must be finite, and scales positive")

    @classmethod
    def of(cls, scale: NDArray[np.floating[Any]], shift: NDArray[np.floating[Any]]) -> Correction:
        """The nearest to these scales and shifts, [neurons] each."""
        if scale.shape != shift.shape or np.ndim(scale) != 1:
            raise ValueError(f"a scale and a shift for each neuron, not {scale.shape} and {shift.shape}")
        if not (np.isfinite(scale).all() and np.isfinite(shift).all() and (scale > 0).all()):
            raise ValueError("corrections must be finite, and scales positive")
        wanted = np.stack([np.log(scale.astype(np.float64)), shift.astype(np.float64)])
        steps = np.clip(np.abs(wanted).max(1, initial=0) / 127, 2.0**-24, 500.0).astype(np.float16)
        codes = np.clip(np.rint(wanted / steps[:, None].astype(np.float64)), -127, 127)
        return cls(codes.astype(np.int8), steps)

    @cached_property
    def scale(self) -> NDArray[np.float32]:
        """Of each neuron."""
        return _frozen(corrections_of(self.codes, self.steps)[0], np.float32)

    @cached_property
    def shift(self) -> NDArray[np.float32]:
        """Of each neuron."""
        return _frozen(corrections_of(self.codes, self.steps)[1], np.float32)


def corrections_of(
    codes: NDArray[np.int8], steps: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The scales and shifts, float32 [neurons], that a :class:`Correction` with these codes and steps applies."""
    logarithms, shifts = codes.astype(np.float64) * steps.astype(np.float64)[:, None]
    return np.exp(logarithms).astype(np.float32), shifts.astype(np.float32)


CORRECTION_BYTES = 2
"""Of one neuron under one failure set."""


@dataclass(frozen=True)
class Steps:
    """How what a layer reads is rounded to 8 bits: to the nearest ``(code - zero) * scale`` (halves to even), codes
    from 0 to 255. ``scale`` is a float32 number; zero itself is kept exactly. ValueError for what are no steps."""

    scale: float
    zero: int

    def __post_init__(self) -> None:
        if not (np.isfinite(np.float32(self.scale)) and np.float32(self.scale) > 0 and 0 <= self.zero <= 255):
            raise ValueError(f"no steps of {self.scale} about {self.zero}")
        object.__setattr__(self, "scale", float(np.float32(self.scale)))
