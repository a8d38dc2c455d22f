"""The models of a bundle, and what they take from its weights.

An ONNX file holds what is computed; weights that are not kept in float32 lie packed in the bundle's one file of
weights, with what layers are scaled and shifted by. Positions in that file are offsets in bytes; numbers are
little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from robustdice.representation import (
    CORRECTION_BYTES,
    REPRESENTATIONS,
    SCALE_BYTES,
    SHIFT_BYTES,
    SUM_SHIFT_BYTES,
    filter_bytes,
    packed_bytes,
)

STRIPS = "strips-"
"""So begin the names of files of weights that strips share."""


@dataclass(frozen=True)
class Filter:
    """A filter of each neuron, an input of a model: float32 [neurons, *shape], unpacked just before it runs.

    The weights hold, from ``offset`` on, the neurons' packed codes one after the other, then scales, float16 [neurons,
    groups]: one for every ``group`` codes (``float16``, or a group of 0: no scales).
    """

    input: str
    representation: str
    shape: tuple[int, ...]
    group: int
    offset: int

    @property
    def weights(self) -> int:
        """Weights of one neuron's filter."""
        return math.prod(self.shape)

    @property
    def neuron_bytes(self) -> int:
        """Bytes of one neuron's filter with its scales."""
        if not self.group:
            return packed_bytes(self.weights, self.representation)
        return filter_bytes(self.weights, self.representation, self.group)


@dataclass(frozen=True)
class Coarse:
    """Neurons of one layer whose filters are kept packed: the layer's own ones first, then those of its tail.

    Where the model itself has the codes of its own ones, ``scales`` is the offset in the weights of what these are
    scaled by, float16 [neurons]. Every neuron's scale is multiplied by ``factor``: what one step of the layer's input
    is worth, where whole numbers are multiplied. ``rounded`` says whether the layer reads its input rounded to 8 bits.

    ``shift`` is the offset in the weights of what each neuron is shifted by, float16 [neurons] (None: nothing); float32
    where sums are given, of copies that may be float32 themselves. The neurons are computed ``at_once`` at a time, so
    that few of their filters are unpacked together; ``axis`` is where they lie in the output.

    Of a ``pair``, the ``first`` layer has the second one's filters for each of its neurons last, [neurons of the
    second, features of the first, ...], without scales, and the output is what its neurons add to the second one's: so
    many of them at a time are added up. Of the ``second``, sums are given, so that it has no filters of its own.
    """

    filters: tuple[Filter, ...]
    scales: int | None
    factor: float
    rounded: bool
    shift: int | None
    at_once: int
    axis: int
    pair: str = ""

    @property
    def shift_bytes(self) -> int:
        """Of each neuron's shift."""
        return SUM_SHIFT_BYTES if self.pair == "second" else SHIFT_BYTES

    @property
    def own(self) -> Filter | None:
        """The layer's own filters, unless the model has them."""
        return self.filters[0] if self.scales is None and self.pair != "second" else None


@dataclass(frozen=True)
class Corrected:
    """A :class:`robustdice.representation.Correction`: the ``offset`` in the weights of its codes, all scales first,
    and its two ``steps``."""

    offset: int
    steps: tuple[float, float]


@dataclass(frozen=True)
class Affine:
    """What a model takes from the weights for one layer: what it scales and shifts neurons by, directly behind the
    layer's affine chain, and the filters of ``coarse`` copies.

    ``scale`` and ``shift`` are inputs of the model, float32 [neurons]: 1 and 0 as long as nothing else is said. For
    each of ``Manifest.calibrated``, ``corrections`` has the codes of a scale and a shift of every neuron and their
    steps; None where the layer is not corrected.
    """

    scale: str
    shift: str
    neurons: int
    corrections: tuple[Corrected | None, ...]
    coarse: Coarse | None = None


@dataclass(frozen=True)
class Work:
    """That a model computes a ``share`` of the neurons (or rows) of a layer, by its position, in a representation;
    ``float32`` too where whole numbers are multiplied, which takes about as long."""

    layer: int
    share: float
    representation: str = "float32"


@dataclass(frozen=True)
class Part:
    """An ONNX model that a device runs: ``inputs`` and ``outputs`` are names of values and of its tensors alike.

    ``affine`` are the layers whose neurons it scales and shifts, or whose filters are not in the file; where these are
    computed a few neurons at a time, there is one such layer and one output. ``trial`` has, for every output, what it
    amounts to when the device tries its bundle at the start (:func:`robustdice.bundle.trial.summary`); empty: it is
    not tried. ``apart`` is a file of weights that the model reads where they lie: those of strips, which share them, or
    of linear layers, or of parts that round inputs. Of these, ``signed`` is another ONNX file that gives the same with
    signed codes. ``work`` is what of the model's layers it computes: that of tails that stand alone is not counted.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    affine: tuple[Affine, ...] = field(default=(), kw_only=True)
    trial: tuple[tuple[float, ...], ...] = field(default=(), kw_only=True)
    apart: str | None = field(default=None, kw_only=True)
    work: tuple[Work, ...] = field(default=(), kw_only=True)
    signed: str | None = field(default=None, kw_only=True)

    @property
    def files(self) -> list[str]:
        """The files that it comes in."""
        return [file for file in (self.file, self.signed, self.apart) if file is not None]

    @property
    def in_strips(self) -> bool:
        """Whether it computes strips."""
        return self.apart is not None and self.apart.startswith(STRIPS)

    @property
    def coarse(self) -> tuple[Coarse, ...]:
        """Of the layers that are kept so."""
        return tuple(affine.coarse for affine in self.affine if affine.coarse is not None)


@dataclass(frozen=True)
class Piece(Part):
    """A model that computes shards of one stage.

    ``shards`` are (exchange, shard) pairs: positions in ``Manifest.exchanges`` and in its ``shards``, sorted.
    Output k of the model belongs to the k-th different exchange among them, and holds that
    exchange's shards one after the other along its axis, each with its neurons in ascending order.
    """

    shards: tuple[tuple[int, int], ...]


def extent(part: Part) -> int:
    """Where what a part takes from the weights ends; 0 when it takes nothing."""
    ends = [0]
    for affine in part.affine:
        ends += [each.offset + CORRECTION_BYTES * affine.neurons for each in affine.corrections if each is not None]
        if (coarse := affine.coarse) is not None:
            if coarse.shift is not None:
                ends.append(coarse.shift + coarse.shift_bytes * affine.neurons)
            if coarse.scales is not None:
                ends.append(coarse.scales + SCALE_BYTES * affine.neurons)
            ends += [each.offset + affine.neurons * each.neuron_bytes for each in coarse.filters]
    return max(ends)


def parse_part(document: Mapping[str, Any]) -> Part:
    """A part as a manifest has it; KeyError, TypeError or ValueError when it is none."""
    return Part(**_parse(document))


def parse_piece(document: Mapping[str, Any]) -> Piece:
    """A piece as a manifest has it; KeyError, TypeError or ValueError when it is none."""
    shards = tuple((int(exchange), int(shard)) for exchange, shard in document["shards"])
    return Piece(shards=shards, **_parse(document))


def _parse(document: Mapping[str, Any]) -> dict[str, Any]:
    affine = tuple(map(_parse_affine, document["affine"]))
    outputs = tuple(map(str, document["outputs"]))
    trial = tuple(tuple(map(float, summary)) for summary in document["trial"])
    in_blocks = [each.coarse for each in affine if each.coarse is not None and each.coarse.at_once < each.neurons]
    layers = len(in_blocks) if any(coarse.pair for coarse in in_blocks) else len(affine)
    if in_blocks and (layers, len(outputs)) != (1, 1):
        raise ValueError("a part of few neurons at a time has one layer and one output")
    if trial and len(trial) != len(outputs):
        raise ValueError("a part's trial is of all its outputs")
    return {
        "file": str(document["file"]),
        "inputs": tuple(map(str, document["inputs"])),
        "outputs": outputs,
        "affine": affine,
        "trial": trial,
        "apart": None if document["apart"] is None else str(document["apart"]),
        "signed": None if document.get("signed") is None else str(document["signed"]),
        "work": tuple(map(_parse_work, document.get("work", ()))),
    }


def _parse_work(document: Mapping[str, Any]) -> Work:
    work = Work(_whole(document["layer"], 0), float(document["share"]), str(document["representation"]))
    if not 1e-9 < work.share <= 1 or work.representation not in REPRESENTATIONS:
        raise ValueError(f"work of {work.share} of a layer in {work.representation}")
    return work


def _parse_affine(document: Mapping[str, Any]) -> Affine:
    corrections = tuple(None if each is None else _parse_corrected(each) for each in document["corrections"])
    coarse = None if document["coarse"] is None else _parse_coarse(document["coarse"])
    neurons = _whole(document["neurons"], 1)
    return Affine(str(document["scale"]), str(document["shift"]), neurons, corrections, coarse)


def _parse_corrected(document: Mapping[str, Any]) -> Corrected:
    scale, shift = map(float, document["steps"])
    if not (math.isfinite(scale) and math.isfinite(shift)):
        raise ValueError(f"steps of {scale} and {shift}")
    return Corrected(_whole(document["offset"], 0), (scale, shift))


def _parse_coarse(document: Mapping[str, Any]) -> Coarse:
    coarse = Coarse(
        filters=tuple(map(_parse_filter, document["filters"])),
        scales=None if document["scales"] is None else _whole(document["scales"], 0),
        factor=float(document["factor"]),
        rounded=bool(document["rounded"]),
        shift=None if document["shift"] is None else _whole(document["shift"], 0),
        at_once=_whole(document["at_once"], 1),
        axis=_whole(document["axis"], 1),
        pair=str(document["pair"]),
    )
    if coarse.pair not in ("", "first", "second"):
        raise ValueError(f"a coarse layer that is {coarse.pair!r} of a pair")
    if any(not each.group for each in coarse.filters[: -1 if coarse.pair == "first" else None]):
        raise ValueError("0 where a whole number of at least 1 belongs")
    if not math.isfinite(coarse.factor):
        raise ValueError(f"a factor of {coarse.factor}")
    if not coarse.filters and coarse.scales is None and (coarse.pair != "second" or coarse.shift is None):
        raise ValueError("a coarse part without filters")
    return coarse


def _parse_filter(document: Mapping[str, Any]) -> Filter:
    representation = str(document["representation"])
    if representation not in REPRESENTATIONS[1:]:
        raise ValueError(f"a filter in {representation}")
    return Filter(
        input=str(document["input"]),
        representation=representation,
        shape=tuple(_whole(size, 1) for size in document["shape"]),
        group=_whole(document["group"], 0),
        offset=_whole(document["offset"], 0),
    )


def _whole(value: Any, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{value!r} where a whole number of at least {least} belongs")
    return value
