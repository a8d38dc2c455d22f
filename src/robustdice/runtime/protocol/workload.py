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
        self._tasks: deque[Task] = deque()
        self._since = 0.0
        """When the executor began with the first of them."""

    @property
    def full(self) -> bool:
        """Nothing more may be added."""
        return len(self._tasks) == QUEUED_TASKS

    def of(self, frame: FrameId) -> bool:
        """Whether one of the tasks is of a frame."""
        return any(task.frame == frame for task in self._tasks)

    def add(self, task: Task, now: float) -> None:
        """The executor is given a task."""
        if not self._tasks:
            self._since = now
        self._tasks.append(task)

    def done(self, now: float) -> float:
        """The executor is done with the first task; when it began."""
        self._tasks.popleft()
        started, self._since = self._since, now
        return started
