"""Engines in virtual time: devices that run, stand still or are gone, with executors that compute tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.device import LOOK_SECONDS
from robustdice.runtime.protocol.contact import REMEMBERED_SHARDS
from robustdice.runtime.protocol.engine import Engine
from robustdice.runtime.protocol.events import (
    Computed,
    Event,
    Forget,
    Note,
    Received,
    RunPieces,
    RunStage,
    Send,
    Settings,
    Tick,
)
from robustdice.runtime.protocol.workload import QUEUED_TASKS
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.messages import Answer, Frame, FrameId, Parcel, Pulse, Refused, Shards, Want
from tokens import Token, Truth, assembled
from virtual_time import VirtualTime


@dataclass
class Node:
    """A device: its engine while it runs, and the executor's values."""

    device: int
    manifest: Manifest
    codec: Codec
    engine: Engine | None = None
    incarnation: int = 0
    offset: float = 0.0
    """What its clock says beyond the world's."""
    frozen_since: float | None = None
    paused: bool = False
    """The operating system lets others run."""
    inbox: list[Event] = field(default_factory=list)
    """What has happened while it stood still."""
    speed: float = 1.0
    values: dict[FrameId, dict[int, Truth]] = field(default_factory=dict)
    tick_at: float | None = None
    look_at: float = 0.0
    free_at: float = 0.0
    """When the executor has done all that it was told to."""
    queued: int = 0
    """Tasks that it has."""
    events: int = 0
    """How many it has dealt with."""
    disturbed: list[tuple[float, float]] = field(default_factory=list)
    """When it stood still for long, or its clock jumped."""

    @property
    def still(self) -> bool:
        """It runs, and does nothing."""
        return self.frozen_since is not None or self.paused

    def end(self) -> None:
        """The process is gone, and all that it knew."""
        self.engine, self.frozen_since, self.paused = None, None, False
        self.incarnation += 1
        self.inbox.clear()
        self.values.clear()
        self.queued = 0

    def start(self, settings: Settings, now: float) -> None:
        """A new process."""
        self.incarnation += 1
        self.tick_at, self.free_at, self.look_at = None, now, now
        self.engine = Engine(self.manifest, settings, f"{self.incarnation}")


@dataclass
class Admission:
    """A frame that a device took on."""

    device: int
    incarnation: int
    at: float
    deadline: float
    answered: float | None = None
    given_up: bool = False
    """It was said that there will be no answer."""


class Devices(VirtualTime):
    """Every event and every action goes through here; what is sent is for the layers above to carry."""

    def __init__(self, nodes: Sequence[Node], seed: int, compute_seconds: float) -> None:
        super().__init__()
        self.seed, self.random = seed, random.Random(seed)  # noqa: S311
        self.settings = Settings()
        self.nodes = list(nodes)
        self.compute_seconds = compute_seconds
        self.notes: list[tuple[float, int, str]] = []
        self.wants = 0
        self.admissions: dict[tuple[int, FrameId], Admission] = {}
        self.log: list[str] | None = None
        """Every event as a line, if a list is put here."""
        self._trace = hashlib.blake2b(digest_size=16)
        self._shards = sum(len(exchange.shards) for exchange in self.nodes[0].manifest.exchanges)

    @property
    def trace(self) -> str:
        """A digest of all that has happened."""
        return self._trace.hexdigest()

    def transmit(self, source: int, target: int, event: Received) -> None:
        """A message from a device to another."""
        raise NotImplementedError

    def reply(self, node: Node, client: str, message: Answer | Refused) -> None:
        """A message from a device to a client."""
        raise NotImplementedError

    # -- events

    def deliver(self, device: int, incarnation: int, event: Event) -> None:
        """Something happens to a device, unless it is not that process any more."""
        node = self.nodes[device]
        if node.engine is None or node.incarnation != incarnation:
            return
        if node.still:
            node.inbox.append(event)
            return
        self._tell(node, event)
        new = event.message if isinstance(event, Received) and isinstance(event.message, Frame) else None
        known = new is not None and new.frame in node.engine.frames
        if isinstance(event, Computed):
            node.queued -= 1
        for action in node.engine.handle(event, self.now + node.offset):
            self._act(node, action)
        if new is not None and not known and new.frame in node.engine.frames:
            before = self.admissions.get((device, new.frame))
            again = before is not None and before.incarnation == incarnation
            assert not again, f"frame {new.frame.number} is admitted twice by device {device}"
            deadline = self.now + new.timeout_seconds
            self.admissions[device, new.frame] = Admission(device, incarnation, self.now, deadline)
        if not isinstance(event, Tick):
            self._check_memory(node)
        if self.now >= node.look_at:
            node.look_at = self.now + LOOK_SECONDS
            self._set_timer(node, node.engine.next_due(self.now + node.offset))
        elif node.tick_at is None or node.tick_at > node.look_at:
            node.tick_at = node.look_at
            self.at(node.look_at, self._tick, device, incarnation, node.look_at)

    def wake(self, node: Node) -> None:
        """It goes on, if nothing else holds it: first with what has happened, then with timers."""
        if node.engine is None or node.still:
            return
        inbox, node.inbox = node.inbox, []
        for event in inbox:
            self.deliver(node.device, node.incarnation, event)
        node.tick_at = self.now
        self._tick(node.device, node.incarnation, self.now)

    def _tell(self, node: Node, event: Event) -> None:
        """For the trace and the log."""
        what: object = event
        if isinstance(event, Received):
            what = message = event.message
            if isinstance(message, Shards):
                what = f"Shards {message.sender} {message.serial} {message.frame.number} {message.stage}"
            elif isinstance(message, Pulse):
                what = f"Pulse {message.sender} {message.sent} {message.got} {len(message.owes)}"
        elif isinstance(event, Computed):
            what = f"{type(event.task).__name__} {event.task.frame.number} {event.task.stage}"
        line = f"{self.now!r} {node.device}.{node.incarnation} {what}"
        self._trace.update(line.encode())
        if self.log is not None:
            self.log.append(line)

    def _check_memory(self, node: Node) -> None:
        engine, window = node.engine, self.settings.window
        assert engine is not None
        node.events += 1
        assert len(node.values) <= 3 * window + 1, f"device {node.device} keeps values of {len(node.values)} frames"
        assert node.queued <= QUEUED_TASKS, f"device {node.device} was given {node.queued} tasks at once"
        if node.events % 16:
            return  # what follows takes long to count, and what leaks stays
        arrays, most = engine.frames.buffered, 4 * window * 2 * self._shards
        assert arrays <= most, f"device {node.device} keeps {arrays} arrays, more than {most}"
        assert len(engine.frames.early_ones()) <= 2 * window, f"device {node.device} hears of too many frames"
        for contact in engine._contacts.of.values():
            assert len(contact._underway) <= REMEMBERED_SHARDS, f"device {node.device} remembers too much"

    # -- timers

    def _set_timer(self, node: Node, on_its_clock: float) -> None:
        """Let the engine's timer go off when it is due; one that is set to go off earlier will look again."""
        due = on_its_clock - node.offset
        if node.tick_at is None or due < node.tick_at:
            node.tick_at = max(due, self.now)
            self.at(node.tick_at, self._tick, node.device, node.incarnation, node.tick_at)

    def _tick(self, device: int, incarnation: int, set_for: float) -> None:
        node = self.nodes[device]
        if node.engine is None or node.incarnation != incarnation or node.still:
            return
        if node.tick_at != set_for:
            return  # an earlier one took its place
        node.tick_at, now = None, self.now + node.offset
        due = node.engine.next_due(now)
        if due <= now + 1e-9:
            self.deliver(device, incarnation, Tick(min(due, now)))
        else:
            self._set_timer(node, due)

    # -- actions

    def _act(self, node: Node, action: Any) -> None:
        if isinstance(action, Send):
            if isinstance(action.message, Answer | Refused):
                assert isinstance(action.to, str)
                self.reply(node, action.to, action.message)
            else:
                self.wants += isinstance(action.message, Want)
                assert isinstance(action.to, int)
                self.transmit(node.device, action.to, Received(action.message))  # type: ignore[arg-type]
        elif isinstance(action, RunStage | RunPieces):
            done = computed(node, action)
            seconds = self.compute_seconds * node.speed * (0.5 + self.random.random())
            node.free_at, node.queued = max(self.now, node.free_at) + seconds, node.queued + 1  # one after the other
            self.soon(node.free_at, self.deliver, node.device, node.incarnation, done)
        elif isinstance(action, Forget):
            node.values.pop(action.frame, None)
        elif isinstance(action, Note):
            self.notes.append((self.now, node.device, action.text))


def computed(node: Node, task: RunStage | RunPieces) -> Computed:
    """What a device's executor makes of a task: tokens, and at the end what its answer is computed from."""
    stages, of = node.values.setdefault(task.frame, {}), node.manifest.stages
    if isinstance(task, RunStage):
        for parcel in task.gathered:
            for shard, token in zip(parcel.shards, parcel.arrays, strict=True):
                assert (token.frame, token.shard) == (task.frame, shard), "an array of something else"
        before = Truth()
        if task.stage:
            earlier = stages[task.stage - 1]
            before = assembled(node.manifest, task.stage - 1, earlier, task.gathered, task.owned)
        stages[task.stage] = before.in_view(task.down)
        for settled in [stage for stage in stages if stage < task.settled]:
            del stages[settled]
    assert task.stage in stages, f"the values of stage {task.stage} are gone"
    built_on = stages[task.stage].in_view(task.down)
    shards = {
        shard: Token(task.frame, shard, node.device, built_on)
        for piece in task.pieces
        for shard in of[task.stage].pieces[piece].shards
        if shard[0] not in node.manifest.sums_of or shard in task.owned
    }
    if isinstance(task, RunPieces):
        for shard, parcel in zip(task.owned, task.gathered, strict=True):
            earlier = stages[task.stage - 1]
            taken = assembled(node.manifest, task.stage - 1, earlier, [parcel], [shard], late=True)
            shards[shard] = Token(task.frame, shard, node.device, taken.in_view(task.down))
    last = isinstance(task, RunStage) and task.stage + 1 == len(of)
    wanted = task.due if isinstance(task, RunStage) else ()
    due = {shard for part in wanted for shard in part}
    parts = [*wanted, tuple(shard for shard in shards if shard not in due)]
    parcels = tuple(Parcel(part, [shards[shard] for shard in part]) for part in parts if part)
    return Computed(task, parcels, outputs=stages[task.stage] if last else None)
