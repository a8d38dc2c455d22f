"""The healthy path is straight: how many functions a device calls for an exchange while everyone is up. And whoever
leaves it, because a device dies, does no more than somebody lacks."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import zmq

import robustdice
from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from robustdice.bundle.read import Bundle
from robustdice.plan import Holder, Shard
from robustdice.runtime.executor import Executor
from robustdice.runtime.protocol.engine import Engine
from robustdice.runtime.protocol.events import Action, Event, Note, PeerDown, PeerUp, Received, RunPieces, Send
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.messages import Answer, Frame, FrameId, Message, Pass, Shards, Want
from robustdice.runtime.wire.watch import Watch, received
from robustdice.runtime.worker import Worker

HERE = str(Path(robustdice.__file__).parent)
FRAMES = 8
CALLS = {(2, True): 95, (4, True): 125, (4, False): 400}
"""Functions of ours for an exchange, by the number of devices, and whether nothing irregular happens to frames; with a
frame's arrival and answer in it."""

DIES_IN = 1


class Device:
    """Everything of a device but its sockets; what it sends is in ``sent``."""

    def __init__(self, bundle: Bundle) -> None:
        self.me, devices = bundle.manifest.device, bundle.manifest.devices
        self.engine = Engine(bundle.manifest)
        self.codec = Codec(bundle.manifest.plan_digest, bundle.manifest, self.engine.views)
        self.worker = Worker(Executor(bundle), lambda: None)
        self.sent: deque[tuple[int | str, Message | list[Any]]] = deque()
        self.said: list[tuple[int | str, Message]] = []
        self.given: list[Action] = []
        for peer in range(devices):
            if peer != self.me:
                self.handle(PeerUp(peer), 0.0)

    def handle(self, event: Event, now: float) -> None:
        for action in self.engine.handle(event, now):
            if isinstance(action, Send):
                self.send(action.to, action.message)
            elif not isinstance(action, Note):
                self.given.append(action)
                self.worker.give(action)
        if (result := self.worker.result()) is not None:
            self.handle(result, now)

    def send(self, to: int | str, message: Message) -> None:
        self.said.append((to, message))
        self.sent.append((to, message if isinstance(to, str) else self.codec.encode(message)))

    def hear(self, parts: list[Any], sender: int, now: float) -> None:
        self.handle(Received(self.codec.decode(parts, sender)), now)  # type: ignore[arg-type]


class Dying(Device):
    """Its last words are of the stage before ``DIES_IN``."""

    def send(self, to: int | str, message: Message) -> None:
        if not isinstance(message, Shards) or message.stage < DIES_IN:
            super().send(to, message)


def run(devices: Sequence[Device], now: float) -> list[Message]:
    """Let everything arrive that was sent; what clients were sent."""
    answers: list[Message] = []
    while any(device.sent for device in devices):
        for device in devices:
            while device.sent:
                to, sent = device.sent.popleft()
                if isinstance(sent, list):
                    devices[int(to)].hear(sent, device.me, now)
                else:
                    answers.append(sent)
    return answers


@pytest.fixture(autouse=True)
def all_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustdice.runtime.worker.BRIEF_SECONDS", np.inf)


@pytest.mark.parametrize(("number", "straight"), CALLS)
def test_an_exchange_takes_few_calls(number: int, straight: bool, tmp_path: Path) -> None:
    network = Network()
    devices = [Device(bundle) for bundle in write_bundles(tmp_path, make_plan(number, 1 if straight else 3), network)]
    run(devices, 0.0)
    images = np.random.default_rng(0).standard_normal((2 * FRAMES, 1, *INPUT_SHAPE)).astype(np.float32)
    calls, answers = 0, list[Message]()

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(HERE)

    for k, image in enumerate(images):
        # What is worked out once is worked out by the second half.
        sys.setprofile(count if k >= FRAMES else None)
        try:
            for device in devices:
                device.handle(Received(Frame(FrameId("ab", k), k, 2.0, image)), 1.0 + 0.001 * k)
                if not straight:
                    device.engine.frames.get(FrameId("ab", k)).unfold()  # type: ignore[union-attr]
            answers += run(devices, 1.0 + 0.001 * k)
        finally:
            sys.setprofile(None)
    assert len(answers) == number * len(images)
    for answer in answers:
        assert isinstance(answer, Answer)
        assert answer.coverage == 1.0
        np.testing.assert_allclose(answer.outputs, network.run(images[answer.frame.number])[0], rtol=1e-4, atol=1e-4)
    exchanges = len(devices[0].engine.manifest.exchanges)
    assert calls / FRAMES / number / exchanges <= CALLS[number, straight]


def test_who_takes_over_computes_and_asks_and_says_no_more_than_somebody_lacks(tmp_path: Path) -> None:
    """Three devices; each stands in for half of what the one that dies has in the stage in which all wait for it."""
    plan = make_plan(3)
    halves = [
        tuple(
            Shard(shard.neurons[half::2], (Holder(p), Holder((p + 1 + half) % 3)))
            for p, shard in enumerate(shards)
            for half in range(2)
        )
        for shards in plan.shards
    ]
    network = Network()
    kinds = (Device, Device, Dying)
    bundles = write_bundles(tmp_path, replace(plan, shards=tuple(halves)), network)
    devices = [kind(bundle) for kind, bundle in zip(kinds, bundles, strict=True)]
    run(devices, 0.0)
    image = np.random.default_rng(0).standard_normal((1, *INPUT_SHAPE)).astype(np.float32)
    for device in devices:
        device.handle(Received(Frame(FrameId("ab", 1), 1, 2.0, image)), 1.0)
    assert run(devices, 1.0) == []
    survivors = devices[:2]
    for device in survivors:
        device.said.clear()
        device.given.clear()
        device.handle(PeerDown(2), 1.1)
    answers = run(survivors, 1.1)
    assert [(a.coverage, a.down) for a in answers if isinstance(a, Answer)] == [(1.0, (2,))] * 2
    last = len(bundles[0].manifest.stages) - 1
    for device in survivors:
        peer = 1 - device.me
        assert [task.stage for task in device.given if isinstance(task, RunPieces)] == [DIES_IN]
        assert [(to, m.stage) for to, m in device.said if isinstance(m, Want)] == [(peer, DIES_IN)]
        sent = Counter((to, m.stage) for to, m in device.said if isinstance(m, Shards))
        # The question may cross what answers it.
        assert sent in [{(peer, 1): times} | {(peer, k): 1 for k in range(2, last)} for times in (1, 2)]


def test_a_frame_leaves_the_straight_path_when_a_peer_passes_it(tmp_path: Path) -> None:
    devices = [Device(bundle) for bundle in write_bundles(tmp_path, make_plan(2, 2), Network())]
    run(devices, 0.0)
    frame = FrameId("ab", 1)
    devices[1].handle(Received(Frame(frame, 1, 2.0, np.zeros((1, *INPUT_SHAPE), np.float32))), 1.0)
    assert devices[1].engine.frames.get(frame).straight is not None  # type: ignore[union-attr]
    devices[1].hear(devices[0].codec.encode(Pass(0, frame)), 0, 1.0)
    (answer,) = (sent for to, sent in devices[1].sent if isinstance(to, str))
    assert isinstance(answer, Answer)
    assert (answer.coverage, answer.down) == (1.0, (0,))


def test_a_socket_is_ready_whoever_has_noticed_what_has_come() -> None:
    """libzmq may take notice of what has come in while a socket is used to send: its descriptor says nothing then."""
    context: zmq.Context[Any] = zmq.Context()
    watch = Watch()
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    try:
        one.bind("inproc://pair")
        other.connect("inproc://pair")
        watch.register(one)
        assert watch.wait(0.0) == []
        for k in range(3):
            other.send(b"%d" % k)
        assert watch.wait(1.0) == [one]
        assert watch.wait(0.0) == [one]  # nothing was received
        one.getsockopt(zmq.EVENTS)  # takes notice, as sending may
        watch.used(one)
        assert [frame.bytes for (frame,) in received(one)] == [b"0", b"1", b"2"]
        assert watch.wait(0.0) == []
        other.send(b"3")
        one.getsockopt(zmq.EVENTS)
        watch.used(one)
        assert watch.wait(1.0) == [one]
        watch.unregister(one)
        assert watch.wait(0.0) == []
    finally:
        watch.close()
        one.close(0)
        other.close(0)
        context.term()
