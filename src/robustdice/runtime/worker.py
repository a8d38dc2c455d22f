"""Computing a device's tasks: at once where they are brief, in a thread of their own where they are not."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.executor import Executor, Values
from robustdice.runtime.protocol.events import Computed, Forget, RunPieces, RunStage
from robustdice.runtime.wire.messages import FrameId

log = logging.getLogger(__name__)

BRIEF_SECONDS = 0.001
"""What takes no longer is computed at once: handing it over to another thread would take about as long."""

REMEMBERED_PIECES = 256


class Worker(threading.Thread):
    """Computes one task at a time, and keeps the values that frames in flight still need.

    Long tasks are computed in a thread of their own, so that the device can go on talking; those that are brief, by
    those before them, when their results are asked for. All that is given is done in order, so that never two threads
    are at it at once.
    """

    def __init__(self, executor: Executor, wake: Callable[[], None]) -> None:
        """``wake`` is called from this thread after each result."""
        super().__init__(name="compute", daemon=True)
        self._tasks: queue.SimpleQueue[RunStage | RunPieces | Forget | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Computed] = queue.SimpleQueue()
        self._given: deque[RunStage | RunPieces | Forget] = deque()
        """What is to be done next; nothing while the thread has something to do."""
        self._away = 0
        """Tasks that the thread was given, and whose results were not asked for yet."""
        self._seconds: dict[tuple[type, int], float] = {}
        """What a stage usually takes, and what standing in for others in it."""
        self._executor, self._wake = executor, wake
        self._left = lru_cache(REMEMBERED_PIECES)(partial(_left, executor))
        self._inputs: dict[FrameId, dict[int, tuple[Values, frozenset[int]]]] = {}
        """For every stage that a frame has entered: what its pieces read, and those that may still be asked for."""
        self._kept: dict[FrameId, Values] = {}
        """What the stages after the frame's last one need."""

    def give(self, task: RunStage | RunPieces | Forget) -> None:
        """Something to do, after all that was given before."""
        if self._away:
            self._hand_over(task)
        else:
            self._given.append(task)

    @property
    def at_hand(self) -> bool:
        """Whether there is something to do that the thread does not do."""
        return bool(self._given)

    def result(self) -> Computed | None:
        """What was computed next, if anything was."""
        if self._away:
            if self._results.empty():
                return None
            self._away -= 1
            return self._results.get()
        while self._given:
            task = self._given.popleft()
            if isinstance(task, Forget):
                self._forget(task.frame)
            elif self._usual(task) <= BRIEF_SECONDS:
                return self._attempt(task)
            else:
                for each in (task, *self._given):
                    self._hand_over(each)
                self._given.clear()
        return None

    def _usual(self, task: RunStage | RunPieces) -> float:
        """Seconds that a task takes. To stand in for others in a stage, before that was ever done, takes about as long
        as the stage itself."""
        of_stage = self._seconds.get((RunStage, task.stage), math.inf)
        return self._seconds.get((type(task), task.stage), of_stage)

    def _hand_over(self, task: RunStage | RunPieces | Forget) -> None:
        self._away += not isinstance(task, Forget)
        self._tasks.put(task)

    def run(self) -> None:
        """Compute until :meth:`stop`."""
        while self._do(self._tasks.get()):
            pass

    def _do(self, task: RunStage | RunPieces | Forget | None) -> bool:
        """Whether to go on. (Not in the loop itself, which would hold on to a task while it waits for the next one.)"""
        if isinstance(task, Forget):
            self._forget(task.frame)
        elif task is not None:
            self._results.put(self._attempt(task))
            self._wake()
        return task is not None

    def stop(self) -> None:
        """End the thread after its current task."""
        self._tasks.put(None)
        self.join()

    def _attempt(self, task: RunStage | RunPieces) -> Computed:
        started = time.perf_counter()
        try:
            result = self._compute(task)
        except Exception as error:  # whatever ONNX Runtime raises costs this frame, not the device
            log.exception("stage %d of frame %d failed", task.stage, task.frame.number)
            return Computed(task, (), error=f"{type(error).__name__}: {error}"[:300])
        taken = time.perf_counter() - started
        kind = type(task), task.stage
        usual = self._seconds.get(kind, taken)
        self._seconds[kind] = min(taken, usual + (taken - usual) / 8)  # once may be chance
        return result

    def _forget(self, frame: FrameId) -> None:
        self._inputs.pop(frame, None)
        self._kept.pop(frame, None)

    def _compute(self, task: RunStage | RunPieces) -> Computed:
        executor, stage = self._executor, task.stage
        manifest = executor.manifest
        inputs = self._inputs.setdefault(task.frame, {})
        outputs = None
        if isinstance(task, RunStage):
            if inputs:
                for before in [each for each in inputs if each < task.settled]:
                    del inputs[before]
            values = executor.run_local(stage, self._enter(task, manifest), task.down)
            self._kept[task.frame] = executor.keep(stage, values)
            if stage + 1 == len(manifest.stages):
                outputs = values[manifest.output].reshape(-1)
            if left := self._left(stage, task.pieces):
                inputs[stage] = executor.read_by_pieces(stage, values), left
            parcels = executor.run_pieces(stage, task.pieces, values, task.down, task.due, task.owned)
        else:
            values, left = inputs[stage]
            parcels = executor.run_pieces(stage, task.pieces, self._read(task, values), task.down, (), task.owned)
            inputs[stage] = values, left & self._left(stage, task.pieces)
            if not inputs[stage][1]:
                del inputs[stage]
        return Computed(task, parcels, outputs)

    def _read(self, task: RunPieces, inputs: Values) -> Values:
        """What pieces read that stand in for others: with the sums of what is to be owned."""
        values = dict(inputs)
        sums_of = self._executor.manifest.sums_of
        for exchange in {sums_of[owners] for owners, _ in task.owned}:
            values.update(self._executor.assemblies[exchange].value(task.gathered))
        return values

    def _enter(self, task: RunStage, manifest: Manifest) -> Values:
        if task.array is not None:
            return {manifest.input: task.array}
        values = self._kept.pop(task.frame)
        for exchange in manifest.stages[task.stage - 1].exchanges:
            values.update(self._executor.assemblies[exchange].value(task.gathered))
        return values


def _left(executor: Executor, stage: int, pieces: tuple[int, ...]) -> frozenset[int]:
    """The pieces of a stage that may still be asked for once some are computed. What these gave is kept; only those of
    owners are asked for again, for other slices."""
    manifest = executor.manifest
    every = enumerate(manifest.stages[stage].pieces)
    return frozenset(k for k, piece in every if k not in pieces or manifest.is_owners(piece))
