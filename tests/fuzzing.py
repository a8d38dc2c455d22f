"""Hostile input for every parser: real inputs that are changed, byte by byte and by their structure.

    python tests/fuzzing.py [messages manifests ...] [--cases 100000] [--seed 0]

Whatever comes in, a parser gives something or one of our errors, within CASE_SECONDS and MORE_BYTES of memory, and
nothing is unpickled. Cases run in children of this process, so that one that ends the process is a finding too. Every
case follows from its parser, the seed and its number.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from bundles import INPUT_SHAPE, Network, make_manifest, make_plan, write_bundles
from robustdice.bundle.manifest import MANIFEST_NAME, Manifest
from robustdice.bundle.read import load_bundle
from robustdice.cost.profile import TYPICAL, LayerSeconds, Profile
from robustdice.errors import RobustdiceError
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

CASE_SECONDS = 5.0
MORE_BYTES = 2**29
"""Of address space, beyond what the process has before its first case."""
AT_ONCE = 2000
"""Cases of one child."""


class Hang(BaseException):
    """A case took too long; no parser may catch it."""


class Unpickled(BaseException):
    """Something was unpickled."""


@dataclass(frozen=True)
class Parser:
    """``parse`` is given what ``change`` makes of one of the ``inputs``, which are real."""

    inputs: Sequence[Any]
    change: Callable[[random.Random, Any], Any]
    parse: Callable[[Any], object]


# -- changes

NUMBERS = (0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308)
ODD = (float("nan"), float("inf"), float("-inf"), 10**400)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "0",
    "x" * 300,
    "../x",
    "\x00",
    "\ud800",
    "\u202e",
    [],
    {},
    [[]],
    {"": None},
    [0] * 300,
)


def change_bytes(dice: random.Random, content: bytes) -> bytes:
    """A few bytes changed, removed, doubled, inserted or exchanged."""
    found = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at, length = dice.randrange(len(found) + 1), dice.choice((1, 1, 2, 4, 8, 64))
        match dice.randrange(7):
            case 0 if at < len(found):
                found[at] ^= 1 << dice.randrange(8)
            case 1:
                found[at : at + length] = dice.randbytes(length)
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + length]
            case 4:
                found[at:at] = dice.randbytes(length)
            case 5:
                value = dice.choice((0, 1, 0x7F, 0x80, 0xFF, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
                size = dice.choice((1, 2, 4, 8))
                found[at : at + size] = (value % 256**size).to_bytes(size, "little")
            case 6 if dice.random() < 0.3:
                del found[at:]
    return bytes(found)


def change_document(dice: random.Random, document: Any, odd: bool = True) -> Any:
    """A few values of nested lists and dictionaries changed, removed, doubled or put elsewhere."""
    found = json.loads(json.dumps(document))
    places = list(_places(found))
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        holder, key = dice.choice(places)
        values = holder if isinstance(holder, list) else list(holder)
        if (isinstance(holder, dict) and key not in holder) or (isinstance(holder, list) and key >= len(holder)):
            continue
        match dice.randrange(8):
            case 0:
                del holder[key]
            case 1:
                other, name = dice.choice(places)
                with contextlib.suppress(KeyError, IndexError):
                    holder[key] = json.loads(json.dumps(other[name]))
            case 2:
                holder[key] = [holder[key]] * dice.choice((0, 1, 2, 50))
            case 3 if isinstance(holder, dict):
                holder[dice.choice(("", "x", *map(str, values)))] = dice.choice(OTHERS)
            case 4 if isinstance(holder[key], int | float) and abs(holder[key]) < 1e300:
                holder[key] += dice.choice((1, -1, 0.5, 1000))
            case 5 if odd:
                deep: Any = 0
                for _ in range(dice.choice((3, 90))):
                    deep = [deep]
                holder[key] = dice.choice((deep, *ODD))
            case 6:
                holder[key] = dice.choice(OTHERS)
            case _:
                holder[key] = dice.choice(NUMBERS)
    return found


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(entries):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def change_json(dice: random.Random, content: bytes) -> bytes:
    """By structure, or byte by byte; sometimes so deep that a parser that calls itself ends."""
    kind = dice.random()
    if kind < 0.6:
        with contextlib.suppress(ValueError, RecursionError):  # it was changed before, and is no JSON any more
            return json.dumps(change_document(dice, json.loads(content))).encode(errors="surrogatepass")
    if kind < 0.61:
        return dice.choice((b"[", b'{"a":')) * 30_000
    return change_bytes(dice, content)


def change_toml(dice: random.Random, content: tuple[bytes, dict[str, Any]]) -> bytes:
    """By structure, or byte by byte."""
    if dice.random() < 0.6:
        with contextlib.suppress(TypeError, ValueError):  # what TOML cannot say
            return tomli_w.dumps(change_document(dice, content[1], odd=False)).encode(errors="surrogatepass")
    return change_bytes(dice, content[0])


def change_zip(dice: random.Random, content: bytes) -> bytes:
    """Byte by byte, or its members: one of them changed, left out or there twice."""
    if dice.random() < 0.4:
        return change_bytes(dice, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        kind = archive.infolist()[0].compress_type
        members = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice(sorted(members))
    if dice.random() < 0.15:
        del members[name]
    elif name == "header.npy" and dice.random() < 0.8:
        header = bytes(np.load(io.BytesIO(members[name])))
        members[name] = _npy(np.frombuffer(change_json(dice, header), np.uint8))
    elif name.endswith(".json"):
        members[name] = change_json(dice, members[name])
    elif dice.random() < 0.3:
        members[name] = _npy(np.asarray(dice.choice(([], [[]], [[1.0]], [[np.nan]] * 3, "x", [None], 1 + 2j))))
    else:
        members[name] = change_bytes(dice, members[name])
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w", dice.choice((kind, kind, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for each, data in members.items():
            archive.writestr(each, data)
    return found.getvalue()


def _npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=True)
    return content.getvalue()


def change_message(dice: random.Random, message: tuple[list[bytes], int | None]) -> tuple[list[bytes], int | None]:
    """The header by structure, any frame byte by byte, frames left out, doubled or exchanged, another sender."""
    parts, source = list(message[0]), message[1]
    for _ in range(dice.choice((1, 1, 2))):
        at = dice.randrange(len(parts)) if parts else 0
        match dice.randrange(8):
            case 0 if parts:
                del parts[at]
            case 1 if parts:
                parts.insert(at, parts[dice.randrange(len(parts))])
            case 2:
                parts.insert(at, dice.randbytes(dice.choice((0, 1, 4, 64, 1000))))
            case 3:
                source = dice.choice((None, 0, 1, 2))
            case 4 | 5 if parts and parts[0][:1] == b"{":
                parts[0] = change_json(dice, parts[0])
            case _ if parts:
                parts[at] = change_bytes(dice, parts[at])
    return parts, source


def change_plan(dice: random.Random, content: bytes) -> bytes:
    """A zip file, or JSON alone."""
    return change_zip(dice, content) if content[:2] == b"PK" else change_json(dice, content)


# -- parsers


def parsers(room: Path) -> dict[str, Parser]:
    """All of them; ``room`` is a directory for their files, better in memory."""
    from test_messages import DEVICE, TO_CLIENT, TO_DEVICE  # noqa: PLC0415 -- which imports this in turn

    plan = make_plan(3)
    client, file = Codec(plan.digest), room / "input"

    def from_file(read: Callable[[Path], object], suffix: str = "") -> Callable[[bytes], object]:
        path = file.with_suffix(suffix)

        path.touch(0o600)

        def parse(content: bytes) -> object:
            path.write_bytes(content)
            return read(path)

        return parse

    encoded = [([bytes(part) for part in DEVICE.encode(m)], source) for m, source in (*TO_DEVICE, *TO_CLIENT)]
    shards = [message for message in encoded if message[0][0][:1] != b"{"]
    manifests = [make_manifest(each, 0).to_json() for each in _plans()]
    write_cluster(room, 3, plan.digest)
    cluster = Cluster.read(room / "cluster.toml")
    listed = {
        "format": "robustdice-cluster",
        "version": 1,
        "plan_digest": plan.digest,
        "transport": "curve",
        "devices": [{**vars(device), "listen": device.address} for device in cluster.devices],
        "clients": [vars(each) for each in cluster.clients],
    }
    bundles = write_bundles(room / "build", make_plan(2), Network())
    sidecar = {
        "input_size": [3, 32, 32], "resize": 36, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.2] * 3,
        "fit": "cover", "channels": "BGR", "classes": ["a", "b"], "activation": "sigmoid", "border": "white",
    }  # fmt: skip
    profile = replace(TYPICAL, layers={"conv1": LayerSeconds(2e-3, 1e-3, 0.5)}, model_digest="0" * 64)
    return {
        "messages": Parser(encoded, change_message, lambda m: _decode(DEVICE, client, m)),
        "parcels": Parser(shards, change_message, lambda m: DEVICE.decode(*m)),
        "manifests": Parser(manifests, change_json, Manifest.from_json),
        "plans": Parser(_saved(room, _plans()), change_plan, from_file(Plan.load)),
        "clusters": Parser([((room / "cluster.toml").read_bytes(), listed)], change_toml, from_file(Cluster.read)),
        "scores": Parser(_saved(room, [_scores()]), change_zip, from_file(Importance.load)),
        "sidecars": Parser([json.dumps(sidecar).encode()], change_json, lambda c: check_preprocessing(_object(c))),
        "profiles": Parser(_saved(room, [profile]), change_json, from_file(Profile.load)),
        "keys": Parser([(room / "client.key").read_bytes()], change_bytes, from_file(read_secret)),
        "bundles": Parser(bundles, lambda dice, bundle: _change_bundle(dice, bundle.directory), _load_bundle),
        "models": Parser(bundles, lambda dice, bundle: _change_model(dice, bundle.directory), _run_model),
        "images": Parser(_images(), change_bytes, _read_image),
    }


def _decode(device: Codec, client: Codec, message: tuple[list[bytes], int | None]) -> None:
    with contextlib.suppress(RobustdiceError):
        client.decode(*message)
    device.decode(*message)


def _object(content: bytes) -> Any:
    """As whoever reads a sidecar does."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise RobustdiceError("not a JSON object")
    return document


def _plans() -> list[Plan]:
    plan = make_plan(3)
    fixed = tuple(
        Correction.of(np.ones(layer.neurons, np.float16), np.zeros(layer.neurons, np.float16)) for layer in plan.layers
    )
    corrected = replace(plan, corrections={frozenset({1}): fixed})
    return [plan, make_plan(3, parity=True), make_plan(2, wire="uint8"), make_plan(2, pair=True), corrected]


def _scores() -> Importance:
    scores = tuple(np.random.default_rng(k).random((k + 3, 3)) for k in range(3))
    return Importance(("a", "b", "c"), scores, ("s1", "s2", "s3"), ModelReference("m", "0" * 64), {"samples": 4})


def _saved(room: Path, things: Sequence[Any]) -> list[bytes]:
    found = []
    for thing in things:
        thing.save(room / "saved")
        found.append((room / "saved").read_bytes())
    return found


def _change_bundle(dice: random.Random, directory: Path) -> tuple[Path, str, bytes]:
    file = dice.choice(sorted(each.name for each in directory.iterdir()))
    return directory, file, change_bytes(dice, (directory / file).read_bytes())


def _load_bundle(changed: tuple[Path, str, bytes]) -> None:
    directory, file, content = changed
    with _in_place(directory / file, content):
        Executor(load_bundle(directory))


def _change_model(dice: random.Random, directory: Path) -> tuple[Path, str, bytes]:
    file = dice.choice(sorted(each.name for each in directory.glob("*.onnx")))
    return directory, file, change_bytes(dice, (directory / file).read_bytes())


def _run_model(changed: tuple[Path, str, bytes]) -> None:
    """A model that was changed by whoever made the bundle: its digest is right."""
    directory, file, content = changed
    document = json.loads((directory / MANIFEST_NAME).read_bytes())
    document["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with _in_place(directory / file, content), _in_place(directory / MANIFEST_NAME, json.dumps(document).encode()):
        executor = Executor(load_bundle(directory))
        executor.run_local(0, {"x": np.zeros((1, *INPUT_SHAPE), np.float32)})


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


# -- running


def case(parser: Parser, name: str, seed: int, number: int) -> Any:
    """The input of one case."""
    dice = random.Random(f"{name} {seed} {number}")  # noqa: S311 -- to be had again
    return parser.change(dice, dice.choice(parser.inputs))


def problem(parser: Parser, changed: Any) -> str | None:
    """What is wrong with how a parser took its input; within limits after :func:`limit`."""
    try:
        parser.parse(changed)
    except RobustdiceError:
        return None
    except BaseException as error:  # whatever else it is: that is the finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]} ({Path(where.filename).name}:{where.lineno})"
    return None


def limit() -> None:
    """From now on memory is limited in this process, and unpickling raises."""
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, resource.RLIM_INFINITY))
    sys.addaudithook(_no_pickle)
    signal.signal(signal.SIGALRM, _ring)


def _ring(*_: object) -> None:
    raise Hang


def _no_pickle(event: str, _: object) -> None:
    if event == "pickle.find_class":
        raise Unpickled


def _run(parser: Parser, name: str, seed: int, numbers: range, report: Path) -> None:
    """In a child: write the number of each case, and what was found."""
    limit()
    with report.open("w") as file:
        for number in numbers:
            file.seek(0)
            file.write(f"{number:12}")
            file.flush()
            signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
            found = problem(parser, case(parser, name, seed, number))
            signal.setitimer(signal.ITIMER_REAL, 0)
            if found is not None:
                raise SystemExit(f"{number}: {found}")


def fuzz(name: str, cases: int, seed: int, room: Path) -> list[str]:
    """What was found in so many cases of a parser; after a finding the next child goes on behind it."""
    parser, findings, number = parsers(room)[name], list[str](), 0
    report, said = room / "report", room / "said"
    while number < cases:
        numbers = range(number, min(number + AT_ONCE, cases))
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _run(parser, name, seed, numbers, report)
                status = 0
            except BaseException as error:  # the harness's own errors must be seen
                said.write_text(str(error) if isinstance(error, SystemExit) else traceback.format_exc())
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        number = numbers.stop
        if status:
            last = int(report.read_text().split()[0])
            ended = f"{last}: the process ended with signal {status & 127}"
            findings.append(ended if status & 127 else said.read_text())
            number = last + 1
    return findings


def main() -> None:
    """Fuzz; the exit status is 1 when anything was found."""
    names = [*parsers(Path(tempfile.mkdtemp()))]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parsers", nargs="*", default=names, help=", ".join(names))
    options.add_argument("--cases", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    any_found = False
    for name in chosen.parsers:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as room:  # noqa: S108
            start = time.monotonic()
            findings = fuzz(name, chosen.cases, chosen.seed, Path(room))
            seconds = time.monotonic() - start
        print(f"{name}: {chosen.cases:,} cases in {seconds:.0f} s, {len(findings)} findings", flush=True)
        for finding in findings[:20]:
            print(f"    case {finding}", flush=True)
        any_found |= bool(findings)
    sys.exit(any_found)


if __name__ == "__main__":
    main()
