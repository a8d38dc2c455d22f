"""A plan as one JSON file (docs/formats.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustdice.errors import PlanError
from robustdice.plan.shards import Holder, Shard

if TYPE_CHECKING:
    from robustdice.plan.plan import Plan

FORMAT_VERSION = 3
REMEDY = "make a new one with 'robustdice plan'"


def canonical(plan: Plan) -> bytes:
    """What makes a plan this plan, the same bytes for the same one: not where it comes from."""
    body = body_of(plan)
    del body["provenance"], body["model"]["source"]
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def to_bytes(plan: Plan) -> bytes:
    """The content of a plan's file."""
    document = {"format": "robustdice-plan", "version": FORMAT_VERSION, "digest": plan.digest, "plan": body_of(plan)}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def body_of(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    return {
        "devices": plan.devices,
        "layers": [asdict(layer) for layer in plan.layers],
        "shards": [[shard_to_json(shard) for shard in shards] for shards in plan.shards],
        "shared_weights": plan.shared_weights,
        "method": plan.method,
        "model": asdict(plan.model),
        "settings": dict(plan.settings),
        "provenance": dict(plan.provenance),
    }


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """A shard as plans and bundle manifests store it."""
    return {
        "neurons": list(shard.neurons),
        "holders": [[holder.device, holder.representation] for holder in shard.holders],
        **({"parity_of": list(shard.parity_of)} if shard.parity_of else {}),
    }


def shard_from_json(document: Mapping[str, Any]) -> Shard:
    """The inverse of :func:`shard_to_json`; KeyError, TypeError or ValueError when it is not a shard."""
    return Shard(
        neurons=tuple(int(neuron) for neuron in document["neurons"]),
        holders=tuple(Holder(int(device), str(kind)) for device, kind in document["holders"]),
        parity_of=tuple(int(number) for number in document.get("parity_of", ())),
    )


def read_document(path: Path) -> dict[str, Any]:
    """What a plan's file holds, under ``plan`` and ``digest``; PlanError when it is no plan of this version."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise PlanError(f"{path} is not a plan (it is not JSON); {REMEDY}") from None
    if not isinstance(document, dict) or document.get("format") != "robustdice-plan":
        raise PlanError(f"{path} is not a plan (no robustdice-plan header); {REMEDY}")
    if document.get("version") != FORMAT_VERSION:
        raise PlanError(
            f"{path} has plan format version {document.get('version')}, this version reads {FORMAT_VERSION}; {REMEDY}"
        )
    return document
