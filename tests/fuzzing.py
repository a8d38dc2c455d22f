"""Hostile input for every parser: real inputs that are changed, byte by byte and by their structure.

    python tests/fuzzing.py [messages manifests ... | --all] [--cases 1000000] [--seed 0] [--jobs 2]

Whatever comes in, a parser gives something or one of our errors, within CASE_SECONDS and MORE_BYTES of memory, and
nothing is unpickled. Cases run in children of this process, on all processors, so that one that ends the process is a
finding too. Every case follows from its parser, the seed and its number.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
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


# -- parsers


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

    directories = [each.directory for each in bundles_of(*of_kind("int3"), "plain", room)]

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
    "plans": lambda room: Parser(_saved(room, _plans()), change_plan, _from_file(room, Plan.load)),
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
            if found is not None and found.startswith("Hang"):  # the machine may have stood still: once more
                signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
                found = problem(parser, case(parser, name, seed, number))
            signal.setitimer(signal.ITIMER_REAL, 0)
            if found is not None:
                raise SystemExit(f"{number}: {found}")


def fuzz(name: str, numbers: range, seed: int) -> list[str]:
    """What was found in the cases of a parser with these numbers; after a finding the next child goes on behind it."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    findings, number = list[str](), numbers.start
    with tempfile.TemporaryDirectory(dir=where) as directory:
        room = Path(directory)
        parser, report, said = parser_of(name, room), room / "report", room / "said"
        while number < numbers.stop:
            some = range(number, min(number + AT_ONCE, numbers.stop))
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    _run(parser, name, seed, some, report)
                    status = 0
                except BaseException as error:  # the harness's own errors must be seen
                    said.write_text(str(error) if isinstance(error, SystemExit) else traceback.format_exc())
                finally:
                    os._exit(status)
            _, status = os.waitpid(pid, 0)
            number = some.stop
            if status:
                last = int(report.read_text().split()[0])
                ended = f"{last}: the process ended with signal {status & 127}"
                findings.append(ended if status & 127 else said.read_text())
                number = last + 1
    return findings


def main() -> None:
    """Fuzz; the exit status is 1 when anything was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    options.add_argument("--all", action="store_true", help="every parser")
    options.add_argument("--cases", type=int, default=100_000, help="of each parser (default: 100000)")
    options.add_argument("--first", type=int, default=0, help="the number of the first case (default: 0)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    chosen = options.parse_args()
    if unknown := {*chosen.parsers} - {*PARSERS}:
        options.error(f"there is no parser {min(unknown)}; there are {', '.join(PARSERS)}")
    any_found = False
    with ProcessPoolExecutor(chosen.jobs, get_context("fork")) as pool:
        for name in [*PARSERS] if chosen.all else chosen.parsers:
            any_found |= bool(_fuzz_all(pool, name, chosen))
    sys.exit(any_found)


def _fuzz_all(pool: ProcessPoolExecutor, name: str, chosen: argparse.Namespace) -> list[str]:
    start, end = time.monotonic(), chosen.first + chosen.cases
    size = max(AT_ONCE, chosen.cases // 50)
    parts = [range(first, min(first + size, end)) for first in range(chosen.first, end, size)]
    tasks: dict[Future[list[str]], range] = {pool.submit(fuzz, name, part, chosen.seed): part for part in parts}
    done, findings = 0, list[str]()
    for task in as_completed(tasks):
        done += len(tasks[task])
        findings += task.result()
        text = f"{name}: {done:,} cases in {time.monotonic() - start:.0f} s, {len(findings)} findings"
        print(text, end="\r" if sys.stdout.isatty() and done < chosen.cases else "\n", flush=True)
    for finding in findings[:20]:
        print(f"    case {finding}", flush=True)
    return findings


if __name__ == "__main__":
    main()
