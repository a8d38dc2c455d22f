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
from robustdice.runtime.device import AT_A_TIME_SECONDS, Loop
from robustdice.runtime.protocol.engine import Engine
from robustdice.runtime.protocol.events import PeerDown, PeerUp, Received, RunPieces, RunStage
from robustdice.runtime.wire.messages import Answer, Frame, FrameId, Message, Parcel
from robustdice.runtime.worker import Worker

STAGE_SECONDS = 0.003
FRAMES = 8


class Arithmetic:
    """Takes its time for stages and next to none for pieces that are computed later, and gives zeros."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.threads: list[int] = []

    def run_local(self, *_: Any) -> dict[str, Any]:
        self.threads.append(threading.get_ident())
        time.sleep(STAGE_SECONDS)
        return {self.manifest.output: np.zeros((1, self.manifest.outputs), np.float32)}

    def read_by_pieces(self, *_: Any) -> dict[str, Any]:
        return {}

    def keep(self, *_: Any) -> dict[str, Any]:
        return {}

    def assemble(self, *_: Any) -> dict[str, Any]:
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
