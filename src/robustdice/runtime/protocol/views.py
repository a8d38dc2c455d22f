"""What a view settles: while the same devices are up, every frame's exchanges are the same.

Who publishes which shards, who waits for whom, what an answer is computed with: it follows from the plan and the
devices that are up, and is worked out once for each such view, not for each frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from robustdice.bundle.manifest import Manifest
from robustdice.plan import publishers
from robustdice.runtime.wire.messages import Lineage, ShardId

REMEMBERED_VIEWS = 64
Row = tuple[int, ...]
"""The device that each shard of an exchange came from; -1 where it was missing."""


@dataclass(frozen=True, eq=False)
class View:
    """The ``devices`` that are up, ascending. ``due`` has for every stage what each of them publishes, if anything, in
    order, ``pieces`` which pieces the device whose manifest it is computes for that; ``rows`` for every exchange where
    its shards come from."""

    devices: tuple[int, ...]
    due: tuple[Mapping[int, tuple[ShardId, ...]], ...]
    pieces: tuple[tuple[int, ...], ...]
    rows: tuple[Row, ...]
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

    def of(self, devices: tuple[int, ...]) -> View:
        """The view of some devices, ascending."""
        if (known := self._known.get(devices)) is not None:
            return known
        if len(self._known) == REMEMBERED_VIEWS:
            self._known.clear()
        down = set(range(self._manifest.devices)) - set(devices)
        published = [publishers(exchange.shards, down) for exchange in self._manifest.exchanges]
        due: list[dict[int, tuple[ShardId, ...]]] = []
        for stage in self._manifest.stages:
            of_stage: dict[int, tuple[ShardId, ...]] = {}
            for exchange in sorted(stage.exchanges):
                for number, device in enumerate(published[exchange]):
                    if device is not None:
                        of_stage[device] = (*of_stage.get(device, ()), (exchange, number))
            due.append(of_stage)
        rows = tuple(
            source_row(self._manifest, e, {(e, s): device for s, device in enumerate(row) if device is not None})
            for e, row in enumerate(published)
        )
        mine = [set(of_stage.get(self._manifest.device, ())) for of_stage in due]
        pieces = tuple(
            tuple(k for k, piece in enumerate(stage.pieces) if self._hot or not wanted.isdisjoint(piece.shards))
            for stage, wanted in zip(self._manifest.stages, mine, strict=True)
        )
        view = View(devices, tuple(due), pieces, rows, frozenset(down), Lineage(devices))
        self._known[devices] = view
        return view


def source_row(manifest: Manifest, exchange: int, sources: Mapping[ShardId, int]) -> Row:
    """Where an exchange's shards came from: what a parity shard makes up for came from its holder."""
    shards = manifest.exchanges[exchange].shards
    found = [sources.get((exchange, s), -1) for s in range(len(shards))]
    members = shards[-1].parity_of
    if found[-1] >= 0 and [found[m] for m in members].count(-1) == 1:
        found[found.index(-1)] = found[-1]
    return tuple(found)
