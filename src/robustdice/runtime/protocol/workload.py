"""What the executor has been given to do."""

from __future__ import annotations

from collections import deque

from robustdice.runtime.protocol.events import Task
from robustdice.runtime.wire.messages import FrameId

QUEUED_TASKS = 2
"""That the executor is given at once."""


class Workload:
    """The task that is computed, and what comes next: at most ``QUEUED_TASKS``, of different frames. With one in
    reserve the executor need not wait while this device hands over what it has just computed."""

    def __init__(self) -> None:
        """Nothing is to be done."""
        self.frames: deque[FrameId] = deque()
        """The frames that the tasks are of."""
        self._since = 0.0
        """When the executor began with the first of them."""

    def add(self, task: Task, now: float) -> None:
        """The executor is given a task."""
        if not self.frames:
            self._since = now
        self.frames.append(task.frame)

    def done(self, now: float) -> float:
        """The executor is done with the first task; when it began."""
        self.frames.popleft()
        started, self._since = self._since, now
        return started
