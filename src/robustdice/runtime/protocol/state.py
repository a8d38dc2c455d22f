"""What a device knows of a frame in flight; :mod:`robustdice.runtime.protocol.inflight` has what follows from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.protocol.lineage import Ancestry
from robustdice.runtime.protocol.views import Holders, View
from robustdice.runtime.wire.messages import Array, FrameId, Lineage, Parcel, ShardId


class Phase(enum.Enum):
    """Where a frame is within its stage."""

    READY = "ready"  # may be computed
    COMPUTING = "computing"
    WAITING = "waiting"  # own shards are published, others' are missing
    DONE = "done"  # answered or given up; kept so that slower peers can still be helped


@dataclass
class State:
    """What is known of an admitted frame. All times are the engine's clock, in seconds."""

    id: FrameId
    manifest: Manifest
    ancestry: Ancestry
    admitted_at: float
    deadline: float
    live: set[int]
    """The frame's view: the devices that it counts on. This device is always among them; it only shrinks."""
    admitted_with: frozenset[int]
    """The view when it was admitted."""
    array: Array | None
    """The input; None once stage 0 has been handed to the executor."""
    straight: View | None
    """As long as nothing irregular has happened to the frame: the view that it is computed in. Everything that was said
    of it is in ``parcels`` then; :meth:`unfold` turns that into what is kept of single shards."""
    key: str = ""
    """Whose it is: what its client has shown who it is with."""
    stage: int = 0
    """Only grows. All earlier stages have been entered; this one too, unless the phase is READY."""
    phase: Phase = Phase.READY
    parcels: dict[tuple[int, int], Parcel] = field(default_factory=dict)
    """While straight, by stage and device: what that device publishes there. Others' are dropped when they are used."""
    spared: list[Parcel] = field(default_factory=list)
    """While straight: what was computed here though it is not this device's task."""
    got: dict[ShardId, Array] = field(default_factory=dict)
    """Shards of this stage and later ones, the first of those that are built on most; own ones only while this device
    is publisher."""
    sources: dict[ShardId, int] = field(default_factory=dict)
    """For every shard of ``got``, and those that earlier stages were assembled from: the device it came from."""
    lineages: dict[ShardId, Lineage] = field(default_factory=dict)
    """For every shard of ``sources``: what it was built on there."""
    said: dict[tuple[int, int], Lineage] = field(default_factory=dict)
    """For every stage and device: what the last shards that came from it there were built on, taken or not."""
    built: list[Lineage] = field(default_factory=lambda: [Lineage()])
    """For every stage that was entered: what this device's part of it is built on."""
    lesser: set[int] = field(default_factory=set)
    """Devices that have built on less than this one: whoever else holds a shard is asked for it first."""
    own_lineages: dict[ShardId, Lineage] = field(default_factory=dict)
    """Of shards of ``own`` that were not built on what this device's part of their stage was."""
    own: dict[ShardId, Array] = field(default_factory=dict)
    """Everything computed here, kept until the frame is forgotten, published or not, but for spares of stages that are
    ``settled``."""
    published: set[ShardId] = field(default_factory=set)
    """Those of ``own`` that all peers have been sent, or of sums the one that owned them then."""
    wanted: dict[ShardId, set[int]] = field(default_factory=dict)
    """Shards that peers asked for, and that are not computed yet."""
    owes: bool = False
    """There may be pieces of an entered stage that have to be computed now: looked at when the executor is free."""
    settled: int = 0
    """Nobody has to stand in for another in the stages before this one: what that takes is kept no longer. What was
    published is, for devices that restart in the middle."""
    failed: bool = False
    """It could not be computed, and is not tried again."""
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
    discounted: dict[int, set[int]] = field(default_factory=dict)
    """By peer: devices that it has shown not to count on in this frame, so that it knows whom it stands in for."""
    parted: set[int] = field(default_factory=set)
    """Devices that this frame goes on without though they are well: nothing more is sent to them."""
    rearmed: bool = False
    """The current wait has already been extended because this device itself stood still."""
    extended: bool = False
    """In this stage, a publisher that nobody can stand in for has been given more time."""
    hurried: tuple[int, float] | None = None
    """From which stage on, and since when, it waits for nothing."""
    looked_up: tuple[tuple[int, int], tuple[Holders, Holders]] | None = field(default=None, init=False)
    """Who holds shards, when ``live`` and ``lesser`` had so many devices: one only shrinks, the other only grows."""
    clean: bool = True
    """Nobody left the view during the current wait, so that its length may be learnt from."""
