"""A device that computes brief stages by itself goes on listening; what is long, another thread computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bundles import INPUT_SHAPE, make_manifest, make_plan
from robustdice.bundle.manifest import Manifest
from robustdice.runtime.device import AT_A_TIME_SECONDS, DRAIN_SECONDS, Loop
from robustdice.runtime.protocol.engine import Engine
from robustdice.runtime.protocol.events import PeerDown, PeerUp, Received, RunPieces, RunStage, Settings
from robustdice.runtime.wire.messages import Answer, Frame, FrameId, Hello, Message, Parcel, Pulse
from robustdice.runtime.worker import BRIEF_SECONDS, Worker

STAGE_SECONDS = 0.003
FRAMES = 8


class Arithmetic:
    """Takes its time for stages and next to none for pieces that are computed later, and gives zeros."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.assemblies: list[Any] = [self] * len(manifest.exchanges)
        self.threads: list[int] = []

    def run_local(self, *_: Any) -> dict[str, Any]:
        self.threads.append(threading.get_ident())
        time.sleep(STAGE_SECONDS)
        return {self.manifest.output: np.zeros((1, self.manifest.outputs), np.float32)}

    def read_by_pieces(self, *_: Any) -> dict[str, Any]:
        return {}

    def keep(self, *_: Any) -> dict[str, Any]:
        return {}

    def value(self, *_: Any) -> dict[str, Any]:
        return {}

    def run_pieces(self, stage: int, pieces: tuple[int, ...], *_: Any) -> tuple[Parcel, ...]:
        shards = [shard for piece in pieces for shard in self.manifest.stages[stage].pieces[piece].shards]
        return (Parcel(tuple(shards), [np.zeros(1)] * len(shards)),)


class Crowd:
    """A transport over which a client sends all its frames at once, and is answered."""

    dropped = 0

    def __init__(self, arithmetic: Arithmetic, stop: threading.Event) -> None:
        self._arithmetic, self._stop = arithmetic, stop
        array = np.zeros((1, *INPUT_SHAPE), np.float32)
        self._events = [Received(Frame(FrameId("c", n), 0, 60.0, array)) for n in range(FRAMES)]
        self.computed: list[int] = []
        """How many stages had been computed at each poll."""
        self.answered = 0

    def send(self, _: int | str, message: Message) -> bool:
        self.answered += isinstance(message, Answer)
        if self.answered == FRAMES:
            self._stop.set()
        return True

    def poll(self, timeout_seconds: float) -> list[Received | PeerUp | PeerDown]:
        self.computed.append(len(self._arithmetic.threads))
        if self._events:
            events, self._events = self._events, []
            return [*events]
        time.sleep(min(timeout_seconds, 0.001))
        return []

    def waker(self) -> Callable[[], None]:
        return lambda: None

    def status(self, _: float) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def test_a_device_listens_between_brief_stages_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustdice.runtime.worker.BRIEF_SECONDS", np.inf)  # all is computed at once
    manifest, stop = make_manifest(make_plan(3), 0), threading.Event()
    arithmetic = Arithmetic(manifest)
    crowd = Crowd(arithmetic, stop)
    worker = Worker(arithmetic, crowd.waker())  # type: ignore[arg-type]
    Loop(Engine(manifest), crowd, worker, "device-0").run(stop)
    assert set(arithmetic.threads) == {threading.get_ident()}
    assert len(arithmetic.threads) == FRAMES * len(manifest.stages)
    assert STAGE_SECONDS > AT_A_TIME_SECONDS
    assert max(np.diff([*crowd.computed, len(arithmetic.threads)])) == 1


def test_a_stage_is_not_brief_because_standing_in_for_others_in_it_is() -> None:
    manifest = make_manifest(make_plan(3), 0)
    arithmetic = Arithmetic(manifest)
    worker = Worker(arithmetic, lambda: None)  # type: ignore[arg-type]
    worker.start()
    try:
        for number in range(3):
            frame = FrameId("c", number)
            for task in (RunStage(frame, 0, 0, (), (), frozenset()), RunPieces(frame, 0, (), frozenset())):
                worker.give(task)
                done = worker.result()
                while done is None:
                    done = worker.result()
                    time.sleep(0.001)
                assert done.task == task
                assert done.error is None
    finally:
        worker.stop()
    assert set(arithmetic.threads) == {worker.ident}


def test_standing_in_for_others_in_a_brief_stage_waits_for_no_other_thread() -> None:
    """Not at the first time either, which is when a frame is under way and a device has just died."""
    arithmetic = Arithmetic(make_manifest(make_plan(3), 0))
    worker, frame = Worker(arithmetic, lambda: None), FrameId("c", 0)  # type: ignore[arg-type]
    worker.start()
    try:
        worker.give(RunStage(frame, 0, 0, (), (), frozenset()))
        while worker.result() is None:
            time.sleep(0.001)
        worker._seconds[RunStage, 0] = BRIEF_SECONDS  # as if that had been brief
        worker.give(RunPieces(frame, 0, (), frozenset()))
        assert worker.result() is not None, "it is computed while its result is asked for"
    finally:
        worker.stop()


class Chatter:
    """A transport whose every poll brings a word and takes ``poll_seconds``, by a clock that nothing else moves."""

    dropped = 0

    def __init__(self, poll_seconds: float, polls: int, stop: threading.Event) -> None:
        self._poll_seconds, self._polls, self._stop = poll_seconds, polls, stop
        self.now, self.polled = 1000.0, 0
        self.pulses: list[tuple[float, int]] = []
        """When pulses were sent, and after how many polls."""
        self.standstill: tuple[int, float] | None = None
        """After which poll this device stands still, and for how long."""

    def monotonic(self) -> float:
        return self.now

    def send(self, _: int | str, message: Message) -> bool:
        if isinstance(message, Pulse):
            self.pulses.append((self.now, self.polled))
        return True

    def poll(self, _: float) -> list[Received | PeerUp | PeerDown]:
        self.now += self._poll_seconds
        self.polled += 1
        if self.polled == self._polls:
            self._stop.set()
        if self.standstill is not None and self.polled == self.standstill[0]:
            self.now += self.standstill[1]
        return [PeerUp(1)] if self.polled == 1 else [Received(Hello(1, "1", reply=False))]

    def waker(self) -> Callable[[], None]:
        return lambda: None

    def status(self, _: float) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def listened_to(chatter: Chatter, stop: threading.Event, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("robustdice.runtime.device.time", chatter)
    manifest = make_manifest(make_plan(2), 0)
    worker = Worker(Arithmetic(manifest), chatter.waker())  # type: ignore[arg-type]
    Loop(Engine(manifest), chatter, worker, "device-0").run(stop)


@pytest.mark.parametrize("poll_seconds", [0.0003, 0.005])
def test_however_much_arrives_timers_go_off_within_the_stated_time(
    poll_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    chatter = Chatter(poll_seconds, int(2.0 / poll_seconds), stop)
    listened_to(chatter, stop, monkeypatch)
    late = np.diff([at for at, _ in chatter.pulses]) - Settings().pulse
    assert len(late) > 15
    assert max(late) <= DRAIN_SECONDS + 2 * poll_seconds + 1e-9


def test_what_was_said_while_a_device_stood_still_is_read_before_its_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    chatter = Chatter(0.001, 200, stop)
    chatter.standstill = 50, 1.0
    listened_to(chatter, stop, monkeypatch)
    assert min(polled for at, polled in chatter.pulses if at > 1001.0) >= 55
