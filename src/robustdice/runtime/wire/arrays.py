"""Arrays, numbers and shards <-> the frames of a message."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from robustdice.bundle.manifest import Manifest
from robustdice.errors import MessageError
from robustdice.runtime.wire.messages import HEADER_LIMIT, OUTPUTS_LIMIT, Array, ShardId


def raw(array: Any, kind: Any = "<f4") -> memoryview:
    """An array's bytes, not copied where they need not be."""
    contiguous: Any = np.ascontiguousarray(array, kind)
    return memoryview(contiguous).cast("B")


def array_of(frame: Any, shape: tuple[int, ...] | None) -> Array:
    """``frame`` as float32 of ``shape`` (None: one axis, up to a limit), read-only, not copied."""
    size = len(frame)
    if shape is None:
        if size % 4 or not 0 < size <= 4 * OUTPUTS_LIMIT:
            raise MessageError(f"an array of {size} bytes, expected 1 to {OUTPUTS_LIMIT} float32")
        shape = (size // 4,)
    elif size != (expected := 4 * math.prod(shape)):
        raise MessageError(f"an array of {size} bytes, expected {expected} for shape {shape}")
    array = np.frombuffer(frame, "<f4").reshape(shape)
    array.flags.writeable = False
    return array


def integers(frame: Any, kind: str) -> list[int]:
    """A frame of whole numbers."""
    if len(frame) % np.dtype(kind).itemsize or len(frame) > HEADER_LIMIT * 16:
        raise MessageError(f"a list of numbers of {len(frame)} bytes")
    return [int(value) for value in np.frombuffer(frame, kind)]


def raw_shards(shards: Sequence[ShardId]) -> bytes:
    """A list of shards."""
    return np.asarray(shards, "<u4").tobytes()


def shards_of(frame: Any, stage: int, manifest: Manifest, holder: int) -> tuple[ShardId, ...]:
    """Shards of a stage that a device holds."""
    if stage >= len(manifest.stages):
        raise MessageError(f"stage {stage}, the plan has stages 0 to {len(manifest.stages) - 1}")
    flat = integers(frame, "<u4")
    shards = tuple(zip(flat[::2], flat[1::2], strict=False))
    if not shards or len(flat) % 2 or any(a >= b for a, b in itertools.pairwise(shards)):
        raise MessageError("shards must be listed once each, in order, at least one")
    for exchange, shard in shards:
        if exchange not in manifest.stages[stage].exchanges:
            raise MessageError(f"exchange {exchange} is not of stage {stage}")
        if shard >= len(manifest.exchanges[exchange].shards):
            raise MessageError(f"exchange {exchange} has no shard {shard}")
        if holder not in manifest.exchanges[exchange].shards[shard].devices:
            raise MessageError(f"device {holder} does not hold shard {shard} of exchange {exchange}")
    return shards


def client_name(value: object) -> str:
    """A client's name: hexadecimal digits."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{1,32}", value):
        raise MessageError(f"client is {repr(value)[:40]}, expected up to 32 hexadecimal digits")
    return value
