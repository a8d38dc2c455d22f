"""What a bundle says about itself: the stages that a device runs, and where they exchange shards.

A *value* is a named tensor of a frame: the network's input, an assembled exchange, or a result of a
stage's local part. A frame goes through the stages in order. In each stage a device

1. runs the *local* part, if there is one: what every device computes from values that it already has;
2. runs its *pieces*: models that compute shards. The first piece holds the shards whose primary this
   device is (with hot spares: every shard that it holds); each further one holds spares that it publishes
   under the same circumstances;
3. hands its shards over and assembles each of the stage's exchanges into one value.

The last stage has no exchange; after its local part the network's output is among the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from robustdice.errors import BundleError
from robustdice.plan import Shard, parity_problem, shard_from_json, shard_to_json, shard_width

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Exchange:
    """The point after one layer where devices hand each other their shards.

    ``shape`` is the assembled value's, without the batch axis. Neurons lie along ``axis`` (counted with the
    batch axis, which is 0), each ``features`` entries wide. What nobody hands over is ``fill``: zero, or minus
    infinity where the layer's neurons are the class scores. ``shards`` are all shards of the layer, in the
    plan's order, whoever holds them.

    Where the exchange comes before the layer's tail, every device computes the tail of everything; ``mask`` then
    names a second value, bool[neurons], which says what was there, for a lost neuron counts as lost after its tail.
    """

    layer: str
    value: str
    shape: tuple[int, ...]
    axis: int
    features: int
    fill: float
    mask: str | None
    shards: tuple[Shard, ...]

    def entries(self, shard: int) -> int:
        """How many entries a shard's array has along the axis."""
        return shard_width(self.shards, shard) * self.features


@dataclass(frozen=True)
class Local:
    """An ONNX model every device runs: ``inputs`` and ``outputs`` are names of values and of its tensors alike."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """An ONNX model that computes shards of one stage.

    ``shards`` are (exchange, shard) pairs: positions in ``Manifest.exchanges`` and in its ``shards``, sorted.
    Output k of the model belongs to the k-th different exchange among them, and holds that
    exchange's shards one after the other along its axis, each with its neurons in ascending order.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shards: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stage:
    """What a device computes up to the next exchanges. ``exchanges`` are positions in ``Manifest.exchanges``;
    ``keep`` are the values that later stages still need."""

    local: Local | None
    exchanges: tuple[int, ...]
    pieces: tuple[Piece, ...]
    keep: tuple[str, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a device needs to know, beside the ONNX files.

    ``input_shape`` is without the batch axis; ``classes`` names the outputs in order (may be empty);
    ``preprocessing`` is how an image becomes an input (docs/formats.md); ``weight_bytes`` is what the ONNX
    files hold of the model's parameters, equal to the plan's ``bytes_per_device[device]``.
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

    def to_json(self) -> bytes:
        """The manifest as it stands in a bundle."""
        document = asdict(self)
        for entry, exchange in zip(document["exchanges"], self.exchanges, strict=True):
            entry["shards"] = [shard_to_json(shard) for shard in exchange.shards]
            entry["fill"] = "-inf" if exchange.fill < 0 else "0"
        header = {"format": "robustdice-bundle", "version": FORMAT_VERSION}
        return json.dumps({**header, **document}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Parse a manifest; BundleError with the reason when it is none, or of another version."""
        remedy = "build the bundle again with 'robustdice build'"
        try:
            document = json.loads(content)
        except ValueError:
            raise BundleError(f"{MANIFEST_NAME} is not JSON; {remedy}") from None
        if not isinstance(document, dict) or document.get("format") != "robustdice-bundle":
            raise BundleError(f"{MANIFEST_NAME} has no robustdice-bundle header; {remedy}")
        if document.get("version") != FORMAT_VERSION:
            found = document.get("version")
            raise BundleError(f"bundle format version {found!r}, this version reads {FORMAT_VERSION}; {remedy}")
        try:
            manifest = _parse(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{MANIFEST_NAME} is damaged ({type(error).__name__}: {error}); {remedy}") from None
        _check(manifest)
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
    )


def _parse_exchange(document: Mapping[str, Any]) -> Exchange:
    return Exchange(
        layer=str(document["layer"]),
        value=str(document["value"]),
        shape=tuple(map(int, document["shape"])),
        axis=int(document["axis"]),
        features=int(document["features"]),
        fill=float(document["fill"]),
        mask=None if document["mask"] is None else str(document["mask"]),
        shards=tuple(shard_from_json(shard) for shard in document["shards"]),
    )


def _parse_stage(document: Mapping[str, Any]) -> Stage:
    local = document["local"]
    return Stage(
        local=None if local is None else Local(str(local["file"]), _names(local["inputs"]), _names(local["outputs"])),
        exchanges=tuple(map(int, document["exchanges"])),
        pieces=tuple(
            Piece(
                file=str(piece["file"]),
                inputs=_names(piece["inputs"]),
                outputs=_names(piece["outputs"]),
                shards=tuple((int(exchange), int(shard)) for exchange, shard in piece["shards"]),
            )
            for piece in document["pieces"]
        ),
        keep=_names(document["keep"]),
    )


def _names(names: list[str]) -> tuple[str, ...]:
    return tuple(map(str, names))


def _check(manifest: Manifest) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise BundleError(f"{MANIFEST_NAME} contradicts itself: {what}; build the bundle again")

    require(0 <= manifest.device < manifest.devices, "the device number")
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
        neurons = sorted(neuron for shard in exchange.shards for neuron in shard.neurons)
        width = exchange.shape[exchange.axis - 1]
        require(neurons == list(range(len(neurons))), "a layer's neurons")
        require(bool(exchange.shards) and not parity_problem(exchange.shards), "a parity shard")
        require(all(bool(s.neurons) != bool(s.parity_of) for s in exchange.shards), "an empty shard")
        require(len(neurons) * exchange.features == width, "a layer's width")
    named = {part.file for stage in manifest.stages for part in (stage.local, *stage.pieces) if part is not None}
    require(named == set(manifest.files), "its list of files")
    require(all("/" not in name and not name.startswith(".") for name in named), "a file name with a path")
