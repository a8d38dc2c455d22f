"""What devices and clients say to each other.

What is said in every exchange is a named tuple: those are made fastest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

PROTOCOL_VERSION = 3
HEADER_LIMIT = 64 * 2**10
DOCUMENT_LIMIT = 2**20
OUTPUTS_LIMIT = 2**20
MAX_TIMEOUT_SECONDS = 3600.0

ShardId = tuple[int, int]
"""(position in ``Manifest.exchanges``, position in that exchange's ``shards``)."""

Array: TypeAlias = Any
"""float32 [1, ...], or a shard as it travels; opaque to everyone but the executor and the bytes."""


class FrameId(NamedTuple):
    """A client's random name (hex) and its frame's number, which only ever grows."""

    client: str
    number: int


@dataclass(frozen=True)
class Hello:
    """The first word on a connection between devices. ``incarnation`` is new each time that a device starts;
    ``reply`` asks for a Hello in return."""

    sender: int
    incarnation: str
    reply: bool


@dataclass(frozen=True)
class Frame:
    """A client's input, float32 [1, *input_shape]. ``oldest`` is the lowest number that the client still waits for."""

    frame: FrameId
    oldest: int
    timeout_seconds: float
    array: Array


@dataclass(frozen=True)
class Pulse:
    """``sender`` is there. ``clock`` is its clock in seconds, ``echo`` what the receiver's clock must be by the last
    pulse that came from it (None: none came); ``sent`` the serial number of the last shards sent to the receiver, 0 for
    none; ``got`` that of the last that came from it; ``owes`` the frames that wait for nothing but the sender's own
    work. ``reply`` asks for a pulse at once. ``hears`` says whether anything has come from the receiver lately."""

    sender: int
    clock: float
    echo: float | None
    reply: bool
    sent: int
    got: int
    owes: tuple[FrameId, ...]
    hears: bool = True


class Lineage(NamedTuple):
    """What something that was computed is built on. Either all was built in one ``view`` (device numbers, ascending),
    every shard taken from its publisher there. Or, with no view, for every exchange of the stages before: the share of
    its neurons that is ``present`` in it, and the share that came from ``spares``; both 0 to 1."""

    view: tuple[int, ...] | None = None
    present: tuple[float, ...] = ()
    spares: tuple[float, ...] = ()


class Parcel(NamedTuple):
    """Shards that travel together: ``arrays[k]`` is ``shards[k]``, as it travels."""

    shards: tuple[ShardId, ...]
    arrays: Sequence[Array]


class Shards(NamedTuple):
    """What ``sender`` publishes for one stage of a frame. ``serial`` grows from 1 with every such message of the
    sender, whoever it is for. All were built on ``lineage``."""

    sender: int
    serial: int
    frame: FrameId
    stage: int
    parcel: Parcel
    lineage: Lineage = Lineage()


@dataclass(frozen=True)
class Mark:
    """Goes the way of ``sender``'s shards, behind those up to ``serial``: what has not come of them by now will not."""

    sender: int
    serial: int


@dataclass(frozen=True)
class Want:
    """``sender`` misses these shards and believes that the receiver is their publisher."""

    sender: int
    frame: FrameId
    stage: int
    shards: tuple[ShardId, ...]


@dataclass(frozen=True)
class Pass:
    """``sender`` takes no part in this frame (any more): wait for nothing from it."""

    sender: int
    frame: FrameId


@dataclass(frozen=True)
class Answer:
    """The network's output, float32 [outputs], and what it was computed with.

    ``sources[e][s]`` is the device that a shard came from, or -1 where it was missing, or is for another one that adds
    it up; ``coverage`` and
    ``from_spares`` are fractions of neurons (least and largest over the exchanges), in all that the output was computed
    from, on whichever device; ``down`` the devices that did
    not take part, and ``late`` those among them that are well, but were not waited for any longer. With no class score
    left every output is minus infinity. ``seconds`` passed between the frame's arrival and this answer.
    ``expected`` is the accuracy that was measured of what is computed in this way, if it was.
    """

    sender: int
    frame: FrameId
    outputs: Array
    coverage: float
    from_spares: float
    sources: tuple[tuple[int, ...], ...]
    down: tuple[int, ...]
    late: tuple[int, ...]
    seconds: float
    expected: float | None = None


@dataclass(frozen=True)
class Refused:
    """``sender`` will not answer this frame; ``reason`` is for people."""

    sender: int
    frame: FrameId
    reason: str


@dataclass(frozen=True)
class StatusRequest:
    """Asks a device what it serves and how it is."""

    client: str


@dataclass(frozen=True)
class Status:
    """The answer: a JSON object (docs/formats.md); ``document["model"]`` is what a client must know to send frames."""

    sender: int
    document: Mapping[str, Any]


DeviceMessage: TypeAlias = Hello | Pulse | Shards | Mark | Want | Pass
ClientMessage: TypeAlias = Frame | StatusRequest
Reply: TypeAlias = Answer | Refused | Status
Message: TypeAlias = DeviceMessage | ClientMessage | Reply
