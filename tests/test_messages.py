"""Messages: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import INPUT_SHAPE, make_manifest, make_plan
from robustdice.errors import MessageError
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.messages import (
    Answer,
    Frame,
    FrameId,
    Hello,
    Lineage,
    Message,
    Pass,
    Pulse,
    Refused,
    Shards,
    Status,
    StatusRequest,
    Want,
)

PLAN = make_plan(3)
DEVICE = Codec(PLAN.digest, make_manifest(PLAN, 0))
CLIENT = Codec(PLAN.digest)
ID = FrameId("ab12", 7)


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


TO_DEVICE: list[tuple[Message, int | None]] = [
    (Hello(1, "xyz", True), 1),
    (Frame(ID, 3, 2.5, ones(1, *INPUT_SHAPE)), None),
    (Shards(1, 1, ID, 0, ((0, 1),), (ones(1, 3, 4, 4) * np.nan,)), 1),
    (Shards(1, 2, ID, 1, ((1, 0), (1, 1)), (ones(1, 64), ones(1, 64)), Lineage((0, 1, 2))), 1),
    (Shards(1, 3, ID, 1, ((1, 0),), (ones(1, 64),), Lineage((0, 2))), 1),
    (Shards(1, 4, ID, 0, ((0, 1),), (ones(1, 3, 4, 4),), Lineage(())), 1),
    (Shards(1, 5, ID, 2, ((2, 0),), (ones(1, 4),), Lineage(None, (1.0, 0.1), (0.0, 2 / 3))), 1),
    (Pulse(1, 12.5, None, True, 0, 0, ()), 1),
    (Pulse(2, 12.5, 0.1, False, 7, 9, (ID, FrameId("c", 0)), False), 2),
    (Want(2, ID, 0, ((0, 0),)), 2),
    (Pass(1, ID), 1),
    (StatusRequest("ab"), None),
]
TO_CLIENT: list[tuple[Message, int]] = [
    (Answer(2, ID, ones(10) * -np.inf, 0.5, 0.25, ((0, 1, -1), (), (2,)), (1, 3), (3,), 0.125), 2),
    (Answer(2, ID, ones(10), 1.0, 0.0, ((0, 1),), (), (), 0.125, 0.75), 2),
    (Refused(1, ID, "the window is full"), 1),
    (Status(0, {"a": [1, 2]}), 0),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b, equal_nan=True)) and a.dtype == b.dtype == np.float32
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize(("message", "source"), [*TO_DEVICE, *TO_CLIENT])
def test_round_trip(message: Message, source: int | None) -> None:
    codec = DEVICE if (message, source) in [(m, s) for m, s in TO_DEVICE if m is message] else CLIENT
    decoded = codec.decode([bytes(part) for part in codec.encode(message)], source)
    assert type(decoded) is type(message)
    assert all(same(value, getattr(decoded, key)) for key, value in vars(message).items())


@pytest.mark.parametrize(("message", "source"), TO_DEVICE)
def test_the_authenticated_sender_must_be_the_stated_one(message: Message, source: int | None) -> None:
    parts = DEVICE.encode(message)
    for other in {None, 0, 1, 2} - {source}:
        with pytest.raises(MessageError, match=r"sent a .* of|does not hold"):
            DEVICE.decode(parts, other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"v": 1}, "protocol version 1, expected 2"),
        ({"plan": "0"}, "plan 0, expected"),
        ({"kind": "Order"}, "unknown kind"),
        ({"kind": 3}, "kind is 3"),
        ({"from": 2}, "device 1 sent a Shards of device 2"),
        ({"from": True}, "whole number"),
        ({"stage": 1}, "not of stage 1"),
        ({"stage": 99}, "stages 0 to 3"),
        ({"frame": ["ab"]}, "expected \\[client"),
        ({"frame": ["AB", 1]}, "hexadecimal"),
        ({"frame": ["ab", -1]}, "whole number"),
    ],
)
def test_a_changed_header_is_refused_with_the_reason(change: dict[str, Any], match: str) -> None:
    header, *body = DEVICE.encode(Shards(1, 1, ID, 0, ((0, 1),), (ones(1, 3, 4, 4),)))
    with pytest.raises(MessageError, match=match):
        DEVICE.decode([json.dumps({**json.loads(header), **change}).encode(), *body], 1)


def test_sizes_and_positions_are_checked() -> None:
    header, positions, array = DEVICE.encode(Shards(1, 1, ID, 0, ((0, 1),), (ones(1, 3, 4, 4),)))
    for body, match in [
        ([positions, bytes(array)[:-4]], "expected 192"),
        ([positions, bytes(array) * 2], "expected 192"),
        ([positions], "frames after"),
        ([positions * 2, array, array], "once each"),
        ([b"", array], "at least one"),
        ([positions[:4], array], "at least one"),
        ([np.array([0, 9], "<u4").tobytes(), array], "no shard 9"),
        ([], "at least one"),
    ]:
        with pytest.raises(MessageError, match=match):
            DEVICE.decode([header, *body], 1)
    for parts, match in [
        ([], "without a header"),
        ([b"x" * 70000], "at most"),
        ([b"[" * 60000], "not JSON"),
        ([b"[]"], "not a JSON object"),
    ]:
        with pytest.raises(MessageError, match=match):
            DEVICE.decode(parts, 1)
    with pytest.raises(MessageError, match="arrived at a client"):
        CLIENT.decode([header, positions, array], 1)
    frame = DEVICE.encode(Frame(ID, 0, 0.0, ones(1, *INPUT_SHAPE)))
    with pytest.raises(MessageError, match="timeout"):
        DEVICE.decode(frame, None)


def test_what_shards_are_built_on_is_checked() -> None:
    shares = Lineage(None, (1.0, 0.5), (0.0, 0.25))
    header, positions, told, array = DEVICE.encode(Shards(1, 1, ID, 2, ((2, 0),), (ones(1, 4),), shares))
    for body, match in [
        ([positions, array], "2 float64 for each exchange"),
        ([positions, told[:-8], array], "2 float64 for each exchange"),
        ([positions, told], "0 frames after the header, expected 1"),
        ([positions, np.full(4, 1.5).tobytes(), array], "beyond 0 to 1"),
        ([positions, np.full(4, np.nan).tobytes(), array], "beyond 0 to 1"),
        ([positions], "2 float64 for each exchange"),
    ]:
        with pytest.raises(MessageError, match=match):
            DEVICE.decode([header, *body], 1)
    header, *body = DEVICE.encode(Shards(1, 1, ID, 2, ((2, 0),), (ones(1, 4),), Lineage((0, 1, 2))))
    assert len(body) == 2, "a view needs no frame of its own"
    for view in (8, -1, 1.5, [0]):
        with pytest.raises(MessageError, match="view"):
            DEVICE.decode([json.dumps({**json.loads(header), "view": view}).encode(), *body], 1)


@given(st.lists(st.binary(max_size=200), max_size=4), st.sampled_from([None, 0, 1, 2]))
def test_random_bytes_only_ever_raise_a_message_error(parts: list[bytes], source: int | None) -> None:
    for codec in (DEVICE, CLIENT):
        with pytest.raises(MessageError):
            codec.decode(parts, source)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400)
@given(st.data())
def test_mutated_messages_only_ever_raise_a_message_error(data: st.DataObject) -> None:
    message, source = data.draw(st.sampled_from([*TO_DEVICE, *TO_CLIENT]))
    parts = [bytes(part) for part in DEVICE.encode(message)]
    how = data.draw(st.sampled_from(["flip", "cut", "drop", "swap", "field"]))
    index = data.draw(st.integers(0, len(parts) - 1))
    part = parts[index]
    if how == "flip" and part:
        at = data.draw(st.integers(0, len(part) - 1))
        parts[index] = part[:at] + bytes([part[at] ^ data.draw(st.integers(1, 255))]) + part[at + 1 :]
    elif how == "cut":
        parts[index] = part[: data.draw(st.integers(0, len(part)))]
    elif how == "drop":
        del parts[index]
    elif how == "swap":
        parts[index], parts[0] = parts[0], parts[index]
    else:
        header = json.loads(parts[0])
        header[data.draw(st.sampled_from(sorted(header)))] = data.draw(JSON)
        parts[0] = json.dumps(header).encode()
    for codec in (DEVICE, CLIENT):
        try:
            decoded = codec.decode(parts, source)
        except MessageError:
            continue
        codec.encode(decoded)
