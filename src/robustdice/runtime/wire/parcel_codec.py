"""Shards <-> frames of bytes: what devices say to each other many times in every frame.

A header of fixed layout, then the bytes of an array for each exchange that the shards are of, as they lie in memory.
Which shards these are is said only where it is not what the view and the sender imply. What a header says but for the
frame is worked out once for all frames. Decoding believes nothing: whatever is not exactly such a message raises
:class:`MessageError`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.manifest import Manifest
from robustdice.errors import MessageError, OtherBuildError
from robustdice.runtime.parcels import Layout, Layouts, Packed
from robustdice.runtime.protocol.views import Views
from robustdice.runtime.wire.arrays import client_name, raw, raw_shards, shards_of
from robustdice.runtime.wire.messages import PROTOCOL_VERSION, FrameId, Lineage, Parcel, ShardId, Shards

ROUTE = struct.Struct("<2sBB32sHHB7x")
"""Magic, protocol version, flags, plan (the first half of its digest), stage, view (a bit for each device), sender: the
same for every frame."""
FRAME = struct.Struct("<32sQQ")
"""Client, frame number, serial number."""
HEADER_BYTES = ROUTE.size + FRAME.size
MAGIC = b"RD"
"""What a message of shards begins with."""
IN_ONE_VIEW = 1
"""Flag: all was built in the view. Else shares follow where there are exchanges before the stage."""
LISTED = 2
"""Flag: a list of the shards follows."""
LARGEST_NUMBER = 2**53
JOINED_BYTES = 2**15
"""A message that is no longer goes as one frame of bytes."""
REMEMBERED_ROUTES = 4096
REMEMBERED_HEADS = 512
REMEMBERED_FRAMES = 256


class _Expected(NamedTuple):
    """An array that follows, and where, if everything is in one frame of bytes."""

    size: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class _Route(NamedTuple):
    """What the first part of a header says: in what ``view`` everything was built (None: not in one), and which shards
    follow (None: they are listed), in such ``arrays``; ``size`` is that of all if nothing else follows."""

    sender: int
    stage: int
    lineage: Lineage | None
    shards: tuple[ShardId, ...] | None
    layout: Layout | None
    arrays: tuple[_Expected, ...]
    size: int | None


class _Head(NamedTuple):
    """What a message begins with, and what follows: ``arrays`` of such types, in one frame with the rest if they are
    ``joined``."""

    head: bytes
    layout: Layout
    dtypes: tuple[np.dtype[Any], ...]
    joined: bool


class ParcelCodec:
    """Messages of shards of one plan <-> bytes."""

    def __init__(self, plan_digest: str, manifest: Manifest, views: Views) -> None:
        """``manifest`` is that of the device that sends and receives, and ``views`` are what follows from it."""
        self._manifest = manifest
        self._plan = plan_digest[:32].encode().ljust(32, b"\0")
        self._views = views
        self._layouts = Layouts(manifest)
        self._earlier = [sum(len(s.exchanges) for s in manifest.stages[:n]) for n in range(len(manifest.stages))]
        self._differ = [any(manifest.exchanges[e].owners is not None for e in s.exchanges) for s in manifest.stages]
        """Stages in which not everybody is sent the same."""
        self._routes: dict[bytes, _Route] = {}
        self._heads: dict[tuple[Any, ...], _Head] = {}
        """Of what was sent last in a view and stage that began with a shard."""
        self._frames: dict[tuple[bytes, int], FrameId] = {}

    def encode(self, message: Shards) -> list[Any]:
        """The frames of ``message``: bytes-like objects, large arrays not copied where they need not be."""
        sender, serial, frame, stage, (shards, arrays), lineage = message
        key = lineage.view, stage, shards[0]
        known = self._heads.get(key)
        if known is None or known.layout.shards != shards:
            known = self._head(lineage, stage, sender, shards)
            if self._recurs(lineage, stage, known.head[3]):
                if len(self._heads) >= REMEMBERED_HEADS:
                    self._heads.clear()
                self._heads[key] = known
        head, layout, dtypes, joined = known
        blocks = arrays.blocks if isinstance(arrays, Packed) else layout.packed(arrays)
        told = [head, FRAME.pack(frame.client.encode(), frame.number, serial)]
        if head[3] & LISTED:
            told += [struct.pack("<I", len(shards)), raw_shards(shards)]
        if lineage.view is None and lineage.present:
            told.append(np.asarray([lineage.present, lineage.spares], "<f8").tobytes())
        if joined:
            bodies: list[Any] = [*map(np.ascontiguousarray, blocks, dtypes)]
            return [b"".join(told + bodies)]
        return [b"".join(told), *map(raw, blocks, dtypes)]

    def _head(self, lineage: Lineage, stage: int, sender: int, shards: tuple[ShardId, ...]) -> _Head:
        implied = None
        if lineage.view is not None and not self._differ[stage]:
            implied = self._views.of(lineage.view).due[stage].get(sender)
        flags = IN_ONE_VIEW * (lineage.view is not None) | LISTED * (implied != shards)
        mask = sum(1 << device for device in lineage.view or ())
        head = ROUTE.pack(MAGIC, PROTOCOL_VERSION, flags, self._plan, stage, mask, sender)
        layout = self._layouts.of(shards) if self._recurs(lineage, stage, flags) else self._layouts.fresh(shards)
        forms = [block.form for block in layout.blocks]
        joined = sum(form.nbytes for form in forms) <= JOINED_BYTES
        return _Head(head, layout, tuple(np.dtype(form.dtype) for form in forms), joined)

    def _recurs(self, lineage: Lineage | None, stage: int, flags: int) -> bool:
        """Whether such messages come with every frame: those that a view implies, and what owners are sent. There is no
        end of what shards others are of, while devices fail."""
        in_view = lineage is not None and lineage.view is not None
        return in_view and (not flags & LISTED or self._differ[stage])

    def decode(self, parts: Sequence[memoryview], source: int | None) -> Shards:
        """The message in ``parts``; ``source`` is the authenticated device, or None for a client."""
        first = parts[0]
        if len(first) < HEADER_BYTES:
            raise MessageError(f"a header of {len(first)} bytes, expected {HEADER_BYTES}")
        head = bytes(first[: ROUTE.size])
        route = self._routes.get(head) or self._route(head)
        if route.sender != source:
            who = "a client" if source is None else f"device {source}"
            raise MessageError(f"{who} sent Shards of device {route.sender}")
        client, number, serial = FRAME.unpack_from(first, ROUTE.size)
        frame = self._frames.get((client, number)) or self._frame(client, number)
        if serial >= LARGEST_NUMBER:
            raise MessageError(f"serial number {serial}, at most {LARGEST_NUMBER - 1}")
        sender, stage, lineage, shards, layout, expected, size = route
        if len(first) == size and shards is not None and layout is not None and lineage is not None and len(parts) == 1:
            arrays = tuple([np.ndarray(shape, dtype, first, start) for _, dtype, shape, start in expected])
            return Shards(sender, serial, frame, stage, Parcel(shards, Packed(layout, arrays)), lineage)
        rest = _Rest([first[HEADER_BYTES:], *parts[1:]])
        if shards is None or layout is None:
            shards = self._listed(rest, stage, sender)
            recurs = self._recurs(lineage, stage, LISTED)
            layout = self._layouts.of(shards) if recurs else self._layouts.fresh(shards)
            expected = _expected(layout)
        if lineage is None:
            lineage = self._shares(rest, stage)
        arrays = tuple([rest.take(each.size, each.dtype).reshape(each.shape) for each in expected])
        rest.end()
        return Shards(sender, serial, frame, stage, Parcel(shards, Packed(layout, arrays)), lineage)

    def _route(self, head: bytes) -> _Route:
        """Check the first part of a header, and remember what it says."""
        _, version, flags, plan, stage, mask, sender = ROUTE.unpack(head)
        if version != PROTOCOL_VERSION:
            raise OtherBuildError(f"protocol version {version}, expected {PROTOCOL_VERSION}")
        if plan != self._plan:
            raise OtherBuildError(f"plan {plan[:12].decode('ascii', 'replace')}, expected {self._plan[:12].decode()}")
        manifest = self._manifest
        if stage >= len(manifest.stages):
            raise MessageError(f"stage {stage}, the plan has stages 0 to {len(manifest.stages) - 1}")
        if mask >> manifest.devices or flags > IN_ONE_VIEW | LISTED:
            raise MessageError(f"a view of {mask:#b} or flags of {flags:#b}, of a plan for {manifest.devices} devices")
        lineage, shards, layout = None, None, None
        if flags & IN_ONE_VIEW:
            view = self._views.of(tuple(device for device in range(manifest.devices) if mask >> device & 1))
            lineage, shards = view.lineage, view.due[stage].get(sender)
        if flags & LISTED:
            shards = None
        elif shards is None or self._differ[stage]:
            raise MessageError(f"device {sender} publishes nothing in stage {stage} of such a view")
        else:
            layout = self._layouts.of(shards)
        if head != ROUTE.pack(MAGIC, version, flags, plan, stage, mask if flags & IN_ONE_VIEW else 0, sender):
            raise MessageError("a view of what was not built in one, or bytes that mean nothing and are not 0")
        if len(self._routes) == REMEMBERED_ROUTES:
            self._routes.clear()
        expected = _expected(layout) if layout else ()
        size = expected[-1].start + expected[-1].size if expected else None
        route = _Route(sender, stage, lineage, shards, layout, expected, size)
        self._routes[head] = route
        return route

    def _frame(self, client: bytes, number: int) -> FrameId:
        if number >= LARGEST_NUMBER:
            raise MessageError(f"frame number {number}, at most {LARGEST_NUMBER - 1}")
        frame = FrameId(client_name(client.rstrip(b"\0").decode("ascii", "replace")), number)
        if len(self._frames) == REMEMBERED_FRAMES:
            self._frames.clear()
        self._frames[client, number] = frame
        return frame

    def _listed(self, rest: _Rest, stage: int, sender: int) -> tuple[ShardId, ...]:
        """The shards that are listed: their number, then a pair of numbers for each."""
        (count,) = rest.take(4, "<u4")
        most = sum(len(self._manifest.exchanges[e].shards) for e in self._manifest.stages[stage].exchanges)
        if count > most:
            raise MessageError(f"{count} shards of stage {stage}, which has {most}")
        return shards_of(rest.take(8 * int(count), "u1"), stage, self._manifest, sender)

    def _shares(self, rest: _Rest, stage: int) -> Lineage:
        count = self._earlier[stage]
        if not count:
            return Lineage()
        shares = rest.take(16 * count, "<f8").reshape(2, count)
        if not ((shares >= 0) & (shares <= 1)).all():
            raise MessageError("shards that are built on shares beyond 0 to 1")
        present, spares = (tuple(float(share) for share in row) for row in shares)
        return Lineage(None, present, spares)


class _Rest:
    """What follows the first part of a header, whether in the same frame or in frames of their own."""

    def __init__(self, frames: list[Any]) -> None:
        self._frames = [frame for frame in frames if len(frame)]

    def take(self, size: int, kind: Any) -> NDArray[Any]:
        """The next ``size`` bytes, not copied."""
        if not self._frames or len(self._frames[0]) < size:
            left = len(self._frames[0]) if self._frames else 0
            raise MessageError(f"{left} bytes follow where {size} are expected")
        frame = self._frames[0]
        taken = np.frombuffer(frame, kind, size // np.dtype(kind).itemsize)
        if len(frame) == size:
            del self._frames[0]
        else:
            self._frames[0] = memoryview(frame)[size:]
        return taken

    def end(self) -> None:
        """Nothing may be left."""
        if self._frames:
            raise MessageError(f"{sum(map(len, self._frames))} bytes follow the last array")


def _expected(layout: Layout) -> tuple[_Expected, ...]:
    found, start = [], HEADER_BYTES
    for form in (block.form for block in layout.blocks):
        found.append(_Expected(form.nbytes, np.dtype(form.dtype), (1, *form.sent_shape), start))
        start += form.nbytes
    return tuple(found)
