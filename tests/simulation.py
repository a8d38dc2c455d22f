"""A deterministic world for engines: virtual time, a seeded network, seeded faults, clients that judge what they get.

Arrays are tokens, so that what a value was assembled from can be read off it. Every answer is checked when it is
given, and memory after every event; :meth:`World.check` judges the whole run. Equal seeds give equal ``trace``\\ s.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from bundles import make_manifest
from robustdice.bundle.manifest import Manifest
from robustdice.plan import Certificate, Plan, failure_sets
from robustdice.runtime.choice import Pace
from robustdice.runtime.protocol.events import Received
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.messages import Answer, Frame, FrameId, Refused, StatusRequest
from simulated_devices import Node
from simulated_network import ConnectedDevices, Network
from tokens import Truth

CLIENT = "c0"
MARGIN_SECONDS = 0.1
PAUSE_SECONDS = 0.1
"""So long at most, and once or twice a second, does an operating system let a process stand still that has work."""
LATE_COPY_SECONDS = 3.0
"""A second copy of a frame may arrive when everybody is done with it."""


class World(ConnectedDevices):
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
        nodes = [Node(device, *of) for device, of in enumerate(zip(manifests, codecs, strict=True))]
        super().__init__(nodes, seed, compute_seconds, network or Network())
        self.window, self.prune = window, prune
        self.sent: dict[int, float] = {}
        self.clients: dict[str, set[int]] = {}
        """Numbers of the frames that each of them waits for; numbers are drawn from one sequence for all."""
        self.answers: dict[int, list[tuple[float, Answer]]] = {}
        self.refusals: list[Refused] = []
        self.refused: set[int] = set()
        """Frames that some device has refused."""
        self.interval = 0.01
        self.timeout_seconds = 2.0
        self.pace: Pace | None = None
        self.judge: Callable[[int, Answer, Truth], None] | None = None
        """What else is to be said of an answer when it is given."""
        self.stood: dict[int, float] = {}
        """What the standstill was when a frame was sent."""
        self._among: dict[int, int] = {}
        self._last_frame = 0.0
        self._pauses: random.Random | None = None

    @property
    def awaited(self) -> bool:
        return any(self.clients.values())

    # -- what is no fault

    def let_pause(self) -> None:
        """From now on everybody pauses now and then: devices at any moment, clients while they hand over a frame."""
        self._pauses = random.Random(self.seed)  # noqa: S311
        for node in self.nodes:
            self._pause_later(node.device, self._pauses)

    def _pause_later(self, device: int, draw: random.Random) -> None:
        def pause() -> None:
            if self.now <= self._last_frame:
                self.pause(device, PAUSE_SECONDS * draw.random())
                self._pause_later(device, draw)

        self.after(0.3 + 0.7 * draw.random(), pause)

    # -- clients

    def start_client(self, first: float, last: float, name: str = CLIENT) -> None:
        self.clients[name] = set()
        self._last_frame = max(self._last_frame, last)

        def greet() -> None:
            for node in self.nodes:
                self.deliver(node.device, node.incarnation, Received(StatusRequest(name)))

        def step() -> None:
            if self.now > min(last, self._last_frame):
                return
            if len(self.clients[name]) < (self.window if self.pace is None else self.pace.allowed):
                self._send_frame(name)
            self.after(self.interval, step)

        self.at(first - 0.1, greet)
        self.at(first, step)

    def _send_frame(self, client: str) -> None:
        number, outstanding = len(self.sent), self.clients[client]
        self.sent[number], self.stood[number] = self.now, self.standstill
        outstanding.add(number)
        oldest = min(outstanding) if self.prune else 0
        self._among[number] = len(outstanding)
        pauses, held = self._pauses, 0.0
        for node in self.nodes:
            if pauses is not None and pauses.random() < 0.02:
                held += PAUSE_SECONDS * pauses.random()
            if node.engine is not None and node.frozen_since is None and (client, node.device) not in self.cut:
                frame = FrameId(client, number)
                if held:
                    self.after(held, self.send_to, node.device, frame, oldest)
                else:
                    self.send_to(node.device, frame, oldest)
        self.after(self.timeout_seconds, self._decided, client, number)

    def send_to(self, device: int, frame: FrameId, oldest: int) -> None:
        """A client hands a frame to a device."""
        incarnation = self.nodes[device].incarnation
        given = (
            self.timeout_seconds if self.pace is None else self.pace.given(range(len(self.nodes)), self.timeout_seconds)
        )
        received = Received(Frame(frame, oldest, given, ("input", frame.number)), frame.client)
        arrive = partial(self.deliver, device, incarnation, received)
        self.carry(("in", device), received.message, arrive)
        if self.random.random() < self.network.duplication:
            self.after(LATE_COPY_SECONDS * self.random.random(), arrive)

    def _decided(self, client: str, number: int) -> None:
        if number in self.clients[client]:
            self.clients[client].discard(number)
            if self.pace is not None:
                seconds = self.now - self.sent[number] if number in self.answers else self.timeout_seconds
                late = all(answer.late for _, answer in self.answers.get(number, ()))
                self.pace.finished(seconds, self._among[number], late)
                if number not in self.answers:
                    self.pace.unanswered(dict.fromkeys(range(len(self.nodes)), self.sent[number]))

    def reply(self, node: Node, client: str, message: Answer | Refused) -> None:
        if isinstance(message, Answer):
            self._judge(node, message)
        else:
            self.refused.add(message.frame.number)
            if (admission := self.admissions.get((node.device, message.frame))) is not None:
                admission.given_up = True
        self.carry(("out", node.device), message, partial(self._answered, node.device, client, message))

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
            self.pace.answered(device, self.now - self.sent[number] - message.seconds, self.now)
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
        margin = MARGIN_SECONDS + (PAUSE_SECONDS if self._pauses is not None else 0.0)
        for (device, frame), admission in self.admissions.items():
            node = self.nodes[device]
            end = admission.deadline + margin
            still = [*node.disturbed, *([(node.frozen_since, self.now)] if node.frozen_since is not None else [])]
            disturbed = any(a < end and b > admission.at for a, b in still)
            same = node.engine is not None and node.incarnation == admission.incarnation
            if self.prune or disturbed or not same or end > self.now:
                continue
            if admission.given_up and self._pauses is not None:
                continue  # it paused when it was to answer
            assert admission.answered is not None, f"device {device} did not answer frame {frame.number}"
            assert admission.answered <= end, f"device {device} answered frame {frame.number} late"

    def drain(self) -> None:
        """Send no more frames; once the last one's time is over, nothing of any is kept for long."""
        self._last_frame = self.now
        given_up = self.settings.maximum_wait + self.settings.minimum_wait + MARGIN_SECONDS
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
    key = plan.digest, spares
    if key not in _MADE:
        failed = [down for size in range(plan.devices) for down in failure_sets(plan.devices, size)]
        certificate = Certificate("data", "0", 100, 1.0, {down: 1 - len(down) / plan.devices for down in failed})
        plan = replace(plan, certificate=certificate)
        manifests = tuple(make_manifest(plan, device, spares) for device in range(plan.devices))
        codecs = tuple(Codec(plan.digest, manifest) for manifest in manifests)
        _MADE[key] = plan, manifests, codecs
    return _MADE[key]
