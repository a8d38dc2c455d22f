"""What a view settles: while the same devices are up, every frame's exchanges are the same.

Who publishes which shards, who waits for whom, what an answer is computed with: it follows from the plan and the
devices that are up, and is worked out once for each such view, not for each frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from robustdice.bundle.manifest import Manifest, Stage
from robustdice.plan import publishers
from robustdice.runtime.wire.messages import Lineage, ShardId

REMEMBERED_VIEWS = 64
Row = tuple[int, ...]
"""The device that each shard of an exchange came from; -1 where it was missing."""
Holders = tuple[tuple[int | None, ...], ...]
"""For every exchange and shard the first of some devices that holds it, if others do not hand over what is in it."""


@dataclass(frozen=True, eq=False)
class View:
    """The ``devices`` that are up, ascending. ``due`` has for every stage what the device whose manifest it is has from
    each of them, itself included, if anything, in order; ``parcels`` what it makes for itself and others, its own
    first, and ``receivers`` for each of these the other devices that it is for; ``pieces`` are those that it computes
    for that, and ``owned`` the shards among them that it adds up as an owner. ``rows`` has for every exchange where its
    shards come from."""

    devices: tuple[int, ...]
    due: tuple[Mapping[int, tuple[ShardId, ...]], ...]
    awaited: tuple[frozenset[tuple[int, int]], ...]
    """For every stage: it and each device that something is due from."""
    parcels: tuple[tuple[tuple[ShardId, ...], ...], ...]
    receivers: tuple[tuple[tuple[int, ...], ...], ...]
    pieces: tuple[tuple[int, ...], ...]
    owned: tuple[tuple[ShardId, ...], ...]
    rows: tuple[Row, ...]
    had: tuple[Row, ...]
    """The same without sums that others add up."""
    settled: tuple[int, ...]
    """For every stage: whoever enters it knows of all devices, if all are up, that they have entered this one, and so
    have all they need of those before it. None where sums have owners: who stands in for one needs sums of before."""
    down: frozenset[int]
    """The other devices."""
    lineage: Lineage
    """Of all that is built in it."""


class Views:
    """The views of one plan's devices, each worked out once."""

    def __init__(self, manifest: Manifest) -> None:
        """None is known yet."""
        self._manifest = manifest
        self._hot = manifest.spares == "hot"
        self._known: dict[tuple[int, ...], View] = {}
        self._holders: dict[tuple[frozenset[int], frozenset[int]], Holders] = {}

    def prepare(self) -> None:
        """Work out at once the views that most devices will ever be in: all are up, or one is down. A frame would wait
        for it, above all one that is under way when a device dies."""
        everyone = frozenset(range(self._manifest.devices))
        for devices in (everyone, *(everyone - {device} for device in everyone - {self._manifest.device})):
            self.of(tuple(sorted(devices)))
            self.holders(devices)

    def holders(self, devices: frozenset[int], more: frozenset[int] = frozenset()) -> Holders:
        """The first holders among some devices, and of what these do not hold among those and ``more``. Asked for many
        times in every stage that is not straight."""
        if (known := self._holders.get((devices, more))) is not None:
            return known
        if more:
            pairs = zip(self.holders(devices), self.holders(devices | more), strict=True)
            found = tuple(tuple(b if a is None else a for a, b in zip(*rows, strict=True)) for rows in pairs)
        else:
            down = frozenset(range(self._manifest.devices)) - devices
            found = tuple(tuple(s.publisher(down) for s in exchange.shards) for exchange in self._manifest.exchanges)
        if len(self._holders) == REMEMBERED_VIEWS:
            self._holders.clear()
        self._holders[devices, more] = found
        return found

    def of(self, devices: tuple[int, ...]) -> View:
        """The view of some devices, ascending."""
        if (known := self._known.get(devices)) is not None:
            return known
        if len(self._known) == REMEMBERED_VIEWS:
            self._known.clear()
        manifest, me = self._manifest, self._manifest.device
        down = set(range(manifest.devices)) - set(devices)
        published = [publishers(exchange.shards, down) for exchange in manifest.exchanges]
        handed = [_handed(manifest, stage, published) for stage in manifest.stages]
        due = [{source: shards for (source, to), shards in of_stage.items() if to == me} for of_stage in handed]
        sent = [
            {to: shards for (source, to), shards in of_stage.items() if source == me and to != me}
            for of_stage in handed
        ]
        parcels = [
            tuple(dict.fromkeys((*([of_me[me]] if me in of_me else []), *to_others.values())))
            for of_me, to_others in zip(due, sent, strict=True)
        ]
        receivers = [
            tuple(tuple(device for device, mine in to_others.items() if mine == shards) for shards in made)
            for made, to_others in zip(parcels, sent, strict=True)
        ]
        rows = tuple(
            source_row(self._manifest, e, {(e, s): device for s, device in enumerate(row) if device is not None})
            for e, row in enumerate(published)
        )
        mine = [{shard for parcel in made for shard in parcel} for made in parcels]
        pieces = tuple(
            tuple(
                k
                for k, piece in enumerate(stage.pieces)
                if (self._hot and not manifest.is_owners(piece)) or not wanted.isdisjoint(piece.shards)
            )
            for stage, wanted in zip(manifest.stages, mine, strict=True)
        )
        owned = tuple(tuple(sorted(s for s in wanted if s[0] in manifest.sums_of)) for wanted in mine)
        here = {shard: device for of_me in due for device, shards in of_me.items() for shard in shards}
        had = tuple(source_row(manifest, e, here) for e in range(len(published)))
        awaited = tuple(frozenset((stage, device) for device in of_me) for stage, of_me in enumerate(due))
        from_all = [len(of_me) == manifest.devices and not manifest.sums_of for of_me in due]
        shown = [0, *(stage if all_say_so else 0 for stage, all_say_so in enumerate(from_all))]
        settled = tuple(accumulate(shown[:-1], max))
        made = tuple(due), awaited, tuple(parcels), tuple(receivers), pieces, owned
        view = View(devices, *made, rows, had, settled, frozenset(down), Lineage(devices))
        self._known[devices] = view
        return view


def _handed(
    manifest: Manifest, stage: Stage, published: Sequence[Sequence[int | None]]
) -> dict[tuple[int, int], tuple[ShardId, ...]]:
    """What devices hand each other at the end of a stage, by publisher and receiver: all to everybody, themselves
    included; sums to their owners alone, if these add them up."""
    found: dict[tuple[int, int], list[ShardId]] = {}
    for exchange in sorted(stage.exchanges):
        owners = manifest.exchanges[exchange].owners
        for number, source in enumerate(published[exchange]):
            if source is None:
                continue
            owner = None if owners is None else published[owners][number % len(published[owners])]
            for to in range(manifest.devices) if owner is None else (owner,):
                found.setdefault((source, to), []).append((exchange, number))
    return {way: tuple(shards) for way, shards in found.items()}


def source_row(manifest: Manifest, exchange: int, sources: Mapping[ShardId, int]) -> Row:
    """Where an exchange's shards came from: what a parity shard makes up for came from its holder."""
    shards = manifest.exchanges[exchange].shards
    found = [sources.get((exchange, s), -1) for s in range(len(shards))]
    members = shards[-1].parity_of
    if found[-1] >= 0 and [found[m] for m in members].count(-1) == 1:
        found[found.index(-1)] = found[-1]
    return tuple(found)
