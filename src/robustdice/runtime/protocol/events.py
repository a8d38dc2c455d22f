"""What the engine is told, and what it asks for. All of it is data; arrays are opaque to the engine.

What is told and asked for in every exchange is a named tuple: those are made fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from robustdice.runtime.wire.messages import Array, ClientMessage, DeviceMessage, FrameId, Message, Parcel, ShardId


@dataclass(frozen=True)
class Settings:
    """How a device behaves. Times are seconds.

    A stage's deadline follows the waits observed for it, between ``minimum_wait`` and ``maximum_wait``; it is
    ``initial_wait`` before the first one. ``window`` is the number of frames that a device works on at once: a client
    may use all of it while it is alone, and its share when there are others.

    Any process stands still for a moment now and then because an operating system lets others run. That is no fault,
    and costs no frame anything but time: a peer is asked how it is after half of ``minimum_wait``, and is only
    suspected when it has said nothing for the other half, which is longer than such a pause (0.1 s) takes.
    """

    window: int = 8
    initial_wait: float = 0.5
    minimum_wait: float = 0.25
    maximum_wait: float = 1.0
    answer_margin: float = 0.02
    """Kept free before a frame's deadline, beside the time that the remaining stages are known to take."""
    pass_after: float = 0.05
    """A frame that only peers speak of is passed after this time, or what was seen to be usual; one whose client can
    reach this device, not before ``minimum_wait``."""
    pulse: float = 0.1
    """So often a device says that it is there."""
    silence: float = 0.3
    """A peer that nothing comes from for this time is gone; it gets more where words are long under way."""
    one_way: float = 1.0
    """A peer that hears this device and is not heard, or the reverse, is named after this time."""
    given_up: float = 5.0
    """Shards that were not acknowledged after this time were lost."""
    late_timer: float = 0.02
    """A timer later than this means that this device stood still, so nobody else is to blame."""
    first_backoff: float = 0.05
    longest_backoff: float = 5.0
    cost_share: float = 0.1
    """Waiting in vain for one device may take this share of all time,"""
    cost_credit: float = 1.0
    """and so many seconds at once."""
    fault_cost: float = 0.02
    """What a fault costs beside waiting: others do the work again."""
    remembered_frames: int = 1024


class Received(NamedTuple):
    """A valid message, its sender authenticated: a client by the ``key`` that it has shown. A StatusRequest only shows
    that its client can reach this device."""

    message: DeviceMessage | ClientMessage
    key: str = ""


@dataclass(frozen=True)
class PeerUp:
    """The connection to a peer stands."""

    device: int


@dataclass(frozen=True)
class PeerDown:
    """The connection to a peer is gone."""

    device: int


class RunStage(NamedTuple):
    """Enter a stage: assemble the previous stage's exchanges from ``gathered`` (stage 0: take ``array`` as the input),
    run the local parts and ``pieces``, while the devices ``down`` take no part. Each of the ``due`` is shards of what
    the pieces compute that are wanted as one parcel; ``owned`` are those that this device has the sums for, of
    exchanges of what owners add up. Of stages before the one that is ``settled`` no more pieces will be run."""

    frame: FrameId
    stage: int
    array: Array | None
    gathered: tuple[Parcel, ...]
    pieces: tuple[int, ...]
    down: frozenset[int]
    due: tuple[tuple[ShardId, ...], ...] = ()
    owned: tuple[ShardId, ...] = ()
    settled: int = 0


class RunPieces(NamedTuple):
    """Run more pieces of a stage that the frame has already entered, from the values kept for it, while the devices
    ``down`` take no part. What is ``owned`` now is computed from the sums ``gathered``."""

    frame: FrameId
    stage: int
    pieces: tuple[int, ...]
    down: frozenset[int]
    gathered: tuple[Parcel, ...] = ()
    owned: tuple[ShardId, ...] = ()


class Computed(NamedTuple):
    """A RunStage or RunPieces is done: the pieces' shards, first those that were due, the network's output after the
    last stage, or an error."""

    task: RunStage | RunPieces
    parcels: tuple[Parcel, ...]
    outputs: Array | None = None
    error: str | None = None


@dataclass(frozen=True)
class Tick:
    """The time ``due``, which the engine had asked for, has come or passed, and no message is waiting to be read."""

    due: float


class Send(NamedTuple):
    """Hand a message to the transport, for a device (its number) or a client (its name). It may get lost."""

    to: int | str
    message: Message


class Forget(NamedTuple):
    """Drop the values kept for a frame."""

    frame: FrameId


@dataclass(frozen=True)
class Note:
    """For the log: a fault or a recovery, as a sentence and as what the sentence says."""

    text: str
    event: str
    """``suspect``, ``admitted``, ``late``, ``poor``, ``one-way``, ``both-ways`` or ``failed``."""
    peer: int | None = None
    frame: int | None = None
    reason: str | None = None


Event: TypeAlias = Received | PeerUp | PeerDown | Computed | Tick
Task: TypeAlias = RunStage | RunPieces
Action: TypeAlias = Send | RunStage | RunPieces | Forget | Note
