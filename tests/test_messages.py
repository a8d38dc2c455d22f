"""Messages: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import gc
import itertools
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import INPUT_SHAPE, make_manifest, make_plan
from robustdice.errors import MessageError
from robustdice.plan import Holder, Shard
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.messages import (
    Answer,
    Frame,
    FrameId,
    Hello,
    Lineage,
    Mark,
    Message,
    Parcel,
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
    (Shards(1, 1, ID, 0, Parcel(((0, 1),), (ones(1, 3, 4, 4) * np.nan,))), 1),
    (Shards(1, 2, ID, 1, Parcel(((1, 0), (1, 1)), (ones(1, 64), ones(1, 64))), Lineage((0, 1, 2))), 1),
    (Shards(1, 3, ID, 1, Parcel(((1, 1),), (ones(1, 64),)), Lineage((0, 1, 2))), 1),
    (Shards(1, 4, ID, 1, Parcel(((1, 0),), (ones(1, 64),)), Lineage((0, 2))), 1),
    (Shards(1, 5, ID, 0, Parcel(((0, 1),), (ones(1, 3, 4, 4),)), Lineage(())), 1),
    (Shards(1, 6, ID, 2, Parcel(((2, 0),), (ones(1, 4),)), Lineage(None, (1.0, 0.1), (0.0, 2 / 3))), 1),
    (Pulse(1, 12.5, None, True, 0, 0, ()), 1),
    (Pulse(2, 12.5, 0.1, False, 7, 9, (ID, FrameId("c", 0)), False), 2),
    (Want(2, ID, 0, ((0, 0),)), 2),
    (Mark(2, 17), 2),
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
    if isinstance(a, Parcel):
        return a.shards == b.shards and same(tuple(a.arrays), tuple(b.arrays))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize(("message", "source"), [*TO_DEVICE, *TO_CLIENT])
def test_round_trip(message: Message, source: int | None) -> None:
    codec = DEVICE if (message, source) in [(m, s) for m, s in TO_DEVICE if m is message] else CLIENT
    decoded = codec.decode([bytes(part) for part in codec.encode(message)], source)
    assert type(decoded) is type(message)
    fields = message._asdict() if isinstance(message, Shards) else vars(message)
    assert all(same(value, getattr(decoded, key)) for key, value in fields.items())


@pytest.mark.parametrize(("message", "source"), TO_DEVICE)
def test_the_authenticated_sender_must_be_the_stated_one(message: Message, source: int | None) -> None:
    parts = DEVICE.encode(message)
    for other in {None, 0, 1, 2} - {source}:
        with pytest.raises(MessageError, match=r"sent (a )?.* of|does not hold"):
            DEVICE.decode(parts, other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"v": 1}, "protocol version 1, expected 3"),
        ({"plan": "0"}, "plan 0, expected"),
        ({"kind": "Order"}, "unknown kind"),
        ({"kind": 3}, "kind is 3"),
        ({"from": 2}, "device 1 sent a Want of device 2"),
        ({"from": True}, "whole number"),
        ({"stage": 1}, "not of stage 1"),
        ({"stage": 99}, "stages 0 to 3"),
        ({"frame": ["ab"]}, "expected \\[client"),
        ({"frame": ["AB", 1]}, "hexadecimal"),
        ({"frame": ["ab", -1]}, "whole number"),
    ],
)
def test_a_changed_header_is_refused_with_the_reason(change: dict[str, Any], match: str) -> None:
    header, *body = DEVICE.encode(Want(1, ID, 0, ((0, 0),)))
    with pytest.raises(MessageError, match=match):
        DEVICE.decode([json.dumps({**json.loads(header), **change}).encode(), *body], 1)


def test_sizes_and_positions_are_checked() -> None:
    header, positions = DEVICE.encode(Want(1, ID, 0, ((0, 0),)))
    for body, match in [
        ([positions * 2], "once each"),
        ([b""], "at least one"),
        ([positions[:4]], "at least one"),
        ([np.array([0, 9], "<u4").tobytes()], "no shard 9"),
        ([], "0 frames after"),
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
    frame = DEVICE.encode(Frame(ID, 0, 0.0, ones(1, *INPUT_SHAPE)))
    with pytest.raises(MessageError, match="timeout"):
        DEVICE.decode(frame, None)


IN_A_VIEW = Shards(1, 1, ID, 1, Parcel(((1, 1),), (ones(1, 64),)), Lineage((0, 1, 2)))
LISTED = Shards(1, 1, ID, 2, Parcel(((2, 0),), (ones(1, 4),)), Lineage(None, (1.0, 0.5), (0.0, 0.25)))
HEADER = 96


def test_shards_that_the_view_implies_are_not_listed_nor_what_they_are_built_on() -> None:
    assert [len(part) for part in DEVICE.encode(IN_A_VIEW)] == [HEADER + 4 * 64]
    assert [len(part) for part in DEVICE.encode(LISTED)] == [HEADER + 4 + 8 + 2 * 16 + 4 * 4]


def test_large_arrays_are_frames_of_their_own() -> None:
    plan = make_plan(2, holders=1)
    layer = make_manifest(plan, 0).exchanges[0]
    manifest = replace(make_manifest(plan, 0), exchanges=(replace(layer, shape=(layer.shape[0], 64, 64)),))
    manifest = replace(manifest, stages=(manifest.stages[0], replace(manifest.stages[-1], pieces=())))
    codec = Codec(plan.digest, manifest)
    array = np.arange(layer.shape[0] // 2 * 64 * 64, dtype=np.float32).reshape(1, -1, 64, 64)
    parts = codec.encode(Shards(1, 1, ID, 0, Parcel(((0, 1),), (array,)), Lineage((0, 1))))
    assert [len(part) for part in parts] == [HEADER, array.nbytes]
    (decoded,) = codec.decode([bytes(part) for part in parts], 1).parcel.arrays  # type: ignore[union-attr]
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize(
    ("message", "at", "value", "match"),
    [
        (IN_A_VIEW, 2, b"\x02", "protocol version 2, expected 3"),
        (IN_A_VIEW, 3, b"\x10", "flags of 0b10000"),
        (IN_A_VIEW, 3, b"\x00", "publishes nothing in stage 1 of such a view"),
        (IN_A_VIEW, 4, b"xx", "plan xx"),
        (IN_A_VIEW, 36, b"\x09\x00", "stages 0 to 3"),
        (IN_A_VIEW, 38, b"\x09\x00", "a view of 0b1001"),
        (IN_A_VIEW, 38, b"\x05\x00", "publishes nothing"),
        (IN_A_VIEW, 41, b"\x01", "bytes that mean nothing"),
        (IN_A_VIEW, 40, b"\x02", "device 1 sent Shards of device 2"),
        (IN_A_VIEW, 48, b"AB", "hexadecimal"),
        (IN_A_VIEW, 48, b"\xff", "hexadecimal"),
        (IN_A_VIEW, 80, b"\xff" * 8, "frame number"),
        (IN_A_VIEW, 88, b"\xff" * 8, "serial number"),
        (LISTED, 38, b"\x05", "a view of what was not built in one"),
        (LISTED, HEADER, b"\x09", "9 shards of stage 2"),
        (LISTED, HEADER, b"\x00", "at least one"),
        (LISTED, HEADER + 4, b"\x01", "not of stage 2"),
        (LISTED, HEADER + 8, b"\x09", "no shard 9"),
        (LISTED, HEADER + 12, np.float64(1.5).tobytes(), "beyond 0 to 1"),
        (LISTED, HEADER + 12, np.float64(np.nan).tobytes(), "beyond 0 to 1"),
    ],
)
def test_changed_shards_are_refused_with_the_reason(message: Shards, at: int, value: bytes, match: str) -> None:
    (whole,) = DEVICE.encode(message)
    with pytest.raises(MessageError, match=match):
        DEVICE.decode([whole[:at] + value + whole[at + len(value) :]], 1)


def test_shards_of_another_size_are_refused() -> None:
    for message in (IN_A_VIEW, LISTED):
        (whole,) = DEVICE.encode(message)
        for parts, match in [
            ([whole[:-4]], "bytes follow where"),
            ([whole + b"abcd"], "4 bytes follow the last array"),
            ([whole, b"abcd"], "4 bytes follow the last array"),
            ([whole[: HEADER - 1]], "a header of 95 bytes"),
        ]:
            with pytest.raises(MessageError, match=match):
                DEVICE.decode(parts, 1)
    with pytest.raises(MessageError, match="arrived at a client"):
        CLIENT.decode(DEVICE.encode(IN_A_VIEW), 1)


def test_whatever_shards_a_peer_lists_little_is_remembered_of_them() -> None:
    """A device that holds eight shards of a wide layer can list them in 255 ways."""
    shards = tuple(Shard(tuple(range(k, 512, 8)), (Holder(1),)) for k in range(8))
    plan, manifest = make_plan(2), make_manifest(make_plan(2), 0)
    wide = replace(manifest.exchanges[0], shape=(512 * 49,), features=49, shards=shards)
    codec = Codec(plan.digest, replace(manifest, exchanges=(wide, *manifest.exchanges[1:])))
    whole = codec.encode(Shards(1, 1, ID, 0, Parcel(((0, 0),), (ones(1, 64 * 49),)), Lineage(())))[0][:HEADER]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for size in range(1, 8):
        for some in itertools.combinations(range(8), size):
            listed = np.array([(0, number) for number in some], "<u4").tobytes()
            codec.decode([whole + np.uint32(size).tobytes() + listed, bytes(4 * 64 * 49 * size)], 1)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 2**20


@pytest.mark.parametrize("view", [None, (0, 1)])
def test_while_devices_fail_nothing_adds_up_of_what_messages_are_of(view: tuple[int, ...] | None) -> None:
    """Every fault finds frames in a stage of their own, with other shards of it missing."""
    manifest = make_manifest(make_plan(2), 0)
    small = replace(
        manifest.exchanges[1], shape=(10,), features=1, shards=tuple(Shard((k,), (Holder(1),)) for k in range(10))
    )
    codec = Codec(PLAN.digest, replace(manifest, exchanges=(manifest.exchanges[0], small, *manifest.exchanges[2:])))
    lineage = Lineage(None, (1.0,), (0.5,)) if view is None else Lineage(view)
    array, sizes = ones(1, 1), []
    tracemalloc.start()
    for first in (1, 2):
        for number in range(first, 1024, 2):
            some = tuple((1, k) for k in range(10) if number >> k & 1)
            message = Shards(1, number, FrameId("ab", number), 1, Parcel(some, (array,) * len(some)), lineage)
            assert codec.decode(codec.encode(message), 1).frame.number == number  # type: ignore[union-attr]
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 2**15


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
    ways = ["flip", "cut", "drop", "swap"] + ["field"] * (not isinstance(message, Shards))
    how = data.draw(st.sampled_from(ways))
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
