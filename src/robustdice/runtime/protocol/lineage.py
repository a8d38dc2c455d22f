"""What a frame on one device is built on, exchange by exchange, and what that is worth.

Two devices may go on with different inputs: a shard reached one of them and not the other. Whatever the second one
computes from then on is built on less, and so is what others make of it. So every message that carries shards says what
they were built on (:class:`~robustdice.runtime.wire.messages.Lineage`): for every exchange so far the share of its
neurons that is in them, and the share that came from spares. A shard hands both on to what is computed from it, in
proportion to its neurons: after an exchange, what a device holds contains an earlier exchange to the extent that it
took part in it itself, and that the shards which it has just taken contain it on average, whichever is less. Three
shards out of four that contain all of exchange 0 and one that contains a quarter give (3 + 1/4) / 4 of it.

Nearly always everything is built in one view, every shard by its publisher. Then the shares follow from the view and
the plan, and the view is all that is said: a bit mask. An answer's coverage is the least of its shares. What a holder
computed from less than the receiver has is *poor*: another holder's is waited for if there is one, and it is taken in
the end only if that makes the least share no lower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.protocol.sums import Sums
from robustdice.runtime.protocol.views import REMEMBERED_VIEWS, Row, Views, source_row
from robustdice.runtime.wire.messages import Lineage, ShardId

REMEMBERED_COMPARISONS = 256
TOLERANCE = 1e-9
"""Shares that differ by no more are equal: sums of floats in different order."""


class Ancestry:
    """The accounts of one plan's frames."""

    def __init__(self, manifest: Manifest) -> None:
        """For all frames of a device."""
        self._manifest = manifest
        self.sums = Sums(manifest)
        self.views = Views(manifest)
        self._stage_of = {e: number for number, stage in enumerate(manifest.stages) for e in stage.exchanges}
        self.shards_of = [
            tuple((e, s) for e in stage.exchanges for s in range(len(manifest.exchanges[e].shards)))
            for stage in manifest.stages
        ]
        """For every stage, all shards of its exchanges."""
        self._before = [
            tuple(e for earlier in manifest.stages[:number] for e in earlier.exchanges)
            for number in range(len(manifest.stages) + 1)
        ]
        """For every stage, the exchanges that what is computed in it is built on."""
        self._settled: dict[tuple[tuple[int, ...], int], Lineage] = {}
        self.less = lru_cache(REMEMBERED_COMPARISONS)(self._less)
        """Whether of two lineages of things computed in a stage the first is worth less: asked again and again, of the
        shards of a few messages."""

    def stage_of(self, shard: ShardId) -> int:
        """The stage that a shard is computed in."""
        return self._stage_of[shard[0]]

    def shares(self, lineage: Lineage, stage: int) -> Lineage:
        """The same with its shares, of what was computed in ``stage``."""
        if lineage.view is None:
            return lineage
        key, rows = (lineage.view, stage), self.views.of(lineage.view).rows
        if key not in self._settled:
            if len(self._settled) >= REMEMBERED_VIEWS * len(self._manifest.stages):
                self._settled.clear()
            told = [self._told(e, rows[e]) for e in self._before[stage]]
            self._settled[key] = Lineage(None, tuple(p for p, _ in told), tuple(s for _, s in told))
        return self._settled[key]

    def worth(self, lineage: Lineage, stage: int) -> float:
        """The least share of an exchange's neurons that what was computed in ``stage`` is built on."""
        return min(self.shares(lineage, stage).present, default=1.0)

    def _less(self, one: Lineage, other: Lineage, stage: int) -> bool:
        return one != other and self.worth(one, stage) < self.worth(other, stage) - TOLERANCE

    def needs(self, device: int, live: Iterable[int], stage: int) -> bool:
        """Whether an exchange of ``stage`` or a later one has fewer neurons of the devices ``live`` without that."""
        everyone = tuple(sorted(live))
        views = everyone, tuple(d for d in everyone if d != device)
        earlier, last = len(self._before[stage]), len(self._manifest.stages) - 1
        held, left = (self.shares(Lineage(view), last).present[earlier:] for view in views)
        return any(few < many - TOLERANCE for few, many in zip(left, held, strict=True))

    def row(self, exchange: int, sources: Mapping[ShardId, int]) -> Row:
        """Where an exchange's shards came from, as :func:`source_row` says."""
        return source_row(self._manifest, exchange, sources)

    def after(
        self,
        stage: int,
        mine: Lineage,
        live: Iterable[int],
        sources: Mapping[ShardId, int],
        lineages: Mapping[ShardId, Lineage],
        shards: Sequence[ShardId] | None = None,
    ) -> Lineage:
        """What the next stage is built on, where ``mine`` is what this device's part of ``stage`` was built on, and it
        has taken the shards of ``stage`` in ``sources``, which came from those devices and have those ``lineages``, of
        all ``shards`` that it has a use for (all of the stage)."""
        exchanges = self._manifest.stages[stage].exchanges
        if shards is None:
            shards = [(e, s) for e in exchanges for s in range(len(self._manifest.exchanges[e].shards))]
        if not exchanges:
            return mine
        # Whoever goes on in another view than before corrects what it computes for others that are down.
        view = mine.view if mine.view == tuple(sorted(live)) else None
        rows = {e: self.row(e, sources) for e in exchanges}
        taken = [(e, s) for e in exchanges for s in range(len(rows[e])) if (e, s) in sources]
        if view is not None and all(lineages[shard] == mine for shard in taken):
            settled = self.views.of(view).rows
            if all(
                self._neurons_from(e, rows[e], shards) == self._neurons_from(e, settled[e], shards) for e in exchanges
            ):
                return Lineage(view)
        shares = self.shares(mine, stage)
        present, spares = list(shares.present), list(shares.spares)
        for exchange in exchanges:
            parts = self._parts(exchange, stage, rows[exchange], sources, lineages)
            sizes = [size for size, _ in parts]
            for k in range(len(self._before[stage]) if parts else 0):
                present[k] = min(present[k], _mean(sizes, [part.present[k] for _, part in parts]))
                spares[k] = max(spares[k], _mean(sizes, [part.spares[k] for _, part in parts]))
        used = {exchange for exchange, _ in shards}  # of what is of no use here, nothing is missing
        told = [self._told(e, rows[e], shards) if e in used else (1.0, 0.0) for e in exchanges]
        return Lineage(None, (*present, *(p for p, _ in told)), (*spares, *(s for _, s in told)))

    def _parts(
        self,
        exchange: int,
        stage: int,
        row: Row,
        sources: Mapping[ShardId, int],
        lineages: Mapping[ShardId, Lineage],
    ) -> list[tuple[int, Lineage]]:
        """Of the shards that were taken: neurons, and shares. What parity makes up for is as good as the worst of what
        it is worked out from."""
        shards = self._manifest.exchanges[exchange].shards
        had = {s: self.shares(lineages[exchange, s], stage) for s in range(len(row)) if (exchange, s) in sources}
        parts = [(len(shards[s].neurons), had[s]) for s in had if shards[s].neurons]
        for s in range(len(row)):
            if row[s] >= 0 and s not in had:
                present = tuple(map(min, zip(*(lineage.present for lineage in had.values()), strict=True)))
                spares = tuple(map(max, zip(*(lineage.spares for lineage in had.values()), strict=True)))
                parts.append((len(shards[s].neurons), Lineage(None, present, spares)))
        return parts

    def _told(self, exchange: int, row: Row, shards: Sequence[ShardId] | None = None) -> tuple[float, float]:
        """The shares of an exchange's neurons that are there, and that came from a spare: in each slice that is among
        the ``shards`` (None: all), of several the least, and the largest."""
        spec = self._manifest.exchanges[exchange]
        present, spares = 1.0, 0.0
        for numbers in spec.in_slices:
            if shards is not None and (exchange, numbers[0]) not in shards:
                continue
            came = [(spec.shards[s], row[s]) for s in numbers if row[s] >= 0]
            there = sum(len(shard.neurons) for shard, _ in came)
            spare = sum(len(shard.neurons) for shard, source in came if shard.after or source != shard.devices[0])
            present, spares = min(present, there / spec.neurons), max(spares, spare / spec.neurons)
        return present, spares

    def _neurons_from(self, exchange: int, row: Row, wanted: Sequence[ShardId]) -> Row:
        shards = self._manifest.exchanges[exchange].shards
        return tuple(row[s] for e, s in wanted if e == exchange and shards[s].neurons)


def _mean(sizes: Sequence[int], shares: Sequence[float]) -> float:
    """Exactly the share where all are the same."""
    least = min(shares)
    return least + sum(size * (share - least) for size, share in zip(sizes, shares, strict=True)) / sum(sizes)
