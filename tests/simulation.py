"""A deterministic world for engines: virtual time, a seeded network, seeded faults.

Arrays are tokens, so that what a value was assembled from can be read off it. Every answer is checked when it is
given; :meth:`World.check` judges the whole run.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

from bundles import make_manifest
from robustdice.plan import Certificate, Plan, failure_sets
from robustdice.runtime.choice import Pace
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
from robustdice.runtime.wire.messages import (
    Answer,
    Frame,
    FrameId,
    Hello,
    Parcel,
    Pass,
    Pulse,
    Refused,
    ShardId,
    Shards,
    Want,
)
from shared_link import SharedLink, size_of

CLIENT = "c0"
GIVEN_UP_SECONDS = 5.0
"""TCP's patience with a peer that is not there any more."""
MARGIN_SECONDS = 0.1


@dataclass
class Network:
    """What can happen to a message between devices."""

    delay: float = 0.001
    loss: float = 0.0
    duplication: float = 0.0
    slow: float = 0.0
    """Probability that a message takes up to 50 ms."""
    bytes_per_second: float | None = None
    """Of one link that all share (None: no limit); ``delay`` is that of its loaded queue then."""


@dataclass(frozen=True)
class Truth:
    """What something was really computed from: for every exchange so far the share of its neurons that is in it, and
    the share that came from spares; and which devices were taken for down when any part of it was computed."""

    present: tuple[Fraction, ...] = ()
    spares: tuple[Fraction, ...] = ()
    taken_down: frozenset[frozenset[int]] = field(default=frozenset(), compare=False)

    def in_view(self, down: frozenset[int]) -> Truth:
        """What is computed from it while the devices ``down`` are."""
        return replace(self, taken_down=self.taken_down | {down})


@dataclass(frozen=True)
class Token:
    """Stands for a shard's array."""

    frame: FrameId
    shard: ShardId
    device: int
    built_on: Truth


@dataclass
class Node:
    """A device: its engine while it runs, and the executor's values."""

    device: int
    engine: Engine | None = None
    incarnation: int = 0
    frozen_since: float | None = None
    inbox: list[Event] = field(default_factory=list)
    speed: float = 1.0
    values: dict[FrameId, dict[int, Truth]] = field(default_factory=dict)
    tick_at: float | None = None
    free_at: float = 0.0
    """When the executor has done all that it was told to."""
    standstills: list[tuple[float, float]] = field(default_factory=list)


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
        failed = [down for size in range(plan.devices) for down in failure_sets(plan.devices, size)]
        certificate = Certificate("data", "0", 100, 1.0, {down: 1 - len(down) / plan.devices for down in failed})
        self.plan, self.seed, self.spares = replace(plan, certificate=certificate), seed, spares
        self.random = random.Random(seed)  # noqa: S311
        self.network = network or Network()
        self.now = 0.0
        self.settings = Settings()
        self.manifests = [make_manifest(self.plan, device, spares) for device in range(plan.devices)]
        self.nodes = [Node(device) for device in range(plan.devices)]
        self.cut: set[tuple[int, int]] = set()
        """Ways, from a device to another, that nothing gets through."""
        self.links: set[tuple[int, int]] = set()
        self.notes: list[tuple[float, int, str]] = []
        self.wants = 0
        self.window, self.prune, self.compute_seconds = window, prune, compute_seconds
        self.sent: dict[int, float] = {}
        self.outstanding: set[int] = set()
        self.answers: dict[int, list[tuple[float, Answer]]] = {}
        self.refusals: list[Refused] = []
        self.admissions: dict[tuple[int, FrameId], Admission] = {}
        self.interval = 0.01
        self.timeout_seconds = 2.0
        self.link: SharedLink | None = None
        if self.network.bytes_per_second is not None:
            self.link = SharedLink(self.network.bytes_per_second, self.network.delay, self._after)
        self.pace: Pace | None = None
        self._among: dict[int, int] = {}
        self._sizes = {
            (e, s): math.prod(exchange.form(s).shape)
            for e, exchange in enumerate(self.manifests[0].exchanges)
            for s in range(len(exchange.shards))
        }
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for node in self.nodes:
            self.at(0.0, self.restart, node.device)

    # -- time

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (max(time, self.now), next(self._order), lambda: call(*arguments)))

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now + seconds, call)

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, call = heapq.heappop(self._heap)
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
        new = event.message if isinstance(event, Received) and isinstance(event.message, Frame) else None
        known = new is not None and new.frame in node.engine.frames
        for action in node.engine.handle(event, self.now):
            self._act(node, action)
        if new is not None and not known and new.frame in node.engine.frames:
            deadline = self.now + new.timeout_seconds
            self.admissions[device, new.frame] = Admission(device, incarnation, self.now, deadline)
        most = 4 * self.settings.window * 2 * len(self._sizes)
        assert node.engine.frames.buffered <= most, f"seed {self.seed}: memory"
        assert len(node.values) <= 2 * self.settings.window + 1, f"seed {self.seed}: values"
        self._set_timer(node)

    def _set_timer(self, node: Node) -> None:
        """Let the engine's timer go off when it is due; one that is set to go off earlier will look again."""
        assert node.engine is not None
        due = node.engine.next_due(self.now)
        if due is not None and (node.tick_at is None or due < node.tick_at):
            node.tick_at = max(due, self.now)
            self.at(node.tick_at, self._tick, node.device, node.incarnation, node.tick_at)

    def _tick(self, device: int, incarnation: int, set_for: float) -> None:
        node = self.nodes[device]
        if node.engine is None or node.incarnation != incarnation or node.frozen_since is not None:
            return
        if node.tick_at != set_for:
            return  # an earlier one took its place
        node.tick_at = None
        due = node.engine.next_due(self.now)
        if due is not None and due <= self.now:
            self._deliver(device, incarnation, Tick(due))
        else:
            self._set_timer(node)

    def _act(self, node: Node, action: Any) -> None:
        if isinstance(action, Send):
            self.wants += isinstance(action.message, Want)
            if isinstance(action.message, Answer | Refused):
                answer, device = action.message, node.device
                self._carry(("out", device), answer, lambda: self._answered(device, answer))
            elif isinstance(action.message, Hello | Pulse | Shards | Want | Pass):
                assert isinstance(action.to, int)
                self._transmit(node.device, action.to, Received(action.message))
        elif isinstance(action, RunStage | RunPieces):
            self._compute(node, action)
        elif isinstance(action, Forget):
            node.values.pop(action.frame, None)
        elif isinstance(action, Note):
            self.notes.append((self.now, node.device, action.text))

    def _compute(self, node: Node, task: RunStage | RunPieces) -> None:
        manifest = self.manifests[node.device]
        stages = node.values.setdefault(task.frame, {})
        if isinstance(task, RunStage):
            for parcel in task.gathered:
                for shard, token in zip(parcel.shards, parcel.arrays, strict=True):
                    assert (token.frame, token.shard) == (task.frame, shard), f"seed {self.seed}: a wrong array"
            before = Truth()
            if task.stage:
                before = self._truth(task.stage - 1, task.gathered, stages[task.stage - 1], task.owned)
            stages[task.stage] = before.in_view(task.down)
        assert task.stage in stages, f"seed {self.seed}: the values of stage {task.stage} are gone"
        shards = {
            shard: Token(task.frame, shard, node.device, stages[task.stage].in_view(task.down))
            for piece in task.pieces
            for shard in manifest.stages[task.stage].pieces[piece].shards
            if shard[0] not in manifest.sums_of or shard in task.owned
        }
        if isinstance(task, RunPieces):
            for shard, parcel in zip(task.owned, task.gathered, strict=True):
                built_on = self._truth(task.stage - 1, (parcel,), stages[task.stage - 1], (shard,), late=True)
                shards[shard] = Token(task.frame, shard, node.device, built_on.in_view(task.down))
        last = isinstance(task, RunStage) and task.stage + 1 == len(manifest.stages)
        wanted = task.due if isinstance(task, RunStage) else ()
        due = {shard for part in wanted for shard in part}
        parts = [*wanted, tuple(shard for shard in shards if shard not in due)]
        parcels = tuple(Parcel(part, [shards[shard] for shard in part]) for part in parts if part)
        done = Computed(task, parcels, outputs=stages[task.stage] if last else None)
        seconds = self.compute_seconds * node.speed * (0.5 + self.random.random())
        node.free_at = max(self.now, node.free_at) + seconds  # one after the other
        self.at(node.free_at, self._deliver, node.device, node.incarnation, done)

    def _truth(
        self, stage: int, parcels: tuple[Parcel, ...], before: Truth, owned: tuple[ShardId, ...], late: bool = False
    ) -> Truth:
        """What the next stage is computed from: the values of a ``stage``, and the shards gathered; a single one that
        is missing is worked out from the parity shard and all others. Of sums in slices, those that are ``owned``; of a
        ``late`` one, nothing else."""
        known, present, spares = range(len(before.present)), list(before.present), list(before.spares)
        gathered = {s: t for parcel in parcels for s, t in zip(parcel.shards, parcel.arrays, strict=True)}
        for e in self.manifests[0].stages[stage].exchanges:
            spec, shards = self.manifests[0].exchanges[e], self.manifests[0].exchanges[e].shards
            tokens = {s: token for (exchange, s), token in gathered.items() if exchange == e}
            parts = [(s, token.device, token.built_on) for s, token in tokens.items() if shards[s].neurons]
            absent = [s for s, shard in enumerate(shards) if shard.neurons and s not in tokens]
            if len(absent) == 1 and shards[-1].parity_of and len(shards) - 1 in tokens:
                used = [token.built_on for token in tokens.values()]
                worst = Truth(
                    tuple(min(truth.present[k] for truth in used) for k in known),
                    tuple(max(truth.spares[k] for truth in used) for k in known),
                )
                parts.append((absent[0], tokens[len(shards) - 1].device, worst))
            sizes = {s: len(shards[s].neurons) for s, _, _ in parts}
            differ = any(truth != before for _, _, truth in parts)
            for k in known if differ else ():
                in_them = sum((sizes[s] * truth.present[k] for s, _, truth in parts), Fraction())
                of_spares = sum((sizes[s] * truth.spares[k] for s, _, truth in parts), Fraction())
                present[k] = min(present[k], in_them / sum(sizes.values()))
                spares[k] = max(spares[k], of_spares / sum(sizes.values()))
            here = [spec.in_slices[s] for owners, s in owned if owners == spec.owners]
            assert spec.owners is None or all(any(s in each for each in here) for s in sizes), "sums of no use"
            told = [(Fraction(1), Fraction(0))]
            for slice_ in here if spec.owners is not None else [] if late else spec.in_slices:
                there = [n for s in sizes if s in slice_ for n in shards[s].neurons]
                assert len(set(there)) == len(there), f"seed {self.seed}: twice"
                spare = sum(
                    sizes[s] for s, d, _ in parts if s in slice_ and (shards[s].after or d != shards[s].devices[0])
                )
                told.append((Fraction(len(there), spec.neurons), Fraction(spare, spec.neurons)))
            present.append(min(share for share, _ in told))
            spares.append(max(share for _, share in told))
        taken_down = before.taken_down.union(*(token.built_on.taken_down for token in gathered.values()))
        return Truth(tuple(present), tuple(spares), taken_down)

    # -- network

    def _delay(self) -> float:
        slow = 0.05 if self.random.random() < self.network.slow else 0.0
        return self.network.delay * (0.2 + self.random.random()) + slow * self.random.random()

    def _carry(self, queue: Hashable, message: object, arrive: Callable[[], None]) -> None:
        if self.link is None:
            self._after(self._delay(), arrive)
        else:
            self.link.send(queue, size_of(message, self._sizes), arrive)

    def _transmit(self, source: int, target: int, event: Received) -> None:
        network = self.network
        for _ in range(1 + (self.random.random() < network.duplication)):
            if (source, target) in self.links and self.random.random() >= network.loss:
                incarnation = self.nodes[target].incarnation
                queue = ("shards" if isinstance(event.message, Shards) else "words", source, target)
                self._carry(queue, event.message, partial(self._arrive, source, target, incarnation, event))

    def _arrive(self, source: int, target: int, incarnation: int, event: Event) -> None:
        if (source, target) not in self.cut:
            self._deliver(target, incarnation, event)

    def _connect(self, source: int, target: int) -> None:
        """The reconnect loop of one outgoing connection."""
        a, b = self.nodes[source], self.nodes[target]
        able = a.engine and b.engine and a.frozen_since is None and b.frozen_since is None
        if (source, target) in self.links or a.engine is None:
            return
        if able and (source, target) not in self.cut:
            self.links.add((source, target))
            self._deliver(source, a.incarnation, PeerUp(target))
        else:
            self.at(self.now + 0.05, self._connect, source, target)

    def _disconnect(self, source: int, target: int) -> None:
        if (source, target) in self.links:
            self.links.discard((source, target))
            node = self.nodes[source]
            self._deliver(source, node.incarnation, PeerDown(target))
            self.at(self.now + 0.01 + 0.04 * self.random.random(), self._connect, source, target)

    # -- faults

    def crash(self, device: int, silent: bool = False) -> None:
        """The process is gone; ``silent`` (power loss): peers learn it from its silence."""
        node = self.nodes[device]
        if node.engine is None:
            return
        node.engine, node.frozen_since = None, None
        node.incarnation += 1
        node.inbox.clear()
        node.values.clear()
        for peer in range(self.plan.devices):
            self.links.discard((device, peer))
            self.at(self.now + (GIVEN_UP_SECONDS if silent else self._delay()), self._disconnect, peer, device)

    def restart(self, device: int) -> None:
        node = self.nodes[device]
        if node.engine is not None:
            return
        node.incarnation += 1
        node.tick_at = None
        node.free_at = self.now
        node.engine = Engine(self.manifests[device], self.settings, f"{node.incarnation}")
        for peer in range(self.plan.devices):
            if peer != device:
                self._disconnect(peer, device)
                for pair in ((peer, device), (device, peer)):
                    self.at(self.now + 0.01 + 0.04 * self.random.random(), self._connect, *pair)

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
        node.standstills.append((node.frozen_since, self.now))
        node.frozen_since = None
        inbox, node.inbox = node.inbox, []
        for event in inbox:
            self._deliver(device, node.incarnation, event)
        node.tick_at = self.now
        self._tick(device, node.incarnation, self.now)

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

    def heal(self, *devices: int) -> None:
        """Everything between a device and its peers, or between some devices, gets through again."""
        self.cut = {
            way for way in self.cut if not (set(way) <= set(devices) or (len(devices) == 1 and devices[0] in way))
        }

    def slow_down(self, device: int, factor: float) -> None:
        self.nodes[device].speed = factor

    # -- the client

    def start_client(self, first: float, last: float) -> None:
        def step() -> None:
            if self.now > last:
                return
            if len(self.outstanding) < (self.window if self.pace is None else self.pace.allowed):
                self._send_frame()
            self.at(self.now + self.interval, step)

        self.at(first, step)

    def _send_frame(self) -> None:
        number = len(self.sent)
        self.sent[number] = self.now
        self.outstanding.add(number)
        oldest = min(self.outstanding) if self.prune else 0
        self._among[number] = len(self.outstanding)
        for node in self.nodes:
            if node.engine is not None and node.frozen_since is None:
                self._send_to(node.device, FrameId(CLIENT, number), oldest)
        self.at(self.now + self.timeout_seconds, self._decided, number)

    def _send_to(self, device: int, frame: FrameId, oldest: int) -> None:
        incarnation = self.nodes[device].incarnation
        given = self.timeout_seconds if self.pace is None else self.pace.given(device, self.timeout_seconds)
        received = Received(Frame(frame, oldest, given, ("input", frame.number)))
        self._carry(("in", device), received.message, lambda: self._deliver(device, incarnation, received))

    def _decided(self, number: int) -> None:
        if number in self.outstanding:
            self.outstanding.discard(number)
            if self.pace is not None:
                seconds = self.now - self.sent[number] if number in self.answers else self.timeout_seconds
                late = all(answer.late for _, answer in self.answers.get(number, ()))
                self.pace.finished(seconds, self._among[number], late)

    def _answered(self, device: int, message: Any) -> None:
        if isinstance(message, Refused):
            self.refusals.append(message)
            return
        assert isinstance(message, Answer)
        number = message.frame.number
        admission = self.admissions[device, message.frame]
        assert admission.answered is None, f"seed {self.seed}: frame {number} answered twice by device {device}"
        admission.answered = self.now
        for e, exchange in enumerate(self.manifests[0].exchanges):
            parity = exchange.shards[-1]
            for s, source in enumerate(message.sources[e]):
                able = (*exchange.shards[s].devices, *(parity.devices if parity.parity_of else ()))
                assert source == -1 or source in able
            if exchange.owners is not None:
                continue
            sizes = [len(shard.neurons) for shard in exchange.shards]
            there = sum(size for size, source in zip(sizes, message.sources[e], strict=True) if source >= 0)
            assert message.coverage <= there / exchange.neurons + 1e-9, f"seed {self.seed}: more coverage than sources"
        truth = message.outputs
        claimed = message.coverage, message.from_spares
        really = float(min(truth.present)), float(max(truth.spares))
        wrong = f"seed {self.seed}: frame {number} of device {device} claims {claimed}, but was computed with {really}"
        assert all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(claimed, really, strict=True)), wrong
        assert (message.coverage == 1.0) == (really[0] == 1.0), wrong
        if message.expected is not None:
            assert truth.taken_down == {frozenset(message.down)}, f"seed {self.seed}: {number} was not computed so"
        self.answers.setdefault(number, []).append((self.now, message))
        if self.pace is not None:
            self.pace.answered(device, self.now - self.sent[number] - message.seconds)
        up = sum(node.engine is not None and node.frozen_since is None for node in self.nodes)
        if message.coverage == 1.0 or len(self.answers[number]) >= up:
            self._decided(number)

    # -- judging

    def check(self) -> None:
        """Every admitted frame was answered by its deadline by every device that could."""
        for (device, frame), admission in self.admissions.items():
            node = self.nodes[device]
            end = admission.deadline + MARGIN_SECONDS
            still = [*node.standstills, *([(node.frozen_since, self.now)] if node.frozen_since is not None else [])]
            frozen = any(a < end and b > admission.at for a, b in still)
            same = node.engine is not None and node.incarnation == admission.incarnation
            if self.prune or frozen or not same or end > self.now:
                continue
            assert admission.answered is not None, f"seed {self.seed}: device {device} did not answer {frame.number}"
            assert admission.answered <= end, f"seed {self.seed}: device {device} answered {frame.number} late"

    def coverage(self, since: float = 0.0) -> list[float]:
        """Per frame sent from ``since`` on: the best answer's coverage, 0 when there was none."""
        return [
            max((answer.coverage for _, answer in self.answers.get(number, [])), default=0.0)
            for number, sent in self.sent.items()
            if sent >= since
        ]
