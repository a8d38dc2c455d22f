"""Messages <-> frames of bytes.

A message is a JSON header of at most 64 KiB followed by raw frames (float32, little-endian, C order); but for those of
shards, which :mod:`robustdice.runtime.wire.parcel_codec` has. Every header carries the protocol version, the plan's
digest and the kind. Decoding believes nothing: whatever is not exactly a message of this cluster raises
:class:`MessageError` with the reason. docs/formats.md describes the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from robustdice.bundle.manifest import Manifest
from robustdice.errors import MessageError, OtherBuildError
from robustdice.files import read_json
from robustdice.runtime.protocol.views import Views
from robustdice.runtime.wire.arrays import array_of, client_name, integers, raw, raw_shards, shards_of
from robustdice.runtime.wire.messages import (
    DOCUMENT_LIMIT,
    HEADER_LIMIT,
    MAX_TIMEOUT_SECONDS,
    PROTOCOL_VERSION,
    Answer,
    Frame,
    FrameId,
    Hello,
    Mark,
    Message,
    Pass,
    Pulse,
    Refused,
    Shards,
    Status,
    StatusRequest,
    Want,
)
from robustdice.runtime.wire.parcel_codec import MAGIC, ParcelCodec


class Codec:
    """Messages of one plan <-> bytes. With a ``manifest`` (a device) shapes are checked against it; without one
    (a client) only replies can be decoded."""

    def __init__(self, plan_digest: str, manifest: Manifest | None = None, views: Views | None = None) -> None:
        """A codec for messages of the plan with this digest. ``views`` are the manifest's, where somebody else works
        them out as well."""
        self._plan = plan_digest
        self._manifest = manifest
        exchanges = manifest.exchanges if manifest else ()
        # The largest is a parcel of all shards of an exchange.
        sizes = [sum(e.form(number).nbytes for number in range(len(e.shards))) for e in exchanges]
        if manifest:
            self._parcels = ParcelCodec(plan_digest, manifest, views or Views(manifest))
        self.input_bytes = 4 * math.prod(manifest.input_shape) if manifest else 0
        """Of a client's frame."""
        self.frame_limit = max([DOCUMENT_LIMIT, HEADER_LIMIT, self.input_bytes, *sizes])
        """Bytes that no frame of a message of this plan exceeds."""

    def encode(self, message: Message) -> list[Any]:
        """The frames of ``message``: bytes-like objects, arrays not copied where they need not be."""
        if isinstance(message, Shards):
            return self._parcels.encode(message)
        kind = type(message).__name__
        header: dict[str, Any] = {"v": PROTOCOL_VERSION, "plan": self._plan, "kind": kind}
        body: list[Any] = []
        if not isinstance(message, Frame | StatusRequest):
            header["from"] = message.sender
        if isinstance(message, Frame | Want | Pass | Answer | Refused):
            header["frame"] = [message.frame.client, message.frame.number]
        if isinstance(message, Hello):
            header.update(incarnation=message.incarnation, reply=int(message.reply))
        elif isinstance(message, Pulse | Mark):
            header |= _of_contact(message)
        elif isinstance(message, Frame):
            header.update(oldest=message.oldest, timeout=message.timeout_seconds)
            body = [raw(message.array)]
        elif isinstance(message, Want):
            header["stage"] = message.stage
            body = [raw_shards(message.shards)]
        elif isinstance(message, Answer):
            header.update(coverage=message.coverage, spares=message.from_spares, down=message.down)
            header.update(late=message.late, seconds=message.seconds)
            if message.expected is not None:
                header["expected"] = message.expected
            flat = [source for sources in message.sources for source in sources]
            counts = [len(sources) for sources in message.sources]
            body = [raw(message.outputs), np.asarray(flat, "i1").tobytes(), np.asarray(counts, "<u4").tobytes()]
        elif isinstance(message, Refused):
            header["reason"] = message.reason[:500]
        elif isinstance(message, StatusRequest):
            header["client"] = message.client
        elif isinstance(message, Status):
            body = [json.dumps(message.document).encode()]
        return [json.dumps(header, separators=(",", ":")).encode(), *body]

    def decode(self, parts: Sequence[Any], source: int | None) -> Message:
        """The message in ``parts`` (of bytes); ``source`` is the authenticated device, or None for a client."""
        if not parts:
            raise MessageError("a message without a header")
        parts = [memoryview(part) for part in parts]
        if parts[0][:2] == MAGIC:
            if self._manifest is None:
                raise MessageError("shards arrived at a client")
            return self._parcels.decode(parts, source)
        header = _Header(parts[0], self._plan)
        decoder = _DECODERS.get(header.text("kind", 20))
        if decoder is None:
            raise MessageError(f"a message of unknown kind {header.text('kind', 20)!r}")
        message = decoder(self, header, parts[1:])
        sender = None if isinstance(message, Frame | StatusRequest) else message.sender
        if sender != source:
            raise MessageError(f"{_who(source)} sent a {type(message).__name__} of {_who(sender)}")
        return message

    def _hello(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 0)
        return Hello(header.device(), header.text("incarnation", 64), header.whole("reply") > 0)

    def _frame(self, header: _Header, body: Sequence[Any]) -> Message:
        manifest = self._known()
        _count(body, 1)
        oldest, timeout = header.whole("oldest"), header.number("timeout")
        if not 0 < timeout <= MAX_TIMEOUT_SECONDS:
            raise MessageError(f"a timeout of {timeout} s, expected more than 0, at most {MAX_TIMEOUT_SECONDS} s")
        return Frame(header.frame(), oldest, timeout, array_of(body[0], (1, *manifest.input_shape)))

    def _pulse(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 0)
        clock, echo = header.number("clock"), None if header.is_null("echo") else header.number("echo")
        reply, sent, got = header.whole("reply") > 0, header.whole("sent"), header.whole("got")
        hears = header.whole("hears") > 0
        return Pulse(header.device(), clock, echo, reply, sent, got, header.frames("owes", 64), hears)

    def _mark(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 0)
        return Mark(header.device(), header.whole("serial"))

    def _want(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 1)
        holder = self._known().device
        stage = header.whole("stage")
        return Want(header.device(), header.frame(), stage, shards_of(body[0], stage, self._known(), holder))

    def _pass(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 0)
        return Pass(header.device(), header.frame())

    def _answer(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 3)
        outputs = array_of(body[0], None)
        flat, counts = integers(body[1], "i1"), integers(body[2], "<u4")
        if sum(counts) != len(flat) or any(source < -1 for source in flat):
            raise MessageError("an answer whose sources contradict each other")
        sources, start = [], 0
        for count in counts:
            sources.append(tuple(flat[start : start + count]))
            start += count
        coverage, spares = header.number("coverage"), header.number("spares")
        if not (0 <= coverage <= 1 and 0 <= spares <= 1):
            raise MessageError(f"a coverage of {coverage}, expected 0 to 1")
        down, late, seconds = header.wholes("down", 64), header.wholes("late", 64), header.number("seconds")
        expected = header.number("expected") if header.has("expected") else None
        if not (expected is None or 0 <= expected <= 1):
            raise MessageError(f"an expected accuracy of {expected}, expected 0 to 1")
        told = (outputs, coverage, spares, tuple(sources), down, late, seconds, expected)
        return Answer(header.device(), header.frame(), *told)

    def _refused(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 0)
        return Refused(header.device(), header.frame(), header.text("reason", 500))

    def _status_request(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 0)
        return StatusRequest(header.name("client"))

    def _status(self, header: _Header, body: Sequence[Any]) -> Message:
        _count(body, 1)
        return Status(header.device(), _json_object(body[0], DOCUMENT_LIMIT))

    def _known(self) -> Manifest:
        if self._manifest is None:
            raise MessageError("a message for devices arrived at a client")
        return self._manifest


def _of_contact(message: Pulse | Mark) -> dict[str, Any]:
    if isinstance(message, Mark):
        return {"serial": message.serial}
    said = {"clock": message.clock, "echo": message.echo, "reply": int(message.reply), "sent": message.sent}
    owes = [[frame.client, frame.number] for frame in message.owes]
    return said | {"got": message.got, "hears": int(message.hears), "owes": owes}


_DECODERS = {
    "Hello": Codec._hello,
    "Pulse": Codec._pulse,
    "Mark": Codec._mark,
    "Frame": Codec._frame,
    "Want": Codec._want,
    "Pass": Codec._pass,
    "Answer": Codec._answer,
    "Refused": Codec._refused,
    "StatusRequest": Codec._status_request,
    "Status": Codec._status,
}


class _Header:
    """A parsed header; every accessor raises MessageError when the field is not what it should be."""

    def __init__(self, raw: Any, plan: str) -> None:
        self._fields = _json_object(raw, HEADER_LIMIT)
        if self._fields.get("v") != PROTOCOL_VERSION:
            raise OtherBuildError(f"protocol version {_short(self._fields.get('v'))}, expected {PROTOCOL_VERSION}")
        if self._fields.get("plan") != plan:
            raise OtherBuildError(f"plan {str(self._fields.get('plan'))[:12]}, expected {plan[:12]}")

    def whole(self, key: str) -> int:
        return _whole(self._fields.get(key), key)

    def wholes(self, key: str, limit: int) -> tuple[int, ...]:
        values = self._fields.get(key)
        if not isinstance(values, list) or len(values) > limit:
            raise MessageError(f"{key} is {_short(values)}, expected a list of at most {limit} numbers")
        return tuple(_whole(value, key) for value in values)

    def has(self, key: str) -> bool:
        return key in self._fields

    def number(self, key: str) -> float:
        value = self._fields.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
            raise MessageError(f"{key} is {_short(value)}, expected a number")
        return float(value)

    def text(self, key: str, limit: int) -> str:
        value = self._fields.get(key)
        if not isinstance(value, str) or len(value) > limit:
            raise MessageError(f"{key} is {_short(value)}, expected a text of at most {limit} characters")
        return value

    def name(self, key: str) -> str:
        return client_name(self._fields.get(key))

    def device(self) -> int:
        return self.whole("from")

    def frame(self) -> FrameId:
        return _frame_id(self._fields.get("frame"))

    def frames(self, key: str, limit: int) -> tuple[FrameId, ...]:
        values = self._fields.get(key)
        if not isinstance(values, list) or len(values) > limit:
            raise MessageError(f"{key} is {_short(values)}, expected a list of at most {limit} frames")
        return tuple(map(_frame_id, values))

    def is_null(self, key: str) -> bool:
        return key in self._fields and self._fields[key] is None


def _frame_id(value: object) -> FrameId:
    if not isinstance(value, list) or len(value) != 2:
        raise MessageError(f"frame is {_short(value)}, expected [client, number]")
    return FrameId(client_name(value[0]), _whole(value[1], "frame number"))


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise MessageError(f"{what} is {_short(value)}, expected a whole number")
    return value


def _json_object(raw: Any, limit: int) -> dict[str, Any]:
    if len(raw) > limit:
        raise MessageError(f"{len(raw)} bytes of JSON, at most {limit} are accepted")
    try:
        document = read_json(bytes(raw))
    except ValueError:
        raise MessageError("a header that is not JSON") from None
    if not isinstance(document, dict):
        raise MessageError("a header that is not a JSON object")
    return document


def _count(body: Sequence[Any], expected: int) -> None:
    if len(body) != expected:
        raise MessageError(f"{len(body)} frames after the header, expected {expected}")


def _who(device: int | None) -> str:
    return "a client" if device is None else f"device {device}"


def _short(value: object) -> str:
    return repr(value)[:40]
