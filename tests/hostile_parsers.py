"""The parsers that hostile input is tried on: real inputs, how they are changed, and what reads them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bundles import Network, make_manifest, make_plan, write_bundles
from mutations import change_bytes, change_document, change_json, change_message, change_plan, change_toml, change_zip
from robustdice.bundle.manifest import MANIFEST_NAME, Manifest
from robustdice.bundle.read import load_bundle
from robustdice.cost.profile import TYPICAL, LayerSeconds, Profile
from robustdice.errors import RobustdiceError
from robustdice.files import read_json
from robustdice.images import check_image, read_image
from robustdice.importance.values import Importance
from robustdice.plan import ModelReference, Plan
from robustdice.preprocessing import check_preprocessing
from robustdice.representation import Correction
from robustdice.runtime.executor import Executor
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.config import Cluster
from robustdice.runtime.wire.founding import write_cluster
from robustdice.runtime.wire.keys import read_secret


@dataclass(frozen=True)
class Parser:
    """``parse`` is given what ``change`` makes of one of the ``inputs``, which are real."""

    inputs: Sequence[Any]
    change: Callable[[random.Random, Any], Any]
    parse: Callable[[Any], object]


def parser_of(name: str, room: Path) -> Parser:
    """The parser with this name; ``room`` is an empty directory for its files, better in memory."""
    return PARSERS[name](room)


def _from_file(room: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    path = room / "input"
    path.touch(0o600)

    def parse(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return parse


def _encoded() -> tuple[list[tuple[list[bytes], int | None]], Codec]:
    """Messages of all kinds with who sent them, and what a device reads them with."""
    from test_messages import DEVICE, TO_CLIENT, TO_DEVICE  # noqa: PLC0415 -- that takes a while

    sent = (*TO_DEVICE, *TO_CLIENT)
    return [([bytes(part) for part in DEVICE.encode(message)], source) for message, source in sent], DEVICE


def _messages(_: Path) -> Parser:
    encoded, device = _encoded()
    client = Codec(make_plan(3).digest)

    def decode(message: tuple[list[bytes], int | None]) -> None:
        with contextlib.suppress(RobustdiceError):
            client.decode(*message)
        device.decode(*message)

    return Parser(encoded, change_message, decode)


def _parcels(_: Path) -> Parser:
    encoded, device = _encoded()
    shards = [message for message in encoded if message[0][0][:1] != b"{"]
    return Parser(shards, change_message, lambda message: device.decode(*message))


def _manifests(_: Path) -> Parser:
    return Parser([make_manifest(each, 0).to_json() for each in _plans()], change_json, Manifest.from_json)


def _clusters(room: Path) -> Parser:
    cluster = write_cluster(room, 3, "f" * 64)
    listed = {
        "format": "robustdice-cluster",
        "version": 1,
        "plan_digest": cluster.plan_digest,
        "transport": "curve",
        "devices": [{**vars(device), "listen": device.address} for device in cluster.devices],
        "clients": [vars(each) for each in cluster.clients],
    }
    content = (room / "cluster.toml").read_bytes()
    return Parser([(content, listed)], change_toml, _from_file(room, Cluster.read))


def _sidecars(_: Path) -> Parser:
    sidecar = {
        "input_size": [3, 32, 32], "resize": 36, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.2] * 3,
        "fit": "cover", "channels": "BGR", "classes": ["a", "b"], "activation": "sigmoid", "border": "white",
    }  # fmt: skip

    def read(content: bytes) -> object:
        """As whoever reads a sidecar does."""
        try:
            document = read_json(content)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise RobustdiceError("not a JSON object")
        return check_preprocessing(document)

    return Parser([json.dumps(sidecar).encode()], change_json, read)


def _profiles(room: Path) -> Parser:
    profile = replace(TYPICAL, layers={"conv1": LayerSeconds(2e-3, 1e-3, 0.5)}, model_digest="0" * 64)
    return Parser(_saved(room, [profile]), change_json, _from_file(room, Profile.load))


def _keys(room: Path) -> Parser:
    write_cluster(room, 1, "f" * 64)
    return Parser([(room / "client.key").read_bytes()], change_bytes, _from_file(room, read_secret))


def _plans() -> list[Plan]:
    plan = make_plan(3)
    fixed = tuple(
        Correction.of(np.ones(layer.neurons, np.float16), np.zeros(layer.neurons, np.float16)) for layer in plan.layers
    )
    corrected = replace(plan, corrections={frozenset({1}): fixed})
    return [plan, make_plan(3, parity=True), make_plan(2, wire="uint8"), make_plan(2, pair=True), corrected]


def _plans_in_files(room: Path) -> Parser:
    """With weights, and without."""
    from test_coarse_bundles import of_kind  # noqa: PLC0415 -- that takes PyTorch

    every = [*_plans(), *(of_kind(kind)[1] for kind in ("int3", "ec3"))]
    return Parser(_saved(room, every), change_plan, _from_file(room, Plan.load))


def _scores() -> Importance:
    scores = tuple(np.random.default_rng(k).random((k + 3, 3)) for k in range(3))
    return Importance(("a", "b", "c"), scores, ("s1", "s2", "s3"), ModelReference("m", "0" * 64), {"samples": 4})


def _saved(room: Path, things: Sequence[Any]) -> list[bytes]:
    found = []
    for thing in things:
        thing.save(room / "saved")
        found.append((room / "saved").read_bytes())
    return found


@dataclass(frozen=True)
class _Bundle:
    """A bundle one of whose files has another content; whoever made it gave that its digest, or did not."""

    directory: Path
    file: str
    content: bytes
    listed: bool


def _bundles(room: Path) -> Parser:
    """A manifest, or another file, of which the manifest does not know."""

    def change(dice: random.Random, directory: Path) -> _Bundle:
        files = sorted(each.name for each in directory.iterdir() if each.is_file())
        file = dice.choice((MANIFEST_NAME, dice.choice(files)))
        content = (directory / file).read_bytes()
        return _Bundle(directory, file, (change_json if file == MANIFEST_NAME else change_bytes)(dice, content), False)

    return Parser(_written(room), change, _run_bundle)


def _models(room: Path) -> Parser:
    """Models that were changed by whoever made the bundle."""
    return Parser(_written(room), lambda dice, directory: _changed_in(dice, directory, ".onnx"), _run_bundle)


def _weights(room: Path) -> Parser:
    """Weights that are packed beside the models, or what the manifest says of them, by whoever made the bundle."""
    from test_coarse_bundles import bundles_of, of_kind  # noqa: PLC0415 -- that takes PyTorch

    kinds = ("int3", "ec3")
    directories = [each.directory for kind in kinds for each in bundles_of(*of_kind(kind), "plain", room / kind)]

    def change(dice: random.Random, directory: Path) -> _Bundle:
        if dice.random() < 0.5:
            return _changed_in(dice, directory, ".bin")
        manifest = json.loads((directory / MANIFEST_NAME).read_bytes())
        part = dice.choice([part for stage in manifest["stages"] for part in (*stage["local"], *stage["pieces"])])
        change_document(dice, part["affine"] or part)
        content = json.dumps(manifest).encode(errors="surrogatepass")
        return _Bundle(directory, MANIFEST_NAME, content, listed=False)

    return Parser(directories, change, _run_bundle)


def _written(room: Path) -> list[Path]:
    return [each.directory for each in write_bundles(room, make_plan(2), Network())]


def _changed_in(dice: random.Random, directory: Path, suffix: str) -> _Bundle:
    file = dice.choice(sorted(each.name for each in directory.iterdir() if each.suffix == suffix))
    return _Bundle(directory, file, change_bytes(dice, (directory / file).read_bytes()), listed=True)


def _run_bundle(bundle: _Bundle) -> None:
    """As a device does at its start."""
    entry = {"size": len(bundle.content), "sha256": hashlib.sha256(bundle.content).hexdigest()}
    manifest = bundle.directory / MANIFEST_NAME
    with contextlib.ExitStack() as stack:
        if bundle.listed:
            document = json.loads(manifest.read_bytes())
            document["files"][bundle.file] = entry
            stack.enter_context(_in_place(manifest, json.dumps(document).encode()))
        stack.enter_context(_in_place(bundle.directory / bundle.file, bundle.content))
        Executor(load_bundle(bundle.directory)).try_out()


@contextlib.contextmanager
def _in_place(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def _images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    found = []
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "PCX", "TGA", "SGI", "JPEG2000"):
        content = io.BytesIO()
        with contextlib.suppress(OSError, KeyError, ValueError):  # not in this build of Pillow
            Image.fromarray(pixels).save(content, kind)
            found.append(content.getvalue())
    return found


def _read_image(content: bytes) -> None:
    how = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    with contextlib.suppress(RobustdiceError):
        check_image(content, how)
    read_image(content, how)


PARSERS: dict[str, Callable[[Path], Parser]] = {
    "messages": _messages,
    "parcels": _parcels,
    "manifests": _manifests,
    "plans": _plans_in_files,
    "clusters": _clusters,
    "scores": lambda room: Parser(_saved(room, [_scores()]), change_zip, _from_file(room, Importance.load)),
    "sidecars": _sidecars,
    "profiles": _profiles,
    "keys": _keys,
    "images": lambda _: Parser(_images(), change_bytes, _read_image),
    "bundles": _bundles,
    "models": _models,
    "weights": _weights,
}
"""All of them; the last three take longest."""
