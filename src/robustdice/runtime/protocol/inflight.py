"""A frame's state on one device."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from robustdice.bundle.manifest import Manifest
from robustdice.plan import publishers
from robustdice.runtime.protocol.events import RunPieces, RunStage
from robustdice.runtime.wire.messages import Array, FrameId, ShardId


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
    admitted_at: float
    deadline: float
    live: set[int]
    """The frame's view: the devices that it counts on. This device is always among them; it only shrinks."""
    admitted_with: frozenset[int]
    """The view when it was admitted."""
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
    """While WAITING: when to ask the publishers once how they are, before suspecting them."""
    wait_until: float = 0.0
    """While WAITING: when to look who is to blame for what is missing."""
    asked_at: float = float("inf")
    """While WAITING: when the publishers of what is missing were asked how they are."""
    patient_until: float = 0.0
    """While WAITING: when to go on without what is merely on the way."""
    asked_again: dict[int, float] = field(default_factory=dict)
    """In this stage, devices that were asked to send again what may only be on the way: when they were asked last."""
    parted: set[int] = field(default_factory=set)
    """Devices that this frame goes on without though they are well: nothing more is sent to them."""
    rearmed: bool = False
    """The current wait has already been extended because this device itself stood still."""
    extended: bool = False
    """In this stage, a publisher that nobody can stand in for has been given more time."""
    hurried: tuple[int, float] | None = None
    """From which stage on, and since when, it waits for nothing."""
    clean: bool = True
    """Nobody left the view during the current wait, so that its length may be learnt from."""

    @property
    def down(self) -> frozenset[int]:
        """The devices that take no part, in the frame's view."""
        return frozenset(range(self.manifest.devices)) - self.live

    def expected_accuracy(self, sources: tuple[tuple[int, ...], ...]) -> float | None:
        """What was measured for the devices that are down, if the frame was computed from first to last as it was
        measured: in one view, every shard from its publisher. None where nobody has measured it."""
        certificate, view = self.manifest.certificate, frozenset(self.live)
        if certificate is None or view != self.admitted_with:
            return None
        for exchange, found in zip(self.manifest.exchanges, sources, strict=True):
            due = publishers(exchange.shards, self.down)
            settled = [-1 if device is None else device for device in due]
            if any(a != b for a, b, shard in zip(found, settled, exchange.shards, strict=True) if shard.neurons):
                return None
        return certificate.expected(self.down)

    def publisher(self, shard: ShardId) -> int | None:
        """The first holder in this frame's view; of a parity shard, only while one of its members has none."""
        number, position = shard
        shards = self.manifest.exchanges[number].shards
        alone = [m for m in shards[position].parity_of if self._holder((number, m)) is None]
        return None if shards[position].parity_of and len(alone) != 1 else self._holder(shard)

    def _holder(self, shard: ShardId) -> int | None:
        holders = self.manifest.exchanges[shard[0]].shards[shard[1]].devices
        return next((device for device in holders if device in self.live), None)

    def replaceable(self, device: int) -> bool:
        """Whether this stage can have everything that it misses from ``device`` without it, in this frame's view."""
        view = replace(self, live=self.live - {device})
        lost = [shard for shard, publisher in self.missing().items() if publisher == device]
        return all(
            view._holder(shard) is not None or any(e == shard[0] and self._is_parity((e, s)) for e, s in view.missing())
            for shard in lost
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
        found: dict[ShardId, int] = {}
        for exchange in self.manifest.stages[self.stage].exchanges:
            shards = self.manifest.exchanges[exchange].shards
            absent = [(exchange, s) for s in range(len(shards)) if (exchange, s) not in self.sources]
            holders = {shard: self._holder(shard) for shard in absent}
            lost = [shard for shard, device in holders.items() if device is None and not self._is_parity(shard)]
            # Of a parity shard counts what came, not who is up: a member's device may have died after sending it.
            found.update(
                {
                    shard: device
                    for shard, device in holders.items()
                    if device is not None and (len(lost) == 1 or not self._is_parity(shard))
                }
            )
        return found

    def awaited(self, me: int) -> list[int]:
        """Peers that this stage misses shards of."""
        return sorted(set(self.missing().values()) - {me})

    def _is_parity(self, shard: ShardId) -> bool:
        return bool(self.manifest.exchanges[shard[0]].shards[shard[1]].parity_of)

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

    def owed(self, me: int) -> RunPieces | None:
        """What has to be computed of stages that were entered."""
        for stage in range(self.stage + (self.phase is not Phase.READY)):
            if pieces := self.pieces_due(stage, me):
                return RunPieces(self.id, stage, pieces, self.down)
        self.owes = False
        return None

    def enter(self, me: int) -> RunStage:
        """What has to be computed of the next stage, which is entered."""
        gathered = self.gather(self.stage - 1, me) if self.stage else {}
        every = range(len(self.manifest.stages[self.stage].pieces))
        pieces = tuple(every) if self.manifest.spares == "hot" else self.pieces_due(self.stage, me)
        task = RunStage(self.id, self.stage, self.array, gathered, pieces, self.down)
        self.array, self.phase = None, Phase.COMPUTING
        return task

    def coverage(self) -> tuple[float, float, tuple[tuple[int, ...], ...]]:
        """Least share of neurons present and largest share from a spare, over the exchanges; and all sources."""
        present, spares, sources = 1.0, 0.0, []
        for number, exchange in enumerate(self.manifest.exchanges):
            origin = [self.sources.get((number, s), -1) for s in range(len(exchange.shards))]
            members = exchange.shards[-1].parity_of
            if origin[-1] >= 0 and [origin[m] for m in members].count(-1) == 1:
                origin[origin.index(-1)] = origin[-1]
            sizes = [len(shard.neurons) for shard in exchange.shards]
            there = sum(size for size, source in zip(sizes, origin, strict=True) if source >= 0)
            from_spare = sum(
                size
                for size, source, shard in zip(sizes, origin, exchange.shards, strict=True)
                if source not in {-1, shard.devices[0]}
            )
            present, spares = min(present, there / sum(sizes)), max(spares, from_spare / sum(sizes))
            sources.append(tuple(origin))
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
