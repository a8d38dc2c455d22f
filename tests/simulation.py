"""A deterministic world for engines: virtual time, a seeded network, seeded faults.

Arrays are tokens, so that what a value was assembled from can be read off it. Every answer is checked when it is
given, and memory after every event; :meth:`World.check` judges the whole run. Equal seeds give equal ``trace``\\ s.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import math
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from bundles import make_manifest
from robustdice.bundle.manifest import Manifest
from robustdice.errors import MessageError
from robustdice.plan import Certificate, Plan, failure_sets
from robustdice.runtime.choice import Pace
from robustdice.runtime.protocol.contact import REMEMBERED_SHARDS
from robustdice.runtime.protocol.engine import Engine
from robustdice.runtime.protocol.events import (
    Computed,
    Event,
    Forget,
    Note,
    PeerDown,
    PeerUp,
    Received,
    RunPieces,
    RunStage,
    Send,
    Settings,
    Tick,
)
from robustdice.runtime.protocol.workload import QUEUED_TASKS
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.messages import (
    Answer,
    Frame,
    FrameId,
    Parcel,
    Pulse,
    Refused,
    Shards,
    Want,
)
from shared_link import SharedLink, size_of
from tokens import Token, Truth, assembled
from wire_check import garbled, travels

CLIENT = "c0"
GIVEN_UP_SECONDS = 5.0
"""TCP's patience with a peer that is not there any more."""
MARGIN_SECONDS = 0.1
LATE_COPY_SECONDS = 3.0
"""A second copy of a frame may arrive when everybody is done with it."""
LOOK_SECONDS = 0.001
"""A device asks its engine for timers at most so often (:data:`robustdice.runtime.device.LOOK_SECONDS`)."""
Way = tuple[Hashable, Hashable]
"""From whom to whom: devices are numbers, clients names."""


@dataclass
class Network:
    """What can happen to a message between devices."""

    delay: float = 0.001
    loss: float = 0.0
    duplication: float = 0.0
    slow: float = 0.0
    """Probability that a message takes up to ``slow_seconds``."""
    slow_seconds: float = 0.05
    corruption: float = 0.0
    """Probability that its bytes are not what was sent: whoever gets it breaks the connection."""
    reordering: bool = True
    """Messages may overtake each other."""
    bytes_per_second: float | None = None
    """Of one link that all share (None: no limit); ``delay`` is that of its loaded queue then."""


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
    inbox: list[Event] = field(default_factory=list)
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
    """When it stood still, or its clock jumped."""


@dataclass
class Admission:
    """A frame that a device took on."""

    device: int
    incarnation: int
    at: float
    deadline: float
    answered: float | None = None


class World:
    """``run(until)`` moves time; faults are methods, to be scheduled with ``at(time, ...)``."""

    def __init__(
        self,
        plan: Plan,
        seed: int,
        spares: str = "standby",
        network: Network | None = None,
        window: int = 3,
        prune: bool = False,
        compute_seconds: float = 0.002,
    ) -> None:
        self.plan, manifests, codecs = certified(plan, spares)
        self.seed, self.spares = seed, spares
        self.random = random.Random(seed)  # noqa: S311
        self.network = network or Network()
        self.now = 0.0
        self.settings = Settings()
        self.nodes = [Node(device, *of) for device, of in enumerate(zip(manifests, codecs, strict=True))]
        self.cut: set[Way] = set()
        """Ways that nothing gets through."""
        self.links: dict[tuple[int, int], int] = {}
        """Connections that stand, from a device to another, and the incarnation of that one they were made to."""
        self.notes: list[tuple[float, int, str]] = []
        self.wants = 0
        self.window, self.prune, self.compute_seconds = window, prune, compute_seconds
        self.sent: dict[int, float] = {}
        self.clients: dict[str, set[int]] = {}
        """Numbers of the frames that each of them waits for; numbers are drawn from one sequence for all."""
        self.answers: dict[int, list[tuple[float, Answer]]] = {}
        self.refusals: list[Refused] = []
        self.refused: set[int] = set()
        """Frames that some device has refused."""
        self.admissions: dict[tuple[int, FrameId], Admission] = {}
        self.interval = 0.01
        self.timeout_seconds = 2.0
        self.link: SharedLink | None = None
        if self.network.bytes_per_second is not None:
            self.link = SharedLink(self.network.bytes_per_second, self.network.delay, self._after)
        self.pace: Pace | None = None
        self.judge: Callable[[int, Answer, Truth], None] | None = None
        """What else is to be said of an answer when it is given."""
        self.moving = 0
        """What is being computed, is on its way, or will be noticed without a timer of a device."""
        self.standstill = 0.0
        """For how long nothing has moved while somebody waited for an answer."""
        self.stood: dict[int, float] = {}
        """What that was when a frame was sent."""
        self.log: list[str] | None = None
        """Every event as a line, if a list is put here."""
        self._trace = hashlib.blake2b(digest_size=16)
        self._among: dict[int, int] = {}
        self._last: dict[Hashable, float] = {}
        self._sizes = {
            (e, s): math.prod(exchange.form(s).shape)
            for e, exchange in enumerate(manifests[0].exchanges)
            for s in range(len(exchange.shards))
        }
        self._carried = 0
        self._last_frame = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for node in self.nodes:
            self.at(0.0, self.restart, node.device)

    @property
    def trace(self) -> str:
        """A digest of all that has happened."""
        return self._trace.hexdigest()

    # -- time

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (max(time, self.now), next(self._order), lambda: call(*arguments)))

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now + seconds, call)

    def _soon(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """As ``at``, of something that moves."""
        self.moving += 1
        self.at(time, self._moved, call, *arguments)

    def _moved(self, call: Callable[..., None], *arguments: Any) -> None:
        self.moving -= 1
        call(*arguments)

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            before = self.now
            self.now, _, call = heapq.heappop(self._heap)
            if not self.moving and any(self.clients.values()):
                self.standstill += self.now - before
            call()
        self.now = until

    # -- devices

    def _deliver(self, device: int, incarnation: int, event: Event) -> None:
        node = self.nodes[device]
        if node.engine is None or node.incarnation != incarnation:
            return
        if node.frozen_since is not None:
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
        arrays, most = engine.frames.buffered, 4 * window * 2 * len(self._sizes)
        assert arrays <= most, f"device {node.device} keeps {arrays} arrays, more than {most}"
        assert len(engine.frames.early_ones()) <= 2 * window, f"device {node.device} hears of too many frames"
        for contact in engine._contacts.of.values():
            assert len(contact._underway) <= REMEMBERED_SHARDS, f"device {node.device} remembers too much"

    def _set_timer(self, node: Node, on_its_clock: float) -> None:
        """Let the engine's timer go off when it is due; one that is set to go off earlier will look again."""
        due = on_its_clock - node.offset
        if node.tick_at is None or due < node.tick_at:
            node.tick_at = max(due, self.now)
            self.at(node.tick_at, self._tick, node.device, node.incarnation, node.tick_at)

    def _tick(self, device: int, incarnation: int, set_for: float) -> None:
        node = self.nodes[device]
        if node.engine is None or node.incarnation != incarnation or node.frozen_since is not None:
            return
        if node.tick_at != set_for:
            return  # an earlier one took its place
        node.tick_at, now = None, self.now + node.offset
        due = node.engine.next_due(now)
        if due <= now + 1e-9:
            self._deliver(device, incarnation, Tick(min(due, now)))
        else:
            self._set_timer(node, due)

    def _act(self, node: Node, action: Any) -> None:
        if isinstance(action, Send):
            if isinstance(action.message, Answer | Refused):
                assert isinstance(action.to, str)
                answer, device = action.message, node.device
                if isinstance(answer, Answer):
                    self._judge(node, answer)
                else:
                    self.refused.add(answer.frame.number)
                self._carry(("out", device), answer, partial(self._answered, device, action.to, answer))
            else:
                self.wants += isinstance(action.message, Want)
                assert isinstance(action.to, int)
                self._transmit(node.device, action.to, Received(action.message))  # type: ignore[arg-type]
        elif isinstance(action, RunStage | RunPieces):
            self._compute(node, action)
        elif isinstance(action, Forget):
            node.values.pop(action.frame, None)
        elif isinstance(action, Note):
            self.notes.append((self.now, node.device, action.text))

    def _compute(self, node: Node, task: RunStage | RunPieces) -> None:
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
        done = Computed(task, parcels, outputs=stages[task.stage] if last else None)
        seconds = self.compute_seconds * node.speed * (0.5 + self.random.random())
        node.free_at, node.queued = max(self.now, node.free_at) + seconds, node.queued + 1  # one after the other
        self._soon(node.free_at, self._deliver, node.device, node.incarnation, done)

    # -- network

    def _delay(self) -> float:
        slow = self.network.slow_seconds if self.random.random() < self.network.slow else 0.0
        return self.network.delay * (0.2 + self.random.random()) + slow * self.random.random()

    def _carry(self, queue: Hashable, message: object, arrive: Callable[[], None]) -> None:
        if self.link is not None:
            self.link.send(queue, size_of(message, self._sizes), arrive)
            return
        at = self.now + self._delay()
        if not self.network.reordering:
            at = self._last[queue] = max(at, self._last.get(queue, 0.0))
        if isinstance(message, Pulse):
            self.at(at, arrive)
        else:
            self._soon(at, arrive)

    def _transmit(self, source: int, target: int, event: Received) -> None:
        network, incarnation = self.network, self.links.get((source, target))
        if incarnation is None:
            return
        self._carried += 1
        if self._carried % 32 == 0:
            travels(event.message, self.nodes[source].codec, self.nodes[target].codec)
        for _ in range(1 + (self.random.random() < network.duplication)):
            if self.random.random() >= network.loss:
                queue = ("shards" if isinstance(event.message, Shards) else "words", source, target)
                broken = self.random.random() < network.corruption
                arrive = self._break if broken else self._arrive
                self._carry(queue, event.message, partial(arrive, source, target, incarnation, event))

    def _arrive(self, source: int, target: int, incarnation: int, event: Event) -> None:
        if (source, target) not in self.cut:
            self._deliver(target, incarnation, event)

    def _break(self, source: int, target: int, incarnation: int, event: Received) -> None:
        """Bytes that nobody has sent arrive: what is encrypted is not even looked at, what is not must do no harm."""
        for parts in garbled(event.message, self.nodes[source].codec, self.random):
            with contextlib.suppress(MessageError):
                self.nodes[target].codec.decode(parts, source)
        if self.links.get((source, target)) == incarnation:
            self._disconnect(source, target)

    def _connect(self, source: int, target: int) -> None:
        """The reconnect loop of one outgoing connection."""
        a, b = self.nodes[source], self.nodes[target]
        able = a.engine and b.engine and a.frozen_since is None and b.frozen_since is None
        if (source, target) in self.links or a.engine is None:
            return
        if able and (source, target) not in self.cut:
            self.links[source, target] = b.incarnation
            self._deliver(source, a.incarnation, PeerUp(target))
        else:
            self.at(self.now + 0.05, self._connect, source, target)

    def _disconnect(self, source: int, target: int) -> None:
        if (source, target) in self.links:
            del self.links[source, target]
            node = self.nodes[source]
            self._deliver(source, node.incarnation, PeerDown(target))
            self._soon(self.now + 0.01 + 0.04 * self.random.random(), self._connect, source, target)

    def _drop(self, source: int, target: int, made_to: int) -> None:
        """One particular connection breaks, if it still stands."""
        if self.links.get((source, target)) == made_to:
            self._disconnect(source, target)

    # -- faults

    def crash(self, device: int, silent: bool = False) -> None:
        """The process is gone; ``silent`` (power loss): peers learn it from its silence."""
        node = self.nodes[device]
        if node.engine is None:
            return
        self._end(node)
        for peer in range(self.plan.devices):
            self.links.pop((device, peer), None)
            if (made_to := self.links.get((peer, device))) is not None:
                later = self.at if silent else self._soon
                seconds = GIVEN_UP_SECONDS if silent else self._delay()
                later(self.now + seconds, self._drop, peer, device, made_to)

    def _end(self, node: Node) -> None:
        node.engine, node.frozen_since = None, None
        node.incarnation += 1
        node.inbox.clear()
        node.values.clear()
        node.queued = 0

    def restart(self, device: int, unnoticed: bool = False) -> None:
        """The process starts again, with nothing in its memory. What was connected to the last one breaks; where it is
        ``unnoticed``, whatever lies in between goes on with the new one without a word."""
        node = self.nodes[device]
        if node.engine is not None:
            return
        node.incarnation += 1
        node.tick_at = None
        node.free_at = node.look_at = self.now
        node.engine = Engine(node.manifest, self.settings, f"{node.incarnation}")
        for peer in range(self.plan.devices):
            if peer == device:
                continue
            if (made_to := self.links.get((peer, device))) is not None:
                if unnoticed:
                    self.links[peer, device] = node.incarnation
                else:
                    self._soon(self.now + 0.02 * self.random.random(), self._drop, peer, device, made_to)
            for pair in ((peer, device), (device, peer)):
                self._soon(self.now + 0.01 + 0.04 * self.random.random(), self._connect, *pair)

    def replace(self, device: int) -> None:
        """Another process takes a device's place, and nothing but its first word tells."""
        if self.nodes[device].engine is not None:
            self._end(self.nodes[device])
            for peer in range(self.plan.devices):
                self.links.pop((device, peer), None)
            self.restart(device, unnoticed=True)

    def freeze(self, device: int) -> None:
        node = self.nodes[device]
        if node.engine is None or node.frozen_since is not None:
            return
        node.frozen_since = self.now
        self.at(self.now + GIVEN_UP_SECONDS, self._notice_freeze, device, self.now)

    def _notice_freeze(self, device: int, since: float) -> None:
        if self.nodes[device].frozen_since == since:
            for peer in range(self.plan.devices):
                self._disconnect(peer, device)
                self._disconnect(device, peer)

    def thaw(self, device: int) -> None:
        node = self.nodes[device]
        if node.engine is None or node.frozen_since is None:
            return
        node.disturbed.append((node.frozen_since, self.now))
        node.frozen_since = None
        inbox, node.inbox = node.inbox, []
        for event in inbox:
            self._deliver(device, node.incarnation, event)
        node.tick_at = self.now
        self._tick(device, node.incarnation, self.now)

    def jump(self, device: int, seconds: float) -> None:
        """A device's clock is so much further all of a sudden. It never goes back: it is monotonic."""
        self.nodes[device].offset += seconds
        self.nodes[device].disturbed.append((self.now, self.now))

    def partition(self, a: int, b: int) -> None:
        self.cut_one_way(a, b)
        self.cut_one_way(b, a)

    def cut_one_way(self, source: int, target: int) -> None:
        """What ``source`` sends does not reach ``target`` any more; its connection there breaks in the end."""
        self.cut.add((source, target))

        def notice() -> None:
            if (source, target) in self.cut:
                self._disconnect(source, target)

        self.at(self.now + GIVEN_UP_SECONDS, notice)

    def deafen(self, device: int) -> None:
        """Nothing reaches a device any more; everything that it sends does."""
        for peer in range(self.plan.devices):
            if peer != device:
                self.cut_one_way(peer, device)

    def mute(self, device: int) -> None:
        """Everything reaches a device; nothing that it sends reaches a peer."""
        for peer in range(self.plan.devices):
            if peer != device:
                self.cut_one_way(device, peer)

    def cut_client(self, client: str, device: int) -> None:
        """A client and a device do not hear each other."""
        self.cut |= {(client, device), (device, client)}

    def heal(self, *devices: Hashable) -> None:
        """Everything between a device and its peers, or between some of those named, gets through again."""
        self.cut = {
            way for way in self.cut if not (set(way) <= set(devices) or (len(devices) == 1 and devices[0] in way))
        }

    def end_faults(self) -> None:
        """Whatever was still broken is whole again."""
        self.cut.clear()
        for node in self.nodes:
            node.speed = 1.0
            self.thaw(node.device)
            self.restart(node.device)

    def slow_down(self, device: int, factor: float) -> None:
        self.nodes[device].speed = factor

    # -- clients

    def start_client(self, first: float, last: float, name: str = CLIENT) -> None:
        self.clients[name] = set()
        self._last_frame = max(self._last_frame, last)

        def step() -> None:
            if self.now > min(last, self._last_frame):
                return
            if len(self.clients[name]) < (self.window if self.pace is None else self.pace.allowed):
                self._send_frame(name)
            self.at(self.now + self.interval, step)

        self.at(first, step)

    def _send_frame(self, client: str) -> None:
        number, outstanding = len(self.sent), self.clients[client]
        self.sent[number], self.stood[number] = self.now, self.standstill
        outstanding.add(number)
        oldest = min(outstanding) if self.prune else 0
        self._among[number] = len(outstanding)
        for node in self.nodes:
            if node.engine is not None and node.frozen_since is None and (client, node.device) not in self.cut:
                self._send_to(node.device, FrameId(client, number), oldest)
        self.at(self.now + self.timeout_seconds, self._decided, client, number)

    def _send_to(self, device: int, frame: FrameId, oldest: int) -> None:
        incarnation = self.nodes[device].incarnation
        given = self.timeout_seconds if self.pace is None else self.pace.given(device, self.timeout_seconds)
        received = Received(Frame(frame, oldest, given, ("input", frame.number)), frame.client)
        arrive = partial(self._deliver, device, incarnation, received)
        self._carry(("in", device), received.message, arrive)
        if self.random.random() < self.network.duplication:
            self._after(LATE_COPY_SECONDS * self.random.random(), arrive)

    def _decided(self, client: str, number: int) -> None:
        if number in self.clients[client]:
            self.clients[client].discard(number)
            if self.pace is not None:
                seconds = self.now - self.sent[number] if number in self.answers else self.timeout_seconds
                late = all(answer.late for _, answer in self.answers.get(number, ()))
                self.pace.finished(seconds, self._among[number], late)

    def _answered(self, device: int, client: str, message: Answer | Refused) -> None:
        """It arrives at the client."""
        if (device, client) in self.cut:
            return
        if isinstance(message, Refused):
            assert message.reason, f"frame {message.frame.number} is refused without a reason"
            self.refusals.append(message)
            return
        number = message.frame.number
        self.answers.setdefault(number, []).append((self.now, message))
        if self.pace is not None:
            self.pace.answered(device, self.now - self.sent[number] - message.seconds)
        up = sum(node.engine is not None and node.frozen_since is None for node in self.nodes)
        if message.coverage == 1.0 or len(self.answers[number]) >= up:
            self._decided(client, number)

    # -- judging

    def _judge(self, node: Node, message: Answer) -> None:
        """An answer says what it was computed with."""
        number, device, exchanges = message.frame.number, node.device, node.manifest.exchanges
        admission = self.admissions[device, message.frame]
        assert admission.answered is None, f"frame {number} is answered twice by device {device}"
        admission.answered = self.now
        for exchange, sources in zip(exchanges, message.sources, strict=True):
            parity = exchange.shards[-1]
            for shard, source in zip(exchange.shards, sources, strict=True):
                assert source in {-1, *shard.devices, *(parity.devices if parity.parity_of else ())}
            if exchange.owners is not None:
                continue
            came = (s.neurons for s, source in zip(exchange.shards, sources, strict=True) if source >= 0)
            there = sum(map(len, came)) / exchange.neurons
            assert message.coverage <= there + 1e-9, f"frame {number} of device {device}: more coverage than sources"
        truth = message.outputs
        claimed = message.coverage, message.from_spares
        really = float(min(truth.present, default=1.0)), float(max(truth.spares, default=0.0))
        wrong = f"frame {number} of device {device} claims {claimed}, but was computed with {really}"
        assert all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(claimed, really, strict=True)), wrong
        assert (message.coverage == 1.0) == (really[0] == 1.0), wrong
        if message.expected is not None:
            assert truth.taken_down == {frozenset(message.down)}, f"frame {number} was not computed in one view"
        if self.judge is not None:
            self.judge(device, message, truth)

    def check(self) -> None:
        """Every admitted frame was answered by its deadline by every device that could."""
        for (device, frame), admission in self.admissions.items():
            node = self.nodes[device]
            end = admission.deadline + MARGIN_SECONDS
            still = [*node.disturbed, *([(node.frozen_since, self.now)] if node.frozen_since is not None else [])]
            disturbed = any(a < end and b > admission.at for a, b in still)
            same = node.engine is not None and node.incarnation == admission.incarnation
            if self.prune or disturbed or not same or end > self.now:
                continue
            assert admission.answered is not None, f"device {device} did not answer frame {frame.number}"
            assert admission.answered <= end, f"device {device} answered frame {frame.number} late"

    def drain(self) -> None:
        """Send no more frames; once the last one's time is over, nothing of any is kept for long."""
        self._last_frame = self.now
        given_up = self.settings.maximum_wait + self.settings.pass_after + MARGIN_SECONDS
        end = max(admission.deadline for admission in self.admissions.values()) + given_up
        self.run(end - given_up + MARGIN_SECONDS)
        while self.now < end and any(node.engine and node.engine.frames.buffered for node in self.nodes):
            self.run(self.now + 0.2)
        for node in self.nodes:
            if node.engine is not None:
                kept = [frame.id.number for frame in node.engine.frames]
                assert not kept, f"device {node.device} still keeps frames {kept}"
                assert not node.engine.frames.buffered, f"device {node.device} still keeps arrays"
                assert not node.values, f"device {node.device} still keeps values"

    def coverage(self, since: float = 0.0) -> list[float]:
        """Per frame sent from ``since`` on: the best answer's coverage, 0 when there was none."""
        return [
            max((answer.coverage for _, answer in self.answers.get(number, [])), default=0.0)
            for number, sent in self.sent.items()
            if sent >= since
        ]


_MADE: dict[tuple[str, str], tuple[Plan, tuple[Manifest, ...], tuple[Codec, ...]]] = {}


def certified(plan: Plan, spares: str) -> tuple[Plan, tuple[Manifest, ...], tuple[Codec, ...]]:
    """The plan with an accuracy for every failure set, and its devices' manifests and codecs; made once."""
    if (plan.digest, spares) not in _MADE:
        failed = [down for size in range(plan.devices) for down in failure_sets(plan.devices, size)]
        certificate = Certificate("data", "0", 100, 1.0, {down: 1 - len(down) / plan.devices for down in failed})
        plan = replace(plan, certificate=certificate)
        manifests = tuple(make_manifest(plan, device, spares) for device in range(plan.devices))
        codecs = tuple(Codec(plan.digest, manifest) for manifest in manifests)
        _MADE[plan.digest, spares] = plan, manifests, codecs
    return _MADE[plan.digest, spares]
