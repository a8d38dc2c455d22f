"""A plan as one file (docs/formats.md): JSON, or a zip file of JSON and arrays where it has any."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import PlanError
from robustdice.files import read_array, read_json
from robustdice.plan.shards import FailureSet, Holder, Shard
from robustdice.representation import (
    TAIL_REPRESENTATION,
    CoarseFilter,
    CoarseLayer,
    Correction,
    Steps,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from robustdice.plan.plan import Plan

FORMAT_VERSION = 7
REMEDY = "make a new one with 'robustdice plan'"
_DOCUMENT = "plan.json"
_ARRAY_LIMIT = 2**31
"""Bytes of one array: larger ones are refused before they are read."""

Arrays = Mapping[str, NDArray[Any]]


def canonical(plan: Plan) -> bytes:
    """What makes a plan this plan, the same bytes for the same one: not where it comes from."""
    body = _body(plan, _arrays(plan))
    del body["provenance"], body["model"]["source"]
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def to_bytes(plan: Plan) -> bytes:
    """The content of a plan's file."""
    arrays = _arrays(plan)
    document = {
        "format": "robustdice-plan",
        "version": FORMAT_VERSION,
        "digest": plan.digest,
        "plan": _body(plan, arrays),
        "certificate": plan.certificate and plan.certificate.to_json(),
    }
    text = json.dumps(document, separators=(",", ":")).encode() + b"\n"
    if not arrays:
        return text
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_member(_DOCUMENT), text)
        for name, array in arrays.items():
            archive.writestr(_member(f"{name}.npy"), _npy(array))
    return content.getvalue()


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name)  # with a fixed time: the same plan is the same file


def _npy(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=False)
    return content.getvalue()


def _body(plan: Plan, arrays: Arrays) -> dict[str, Any]:
    """A plan as JSON values; of its arrays, the digests."""
    body = {
        "devices": plan.devices,
        "layers": [asdict(layer) for layer in plan.layers],
        "shards": [[shard_to_json(shard) for shard in shards] for shards in plan.shards],
        "shared_weights": plan.shared_weights,
        "method": plan.method,
        "model": asdict(plan.model),
        "settings": dict(plan.settings),
        "provenance": dict(plan.provenance),
        "wire": plan.wire,
    }
    if plan.coarse:
        body["coarse"] = [
            {"layer": index, "representation": kind, "group": kept.filter.group, "tail": list(kept.tail)}
            for (index, kind), kept in sorted(plan.coarse.items())
        ]
    if plan.activations:
        body["activations"] = [
            {"layer": index, "scale": steps.scale, "zero": steps.zero}
            for index, steps in sorted(plan.activations.items())
        ]
    if plan.pairs:
        body["pairs"] = [[first, second] for first, second in sorted(plan.pairs.items())]
    if plan.owned:
        body["owned"] = sorted(plan.owned)
    if plan.strips:
        body["strips"] = [asdict(run) for run in plan.strips]
    if plan.corrections:
        body["corrections"] = [
            {"failed": sorted(failed), "layers": [index for index, each in enumerate(of_layers) if each is not None]}
            for failed, of_layers in _in_order(plan.corrections)
        ]
    if arrays:
        body["arrays"] = {name: hashlib.sha256(_npy(array)).hexdigest() for name, array in arrays.items()}
    return body


def _in_order(
    corrections: Mapping[FailureSet, tuple[Correction | None, ...]],
) -> list[tuple[FailureSet, tuple[Correction | None, ...]]]:
    return sorted(corrections.items(), key=lambda item: (len(item[0]), sorted(item[0])))


def _arrays(plan: Plan) -> dict[str, NDArray[Any]]:
    """Everything of a plan that is stored as arrays, by name."""
    arrays: dict[str, NDArray[Any]] = {}
    for (index, kind), kept in sorted(plan.coarse.items()):
        prefix = f"coarse/{index}/{kind}"
        for name, each in (
            ("filter", kept.filter),
            *((f"tail/{n}", each) for n, each in enumerate(kept.tail.values())),
        ):
            exact = each.representation == "float16"
            arrays[f"{prefix}/{name}/codes"] = each.codes if exact else pack(each.codes, each.representation)
            arrays[f"{prefix}/{name}/scales"] = each.scales
        arrays[f"{prefix}/shift"] = kept.shift
    for failed, of_layers in _in_order(plan.corrections):
        for index, correction in enumerate(of_layers):
            if correction is not None:
                name = f"corrections/{'-'.join(map(str, sorted(failed)))}/{index}"
                arrays[f"{name}/codes"], arrays[f"{name}/steps"] = correction.codes, correction.steps
    return arrays


def coarse_from(body: Mapping[str, Any], arrays: Arrays) -> dict[tuple[int, str], CoarseLayer]:
    """The coarse weights that a plan's body names; KeyError, TypeError or ValueError when they are none."""
    found: dict[tuple[int, str], CoarseLayer] = {}
    for entry in body.get("coarse", ()):
        index, kind, prefix = int(entry["layer"]), str(entry["representation"]), ""
        prefix = f"coarse/{index}/{kind}"
        weights = int(body["layers"][index]["filter_weights"])
        tail = {
            str(name): _filter(arrays, f"{prefix}/tail/{number}", TAIL_REPRESENTATION, None, None)
            for number, name in enumerate(entry["tail"])
        }
        own = _filter(arrays, f"{prefix}/filter", kind, weights, int(entry["group"]))
        found[index, kind] = CoarseLayer(own, arrays[f"{prefix}/shift"], tail)
    return found


def _filter(arrays: Arrays, prefix: str, kind: str, weights: int | None, group: int | None) -> CoarseFilter:
    stored = arrays[f"{prefix}/codes"]
    weights = stored.shape[1] if weights is None else weights  # eight bits fill their bytes
    codes = stored if kind == "float16" else unpack(stored, kind, weights)
    return CoarseFilter(kind, codes, arrays[f"{prefix}/scales"], group or max(weights, 1))


def activations_from(body: Mapping[str, Any]) -> dict[int, Steps]:
    """The steps of the inputs that a plan's body names; KeyError, TypeError or ValueError when they are none."""
    return {
        int(entry["layer"]): Steps(float(entry["scale"]), int(entry["zero"])) for entry in body.get("activations", ())
    }


def corrections_from(body: Mapping[str, Any], arrays: Arrays) -> dict[FailureSet, tuple[Correction | None, ...]]:
    """The corrections that a plan's body names; KeyError, TypeError or ValueError when they are none."""
    found: dict[FailureSet, tuple[Correction | None, ...]] = {}
    for entry in body.get("corrections", ()):
        failed = [int(device) for device in entry["failed"]]
        name = f"corrections/{'-'.join(map(str, sorted(failed)))}"
        known = {
            int(index): Correction(arrays[f"{name}/{index}/codes"], arrays[f"{name}/{index}/steps"])
            for index in entry["layers"]
        }
        layers = range(len(body["layers"]))
        if not known.keys() <= set(layers):
            raise ValueError(f"corrections of layers {sorted(known)}, the plan has {len(layers)}")
        found[frozenset(failed)] = tuple(map(known.get, layers))
    return found


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """A shard as plans and bundle manifests store it."""
    return {
        "neurons": list(shard.neurons),
        "holders": [[holder.device, holder.representation] for holder in shard.holders],
        **({"parity_of": list(shard.parity_of)} if shard.parity_of else {}),
        **({"after": list(shard.after)} if shard.after else {}),
    }


def shard_from_json(document: Mapping[str, Any]) -> Shard:
    """The inverse of :func:`shard_to_json`; KeyError, TypeError or ValueError when it is not a shard."""
    return Shard(
        neurons=tuple(int(neuron) for neuron in document["neurons"]),
        holders=tuple(Holder(int(device), str(kind)) for device, kind in document["holders"]),
        parity_of=tuple(int(number) for number in document.get("parity_of", ())),
        after=tuple(int(device) for device in document.get("after", ())),
    )


def read_document(path: Path) -> tuple[dict[str, Any], Arrays]:
    """What a plan's file holds, under ``plan``, ``digest`` and so on, and its arrays; PlanError when it is no plan of
    this version."""
    try:
        content = path.read_bytes()
        arrays: dict[str, NDArray[Any]] = {}
        if content[:2] == b"PK":
            content, arrays = _read_zip(io.BytesIO(content))
        document = read_json(content)
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from None
    except (ValueError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        raise PlanError(f"{path} is not a plan (it is not JSON, nor a zip file of JSON and arrays); {REMEDY}") from None
    if not isinstance(document, dict) or document.get("format") != "robustdice-plan":
        raise PlanError(f"{path} is not a plan (no robustdice-plan header); {REMEDY}")
    if document.get("version") != FORMAT_VERSION:
        raise PlanError(
            f"{path} has plan format version {document.get('version')}, this version reads {FORMAT_VERSION}; {REMEDY}"
        )
    return document, arrays


def _read_zip(content: io.BytesIO) -> tuple[bytes, dict[str, NDArray[Any]]]:
    with zipfile.ZipFile(content) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > _ARRAY_LIMIT:
                raise ValueError(f"{member.filename} is compressed or too large")
        arrays = {
            name.removesuffix(".npy"): read_array(archive.read(name))
            for name in archive.namelist()
            if name != _DOCUMENT
        }
        return archive.read(_DOCUMENT), arrays
