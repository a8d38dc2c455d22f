"""Messages of a simulated world as bytes: with zeros for arrays, by the codecs that devices use."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.messages import Message, Parcel, Shards


def travels(message: Message, sender: Codec, receiver: Codec) -> None:
    """AssertionError unless what is received is what was sent, arrays of the right form included."""
    sent = _with_zeros(message, sender)
    received = receiver.decode(_bytes(sent, sender), sent.sender)  # type: ignore[union-attr]
    if isinstance(sent, Shards):
        assert isinstance(received, Shards)
        assert received[:4] == sent[:4]
        assert received.parcel.shards == sent.parcel.shards
        assert received.lineage == sent.lineage
        for one, other in zip(sent.parcel.arrays, received.parcel.arrays, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
    else:
        assert received == sent


def garbled(message: Message, sender: Codec, draw: random.Random) -> Iterator[list[bytes]]:
    """What may arrive in its place: cut short, with a byte more, with a few bytes changed."""
    parts = _bytes(_with_zeros(message, sender), sender)
    position = draw.randrange(len(parts))
    part = parts[position]
    changed = bytearray(part)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(len(part))] ^= draw.randint(1, 255)
    for wrong in (part[: draw.randrange(len(part))], part + b"\0", bytes(changed)):
        yield [*parts[:position], wrong, *parts[position + 1 :]]
    yield parts[:position]


def _bytes(message: Message, codec: Codec) -> list[bytes]:
    return [bytes(part) for part in codec.encode(message)]


def _with_zeros(message: Message, codec: Codec) -> Message:
    if not isinstance(message, Shards):
        return message
    manifest = codec._manifest
    assert manifest is not None
    shards: Sequence[tuple[int, int]] = message.parcel.shards
    forms = [manifest.exchanges[exchange].form(number) for exchange, number in shards]
    arrays = [np.zeros((1, *form.sent_shape), form.dtype) for form in forms]
    return message._replace(parcel=Parcel(message.parcel.shards, arrays))
