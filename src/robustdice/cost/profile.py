"""What a device takes for a model's layers and for handing things over: measured once, kept in a file (NumPy only)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robustdice.entropy_code import CODED
from robustdice.errors import PlanError
from robustdice.files import read_json, write_atomically
from robustdice.plan import Layer, ModelReference
from robustdice.representation import REPRESENTATIONS
from robustdice.wire_format import WIRES

FORMAT_VERSION = 2
LIMIT_BYTES = 16 * 2**20


TYPICAL_UNPACKING = {
    "float16": 0.9e-9,
    "int8": 0.4e-9,
    "int4": 1.5e-9,
    "int3": 1.8e-9,
    "int2": 1.0e-9,
    "ec4": 15e-9,
    "ec3": 14e-9,
    "ec2": 7.8e-9,
    "ec1.5": 7.4e-9,
    "ec1": 7.8e-9,
    "ec0.7": 7.5e-9,
}
"""Seconds for a weight (docs/results/representations.md)."""
CODED_UNPACKING = {kind: TYPICAL_UNPACKING[kind] for kind in CODED}
"""Profiles from before there were any do not say it."""


@dataclass(frozen=True)
class LayerSeconds:
    """Of one layer with its tail, on one thread: all neurons, and a ``share`` of them."""

    whole: float
    part: float
    share: float

    def of(self, share: float) -> float:
        """Of a share of the neurons: what was measured, and straight lines between; in proportion below."""
        if share <= self.share or self.share >= 1:
            return self.part * share / self.share
        return self.part + (self.whole - self.part) * (share - self.share) / (1 - self.share)


@dataclass(frozen=True)
class Profile:
    """Seconds of one core of a device. An exchange takes ``exchange_seconds``, and ``peer_seconds`` for each peer in
    it, whatever its size, and ``value_seconds`` for every value that is sent or received, by what it travels as;
    ``hop_seconds`` pass meanwhile in which nothing is computed, and ``frame_seconds`` go into taking a frame and
    answering it.

    ``layers`` of the model with ``model_digest`` were measured, and ``rest_seconds`` is what it takes beside them. For
    other layers arithmetic takes what multiply-adds take, or the reading of weights, whichever is longer. Copies that
    are not in float32 take ``coarse_factor`` times as long, as their filters are no constants, and ``unpack_seconds``
    for each weight, by representation: typical ones unless said otherwise.
    """

    exchange_seconds: float
    peer_seconds: float
    value_seconds: Mapping[str, float]
    hop_seconds: float
    frame_seconds: float
    macs_per_second: float = 30e9
    weights_per_second: float = 2e9
    coarse_factor: float = 1.5
    unpack_seconds: Mapping[str, float] = field(default_factory=lambda: dict(TYPICAL_UNPACKING))
    layers: Mapping[str, LayerSeconds] = field(default_factory=dict)
    rest_seconds: float = 0.0
    model_digest: str | None = None

    def seconds(self, layer: Layer, share: float, representation: str = "float32") -> float:
        """What a share of a layer's neurons takes in a representation."""
        measured = self.layers.get(layer.name)
        macs, weights = layer.neurons * layer.neuron_macs, layer.neurons * layer.neuron_weights
        exact = (
            share * max(macs / self.macs_per_second, weights / self.weights_per_second)
            if measured is None
            else measured.of(share)
        )
        unpacking = self.unpacking(layer, share, representation)
        return self.coarse_factor * exact + unpacking if unpacking is not None else exact

    def unpacking(self, layer: Layer, share: float, representation: str) -> float | None:
        """What of that it takes to unpack the weights; None where filters are constants."""
        packed = representation == "int4" and layer.neuron_macs - layer.tail_macs == layer.filter_weights
        if representation == "float32" or packed:  # linear layers are multiplied as they are packed
            return None
        filters = share * layer.neurons * (layer.filter_weights + layer.tail_filter_weights)
        return filters * self.unpack_seconds[representation]

    def check_fits(self, model: ModelReference) -> None:
        """PlanError when the layers that were measured are of another model."""
        if self.model_digest not in (None, model.digest):
            raise PlanError(
                f"the profile is of a model with digest {str(self.model_digest)[:12]}, {model.source} has "
                f"{model.digest[:12]}; make one of this model with 'robustdice profile'"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a file (docs/formats.md); OutputError when that is not possible."""
        header = {"format": "robustdice-profile", "version": FORMAT_VERSION}
        write_atomically(Path(path), json.dumps({**header, **asdict(self)}, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile; PlanError when the file is missing, damaged or of another version."""
        remedy = "make one with 'robustdice profile'"
        try:
            with Path(path).open("rb") as file:
                document = read_json(file.read(LIMIT_BYTES))
        except OSError as error:
            raise PlanError(f"cannot read the profile {path}: {error.strerror}") from None
        except ValueError:
            raise PlanError(f"{path} is not a profile (it is not JSON); {remedy}") from None
        if not isinstance(document, dict) or document.pop("format", None) != "robustdice-profile":
            raise PlanError(f"{path} is not a profile (no robustdice-profile header); {remedy}")
        if (version := document.pop("version", None)) != FORMAT_VERSION:
            raise PlanError(f"{path} has profile version {version}, this version reads {FORMAT_VERSION}; {remedy}")
        try:
            return _parse(document)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(f"{path} is a damaged profile ({type(error).__name__}: {error}); {remedy}") from None


def _parse(document: Mapping[str, Any]) -> Profile:
    numbers = {
        name: _number(document[name])
        for name in (
            "exchange_seconds", "peer_seconds", "hop_seconds", "frame_seconds", "coarse_factor", "macs_per_second",
            "weights_per_second", "rest_seconds",
        )
    }  # fmt: skip
    digest = document["model_digest"]
    return Profile(
        **numbers,
        value_seconds={wire: _number(document["value_seconds"][wire]) for wire in WIRES},
        unpack_seconds={
            kind: _number({**CODED_UNPACKING, **document["unpack_seconds"]}[kind]) for kind in REPRESENTATIONS[1:]
        },
        layers={
            str(name): LayerSeconds(_number(each["whole"]), _number(each["part"]), _number(each["share"]))
            for name, each in document["layers"].items()
        },
        model_digest=None if digest is None else str(digest),
    )


def _number(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{value!r} where a number of at least 0 belongs")
    return number


TYPICAL = Profile(
    exchange_seconds=0.3e-3,
    peer_seconds=0.16e-3,
    value_seconds={"float32": 10e-9, "float16": 13e-9, "uint8": 13e-9},
    hop_seconds=0.1e-3,
    frame_seconds=0.8e-3,
)
"""Of a core of a common server processor, when nothing was measured (docs/results/cost-model.md)."""
