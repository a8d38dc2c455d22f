"""What a bundle says about itself: the stages that a device runs, and where they exchange shards.

A *value* is a named tensor of a frame: the network's input, an assembled exchange, or a result of a
stage's local part. A frame goes through the stages in order. In each stage a device

1. runs its *local* parts, if there are any: what every device computes from values that it already has;
2. runs its *pieces*: models that compute shards. The first piece holds the shards whose primary this
   device is (with hot spares: every shard that it holds, but for sums); each further one holds spares that it
   publishes under the same circumstances;
3. hands its shards over and assembles each of the stage's exchanges into one value.

The last stage has no exchange; after its local part the network's output is among the values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from robustdice.bundle.parts import Part, Piece, extent, parse_part, parse_piece
from robustdice.errors import BundleError, PlanError
from robustdice.files import read_json
from robustdice.plan import (
    Certificate,
    Layer,
    Shard,
    check_layer,
    nearest_calibrated,
    parity_problem,
    shard_from_json,
    shard_to_json,
    shard_width,
)
from robustdice.wire_format import WIRES, WireForm

FORMAT_VERSION = 7
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.bin"
"""What is not in the ONNX files: packed filters, and what layers are scaled and shifted by."""
LARGEST_VALUE = 2**26
"""Numbers: 256 MiB of them. A device makes up values of such sizes when it starts."""
APART_PATTERN = "*-*.bin"
"""Files of weights that ONNX files read where they lie."""
"""Files of weights that models of strips share."""


@dataclass(frozen=True)
class Exchange:
    """The point after one layer where devices hand each other their shards.

    ``shape`` is the assembled value's, without the batch axis. Neurons lie along ``axis`` (counted with the
    batch axis, which is 0), each ``features`` entries wide. What nobody hands over is ``fill``: zero, or minus
    infinity where the layer's neurons are the class scores. ``shards`` are all shards of the layer, in the
    plan's order, whoever holds them. Of a run of layers that is computed in strips, the shards' neurons are rows.

    Where the exchange comes before the layer's tail, every device computes the tail of everything; ``mask`` then
    names a second value, bool[neurons], which says what was there, for a lost neuron counts as lost after its tail.

    Shards travel as ``wire`` says.

    Where ``sums`` are exchanged, ``layer`` is the first of a pair and the value is what its neurons add to the second
    one's. Each shard's array has the whole value's shape, and they are added up in the order of the shards; of these
    (:func:`robustdice.plan.added_up`), those with a live publisher are of different neurons.

    If only ``owners`` add them up, each sum is handed over in ``slices`` of its entries, each for whoever publishes the
    shard of the exchange ``owners`` (its position) that has the same number: every slice of the first sum is a shard,
    then every slice of the next. An owner's value has zeros where it does not own it.
    """

    layer: str
    value: str
    shape: tuple[int, ...]
    axis: int
    features: int
    fill: float
    mask: str | None
    shards: tuple[Shard, ...]
    wire: str = "float32"
    sums: bool = False
    slices: tuple[tuple[int, ...], ...] = ()
    owners: int | None = None

    @cached_property
    def in_slices(self) -> tuple[range, ...]:
        """The shards of each slice of sums; of what is not in slices, all together."""
        if not self.slices:
            return (range(len(self.shards)),)
        return tuple(range(number, len(self.shards), len(self.slices)) for number in range(len(self.slices)))

    @cached_property
    def neurons(self) -> int:
        """How many neurons the layer has."""
        return len({neuron for shard in self.shards for neuron in shard.neurons})

    def entries(self, shard: int) -> int:
        """How many entries a shard's array has along the axis."""
        if self.slices:
            return len(self.slices[shard % len(self.slices)])
        if self.sums:
            return self.shape[self.axis - 1]
        return shard_width(self.shards, shard) * self.features

    def form(self, shard: int) -> WireForm:
        """How a shard travels."""
        shape = (*self.shape[: self.axis - 1], self.entries(shard), *self.shape[self.axis :])
        return WireForm(self.wire, shape, self.axis, self.features)


@dataclass(frozen=True)
class Stage:
    """What a device computes up to the next exchanges: the ``local`` parts in order, of which later ones may read what
    earlier ones made, then pieces. ``exchanges`` are positions in ``Manifest.exchanges``; ``keep`` are the values that
    later stages still need."""

    local: tuple[Part, ...]
    exchanges: tuple[int, ...]
    pieces: tuple[Piece, ...]
    keep: tuple[str, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Needs:
    """What the ONNX files of a bundle are written in: the version of ONNX's operators, and that of the files' form."""

    opset: int
    ir: int

    def __str__(self) -> str:
        return f"it needs ONNX operators of version {self.opset}, in files of version {self.ir}"


@dataclass(frozen=True)
class Manifest:
    """Everything a device needs to know, beside the ONNX files.

    ``input_shape`` is without the batch axis; ``classes`` names the outputs in order (may be empty);
    ``preprocessing`` is how an image becomes an input (docs/formats.md); ``weight_bytes`` is what the ONNX
    files and the weights hold of the model's parameters, equal to the plan's ``bytes_per_device[device]``;
    ``calibrated`` are the failure sets that the weights have corrections for; ``activation`` makes probabilities of the
    outputs: ``softmax``, or ``sigmoid`` where each is a question of its own; ``needs`` what ONNX Runtime must know.
    ``layers`` are the model's, which the work of parts is of, and ``model_digest`` is its digest: neither, where an
    earlier version built the bundle.
    """

    device: int
    devices: int
    plan_digest: str
    spares: str
    input: str
    input_shape: tuple[int, ...]
    output: str
    outputs: int
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    exchanges: tuple[Exchange, ...]
    stages: tuple[Stage, ...]
    files: Mapping[str, FileEntry]
    weight_bytes: int
    calibrated: tuple[tuple[int, ...], ...] = ()
    activation: str = "softmax"
    certificate: Certificate | None = None
    needs: Needs | None = None
    model_digest: str | None = None
    layers: tuple[Layer, ...] = ()

    @cached_property
    def sums_of(self) -> Mapping[int, int]:
        """Of every exchange of what owners have added up, the one in which they were handed its sums."""
        return {exchange.owners: e for e, exchange in enumerate(self.exchanges) if exchange.owners is not None}

    def is_owners(self, piece: Piece) -> bool:
        """Whether a piece computes what owners add up."""
        return piece.shards[0][0] in self.sums_of

    @property
    def parts(self) -> list[Part]:
        """Every part of every stage."""
        return [part for stage in self.stages for part in (*stage.local, *stage.pieces)]

    def calibrated_for(self, down: Iterable[int]) -> int | None:
        """Which of ``calibrated`` applies while the devices ``down`` are: :func:`robustdice.plan.nearest_calibrated`.
        None: nothing is corrected."""
        known = [frozenset(failed) for failed in self.calibrated]
        found = nearest_calibrated(known, frozenset(down))
        return None if found is None else known.index(found)

    def to_json(self) -> bytes:
        """The manifest as it stands in a bundle."""
        document = asdict(replace(self, certificate=None))
        for entry, exchange in zip(document["exchanges"], self.exchanges, strict=True):
            entry["shards"] = [shard_to_json(shard) for shard in exchange.shards[:: max(1, len(exchange.slices))]]
            entry["fill"] = "-inf" if exchange.fill < 0 else "0"
        document["certificate"] = self.certificate and self.certificate.to_json()
        header = {"format": "robustdice-bundle", "version": FORMAT_VERSION}
        return json.dumps({**header, **document}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Parse a manifest; BundleError with the reason when it is none, or of another version."""
        remedy = "build the bundle again with 'robustdice build'"
        try:
            document = read_json(content)
        except ValueError:
            raise BundleError(f"{MANIFEST_NAME} is not JSON; {remedy}") from None
        if not isinstance(document, dict) or document.get("format") != "robustdice-bundle":
            raise BundleError(f"{MANIFEST_NAME} has no robustdice-bundle header; {remedy}")
        if document.get("version") != FORMAT_VERSION:
            found = document.get("version")
            raise BundleError(f"bundle format version {found!r}, this version reads {FORMAT_VERSION}; {remedy}")
        try:
            manifest = _parse(document)
            _check(manifest)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, PlanError) as error:
            raise BundleError(f"{MANIFEST_NAME} is damaged ({type(error).__name__}: {error}); {remedy}") from None
        return manifest


def _parse(document: Mapping[str, Any]) -> Manifest:
    return Manifest(
        device=int(document["device"]),
        devices=int(document["devices"]),
        plan_digest=str(document["plan_digest"]),
        spares=str(document["spares"]),
        input=str(document["input"]),
        input_shape=tuple(map(int, document["input_shape"])),
        output=str(document["output"]),
        outputs=int(document["outputs"]),
        classes=tuple(map(str, document["classes"])),
        preprocessing=dict(document["preprocessing"]),
        exchanges=tuple(_parse_exchange(exchange) for exchange in document["exchanges"]),
        stages=tuple(_parse_stage(stage) for stage in document["stages"]),
        files={
            str(name): FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in document["files"].items()
        },
        weight_bytes=int(document["weight_bytes"]),
        calibrated=tuple(tuple(map(int, failed)) for failed in document["calibrated"]),
        activation=str(document.get("activation", "softmax")),
        certificate=Certificate.from_json(document.get("certificate")),
        needs=None if document.get("needs") is None else Needs(**{k: int(v) for k, v in document["needs"].items()}),
        model_digest=None if document.get("model_digest") is None else str(document["model_digest"]),
        layers=tuple(map(_parse_layer, document.get("layers", ()))),
    )


def _parse_layer(document: Mapping[str, Any]) -> Layer:
    layer = Layer(**document)
    check_layer(layer)
    if not isinstance(layer.name, str) or layer.neurons * max(layer.neuron_macs, layer.neuron_weights) > 2**53:
        raise ValueError(f"a layer {document}")
    return layer


def _parse_exchange(document: Mapping[str, Any]) -> Exchange:
    slices = tuple(tuple(map(int, neurons)) for neurons in document["slices"])
    shards = [shard_from_json(shard) for shard in document["shards"]]
    return Exchange(
        layer=str(document["layer"]),
        value=str(document["value"]),
        shape=tuple(map(int, document["shape"])),
        axis=int(document["axis"]),
        features=int(document["features"]),
        fill=float(document["fill"]),
        mask=None if document["mask"] is None else str(document["mask"]),
        shards=tuple(shard for shard in shards for _ in slices or ((),)),
        wire=str(document["wire"]),
        sums=bool(document["sums"]),
        slices=slices,
        owners=None if document["owners"] is None else int(document["owners"]),
    )


def _parse_stage(document: Mapping[str, Any]) -> Stage:
    return Stage(
        local=tuple(map(parse_part, document["local"])),
        exchanges=tuple(map(int, document["exchanges"])),
        pieces=tuple(map(parse_piece, document["pieces"])),
        keep=tuple(map(str, document["keep"])),
    )


def _are_owners(manifest: Manifest, exchange: Exchange) -> bool:
    """Whether those who are to add up the slices of sums are all devices, in the next stage."""
    if exchange.owners is None or not exchange.sums or not 0 <= exchange.owners < len(manifest.exchanges):
        return False
    position, owners = manifest.exchanges.index(exchange), manifest.exchanges[exchange.owners]
    stages = [
        number
        for at in (position, exchange.owners)
        for number in range(len(manifest.stages))
        if at in manifest.stages[number].exchanges
    ]
    held = [
        piece
        for stage in manifest.stages
        for piece in stage.pieces
        if any(at == exchange.owners for at, _ in piece.shards)
    ]
    return (
        stages[1] == stages[0] + 1
        and tuple(shard.neurons for shard in owners.shards) == exchange.slices
        and all(sorted(shard.devices) == list(range(manifest.devices)) for shard in owners.shards)
        and not owners.sums
        and [piece.shards for piece in held] == [tuple((exchange.owners, s) for s in range(len(owners.shards)))]
        and held[0].inputs == (exchange.value,)
    )


def _check(manifest: Manifest) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise BundleError(f"{MANIFEST_NAME} contradicts itself: {what}; build the bundle again")

    require(0 <= manifest.device < manifest.devices, "the device number")
    shapes = [manifest.input_shape, *(exchange.shape for exchange in manifest.exchanges)]
    require(all(min(s, default=1) > 0 and math.prod(s) <= LARGEST_VALUE for s in shapes), "the size of a value")
    work = [each for part in manifest.parts for each in part.work]
    require(all(each.layer < len(manifest.layers) for each in work), "what its models compute")
    require(len({layer.name for layer in manifest.layers}) == len(manifest.layers), "the names of its layers")
    require(manifest.activation in ("softmax", "sigmoid"), "what its outputs mean")
    seen: list[int] = []
    for stage in manifest.stages:
        seen.extend(stage.exchanges)
        for piece in stage.pieces:
            positions = sorted({position for position, _ in piece.shards})
            require(bool(positions) and set(positions) <= set(stage.exchanges), "a piece of another stage")
            require(len(positions) == len(piece.outputs), "a piece's outputs")
            for position, shard in piece.shards:
                require(0 <= shard < len(manifest.exchanges[position].shards), "a shard number")
                holders = manifest.exchanges[position].shards[shard].devices
                require(manifest.device in holders, "a shard that this device does not hold")
    require(sorted(seen) == list(range(len(manifest.exchanges))), "the exchanges of its stages")
    for exchange in manifest.exchanges:
        require(1 <= exchange.axis <= len(exchange.shape), "an exchange's axis")
        # Of sums, every neuron is in one that is handed over while all are up.
        once = exchange.shards[:: max(1, len(exchange.slices))]
        neurons = sorted(neuron for shard in once if not shard.after for neuron in shard.neurons)
        width = exchange.shape[exchange.axis - 1]
        require(neurons == list(range(len(neurons))), "a layer's neurons")
        require(bool(exchange.shards) and not parity_problem(exchange.shards), "a parity shard")
        require(all(bool(s.neurons) != bool(s.parity_of) for s in exchange.shards), "an empty shard")
        require(exchange.sums or len(neurons) * exchange.features == width, "a layer's width")
        for each in exchange.shards:
            require(not each.after or (exchange.sums and set(each.neurons) <= set(neurons)), "a shard among sums")
            require(not exchange.sums or (len(each.holders) == 1 and not each.parity_of), "a shard among sums")
        if exchange.slices or exchange.owners is not None:
            require(_are_owners(manifest, exchange), "the owners of sums")
        require(exchange.wire in WIRES, "what its shards travel as")
        require(exchange.wire == "float32" or not exchange.shards[-1].parity_of, "sums that are not float32")
    require(
        all(0 <= d < manifest.devices for failed in manifest.calibrated for d in failed), "a calibrated failure set"
    )
    named = {file for part in manifest.parts for file in part.files}
    if any(extent(part) for part in manifest.parts):
        named.add(WEIGHTS_NAME)
    require(named == set(manifest.files), "its list of files")
    for part in manifest.parts:
        require(all(len(affine.corrections) == len(manifest.calibrated) for affine in part.affine), "its corrections")
        end = extent(part)
        require(not end or end <= manifest.files[WEIGHTS_NAME].size, "weights beyond the end of their file")
    require(
        all(name.isprintable() and "/" not in name and name[:1] not in (".", "") for name in named),
        "a file name with a path",
    )
