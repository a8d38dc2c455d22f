"""A frame's state on one device."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.messages import Array, FrameId, ShardId


class Phase(enum.Enum):
    """Where a frame is within its stage."""

    READY = "ready"  # may be computed
    COMPUTING = "computing"
    WAITING = "waiting"  # own shards are published, others' are missing
    DONE = "done"  # answered or given up; kept so that slower peers can still be helped


@dataclass
class InFlight:
    """One admitted frame. All times are the engine's clock, in seconds."""

    id: FrameId
    manifest: Manifest
    deadline: float
    live: set[int]
    """The frame's view: the devices that it counts on. This device is always among them; it only shrinks."""
    array: Array | None
    """The input; None once stage 0 has been handed to the executor."""
    stage: int = 0
    """Only grows. All earlier stages have been entered; this one too, unless the phase is READY."""
    phase: Phase = Phase.READY
    got: dict[ShardId, Array] = field(default_factory=dict)
    """Shards of this stage and later ones, from whoever came first; own ones only while this device is publisher."""
    sources: dict[ShardId, int] = field(default_factory=dict)
    """For every shard of ``got``, and those that earlier stages were assembled from: the device it came from."""
    own: dict[ShardId, Array] = field(default_factory=dict)
    """Everything computed here, kept until the frame is forgotten, published or not."""
    published: set[ShardId] = field(default_factory=set)
    """Those of ``own`` that all peers have been sent."""
    wanted: dict[ShardId, set[int]] = field(default_factory=dict)
    """Shards that peers asked for, and that are not computed yet."""
    owes: bool = False
    """There may be pieces of an entered stage that have to be computed now: looked at when the executor is free."""
    since: dict[int, float] = field(default_factory=dict)
    """When the waiting for a stage began."""
    nudge_at: float | None = None
    """While WAITING: when to ask the publishers once, before suspecting them."""
    wait_until: float = 0.0
    """While WAITING: when to suspect the publishers of what is missing."""
    rearmed: bool = False
    """The current wait has already been extended because this device itself stood still."""
    extended: bool = False
    """In this stage, a publisher that nobody can stand in for has been given more time."""
    clean: bool = True
    """Nobody left the view during the current wait, so that its length may be learnt from."""

    def publisher(self, shard: ShardId) -> int | None:
        """The first holder in this frame's view."""
        holders = self.manifest.exchanges[shard[0]].shards[shard[1]].devices
        return next((device for device in holders if device in self.live), None)

    def replaceable(self, device: int) -> bool:
        """Whether everything that this stage misses from ``device`` has another holder in this frame's view."""
        exchanges = self.manifest.exchanges
        return all(
            self.live & set(exchanges[e].shards[s].devices) - {device}
            for (e, s), publisher in self.missing().items()
            if publisher == device
        )

    def offer(self, shards: Iterable[tuple[ShardId, Array]], source: int) -> None:
        """Take shards for this stage or later ones; the first copy of each wins."""
        for shard, array in shards:
            if shard not in self.sources:
                self.got[shard] = array
                self.sources[shard] = source

    def shards_of(self, stage: int) -> list[ShardId]:
        """All shards of a stage's exchanges."""
        exchanges = self.manifest.exchanges
        return [(e, s) for e in self.manifest.stages[stage].exchanges for s in range(len(exchanges[e].shards))]

    def missing(self) -> dict[ShardId, int]:
        """What this stage still waits for: shards that have not come, and their live publishers."""
        publishers = {shard: self.publisher(shard) for shard in self.shards_of(self.stage) if shard not in self.sources}
        return {shard: device for shard, device in publishers.items() if device is not None}

    def gather(self, stage: int, me: int) -> dict[ShardId, Array]:
        """Take a finished stage's shards out of ``got``; a spare of our own stands in for what did not come."""
        shards = self.shards_of(stage)
        self.offer(((shard, self.own[shard]) for shard in shards if shard in self.own), me)
        return {shard: self.got.pop(shard) for shard in shards if shard in self.got}

    def pieces_due(self, stage: int, me: int) -> tuple[int, ...]:
        """Pieces of a stage that hold a shard which is neither computed nor anybody else's task."""
        return tuple(
            number
            for number, piece in enumerate(self.manifest.stages[stage].pieces)
            if any(
                shard not in self.own and (self.publisher(shard) == me or shard in self.wanted)
                for shard in piece.shards
            )
        )

    def coverage(self) -> tuple[float, float, tuple[tuple[int, ...], ...]]:
        """Least share of neurons present and largest share from a spare, over the exchanges; and all sources."""
        present, spares, sources = 1.0, 0.0, []
        for number, exchange in enumerate(self.manifest.exchanges):
            origin = tuple(self.sources.get((number, s), -1) for s in range(len(exchange.shards)))
            sizes = [len(shard.neurons) for shard in exchange.shards]
            there = sum(size for size, source in zip(sizes, origin, strict=True) if source >= 0)
            from_spare = sum(
                size
                for size, source, shard in zip(sizes, origin, exchange.shards, strict=True)
                if source not in {-1, shard.devices[0]}
            )
            present, spares = min(present, there / sum(sizes)), max(spares, from_spare / sum(sizes))
            sources.append(origin)
        return present, spares, tuple(sources)


@dataclass
class Early:
    """What peers said about a frame before its client did."""

    since: float
    shards: dict[ShardId, tuple[Array, int]] = field(default_factory=dict)
    wanted: dict[ShardId, set[int]] = field(default_factory=dict)
    passed: set[int] = field(default_factory=set)
    told: bool = False
    """Peers have been told that this device does not know the frame."""
