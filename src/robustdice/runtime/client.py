"""A client: frames in, answers out. One thread; the network is served while the caller waits for an answer."""

from __future__ import annotations

import os
import secrets
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from robustdice.errors import ClusterError, DataError, MessageError, OtherBuildError
from robustdice.runtime.answer import Answer, Model, probabilities_of
from robustdice.runtime.choice import Choice, Pace
from robustdice.runtime.pending import Pending
from robustdice.runtime.protocol.events import Settings
from robustdice.runtime.turns import Turns
from robustdice.runtime.wire import messages
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.config import Cluster
from robustdice.runtime.wire.keys import CLIENT_KEY_NAME, read_secret
from robustdice.runtime.wire.lines import Lines
from robustdice.runtime.wire.messages import Frame, FrameId, Refused, Status, StatusRequest
from robustdice.runtime.wire.watch import Watch, received

ASKED_AGAIN_SECONDS = 0.2
"""So long a device has to say what it serves, before all are asked again."""
CONNECT_SECONDS = 0.5
"""How long the first frame waits for more devices once one is connected."""
NEWCOMERS_AFTER = 0.25
"""After this share of its time, a frame that nobody has answered is given to devices that have come since."""
REMEMBERED_FRAMES = 64
"""So many decided frames may still get answers that teach something."""
REPLY_LIMIT = 4 * messages.OUTPUTS_LIMIT


class Client:
    """Sends frames to the devices of ``cluster_toml`` and collects the best answers.

    ``key`` is the client's secret key file (default: ``client.key`` beside the cluster file). Up to ``window`` frames
    are in flight at once in :meth:`stream`; fewer where they would take too long, and no more than devices work on at
    once (``Settings.window``) where each frame goes to all of them. ClusterError when the files are not valid. Not
    thread-safe. Close it, or use it in a ``with`` statement; what is left open is closed when collected.
    """

    def __init__(
        self,
        cluster_toml: str | os.PathLike[str],
        key: str | os.PathLike[str] | None = None,
        timeout_seconds: float = 2.0,
        window: int = 4,
    ) -> None:
        """Start to connect; nothing is waited for."""
        if not 0 < timeout_seconds <= messages.MAX_TIMEOUT_SECONDS or window < 1:
            raise ClusterError(
                f"the timeout is more than 0 and at most {messages.MAX_TIMEOUT_SECONDS:g} seconds, not "
                f"{timeout_seconds:g}, and the window 1 frame or more, not {window}"
            )
        path = Path(cluster_toml)
        self.cluster = Cluster.read(path)
        self.timeout_seconds = timeout_seconds
        self.window = window
        self.dropped = 0
        """Messages that were not valid."""
        keys = read_secret(Path(key) if key is not None else path.parent / CLIENT_KEY_NAME)
        self._codec = Codec(self.cluster.plan_digest)
        self._name = secrets.token_hex(8)
        self._next = 0
        self._model: Model | None = None
        self._pending: dict[int, Pending] = {}
        self._done: dict[int, Answer] = {}
        self._statuses: dict[int, Mapping[str, Any]] = {}
        self._turns = Turns(len(self.cluster.devices))
        self._choice = Choice(len(self.cluster.devices))
        self._pace = Pace(window, timeout_seconds, len(self.cluster.devices))
        self._decided: OrderedDict[int, Pending] = OrderedDict()
        """The last frames that were decided before all devices had answered."""
        context: zmq.Context[Any] = zmq.Context()
        self._watch = Watch()
        devices = dict(enumerate(self.cluster.devices))
        self._lines = Lines(context, self._watch, devices, self.cluster.transport, keys, REPLY_LIMIT)
        self._lines.tend(time.monotonic())
        self._finalizer = weakref.finalize(self, _close, context, self._lines, self._watch)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._finalizer()

    @property
    def model(self) -> Model:
        """What the devices serve; ClusterError when none of them can be reached within the timeout."""
        if self._model is None:
            end = time.monotonic() + max(self.timeout_seconds, 1.0)
            while self._model is None:
                self._connect(end)
                if (left := end - time.monotonic()) <= 0:
                    raise ClusterError(self.unreachable())
                self.status(min(left, ASKED_AGAIN_SECONDS))
        return self._model

    def status(self, timeout_seconds: float = 1.0) -> dict[int, Mapping[str, Any]]:
        """What each device says about itself, by device number; those that do not reply in time are absent."""
        self._statuses = {}
        end, asked = time.monotonic() + timeout_seconds, set[int]()
        parts = self._codec.encode(StatusRequest(self._name))
        while time.monotonic() < end and len(self._statuses) < len(self._lines):
            asked |= {d for d, line in self._lines.items() if d not in asked and line.connected and line.send(parts)}
            self._pump(end)
        return dict(self._statuses)

    def infer(self, array: NDArray[np.float32]) -> Answer:
        """The answer for one frame, float32 ``[C, H, W]``, within ``timeout_seconds``.

        DataError when the shape is not the model's; ClusterError when no device was ever reached.
        """
        number = self._submit(array)
        try:
            while number not in self._done:
                self._pump(self._next_due())
            return self._done.pop(number)
        finally:
            self._pending.pop(number, None)
            self._done.pop(number, None)

    def stream(self, frames: Iterable[NDArray[np.float32]]) -> Iterator[Answer]:
        """Answers in the order of ``frames``, with up to ``window`` of them in flight. Errors as :meth:`infer`'s."""
        order: list[int] = []
        source = iter(frames)
        more = True
        try:
            while True:
                while more and len(order) < self.window and self._has_room():
                    frame = next(source, None)
                    more = frame is not None
                    if frame is not None:
                        order.append(self._submit(frame))
                if not order:
                    if not more:
                        return
                    self._pump(self._next_due())  # frames of another call have all the room
                    continue
                while order[0] not in self._done:
                    self._pump(self._next_due())
                yield self._done.pop(order.pop(0))
        finally:
            for number in order:
                self._pending.pop(number, None)
                self._done.pop(number, None)

    # -- sending

    def _has_room(self) -> bool:
        return self.model.in_turn or len(self._pending) < min(self._pace.allowed, Settings.window)

    def _submit(self, array: NDArray[np.float32]) -> int:
        model = self.model
        if array.shape != model.input_shape:
            raise DataError(f"a frame of shape {array.shape}, the model takes {model.input_shape}")
        now = time.monotonic()
        pending = Pending(self._next, np.array(array, np.float32)[None], now, 1 + len(self._pending))
        self._next += 1
        self._connect(now + self.timeout_seconds)
        self._pending[pending.number] = pending
        self._dispatch(pending)
        return pending.number

    def _dispatch(self, pending: Pending) -> None:
        """To all devices that can be reached and do not have it; where they take turns, to one more."""
        if self.model.in_turn:
            self._pass_on(pending)
        else:
            for device in sorted(self._lines.keys() - pending.asked.keys()):
                self._send(pending, device)

    def _send(self, pending: Pending, device: int) -> bool:
        line = self._lines[device]
        now = time.monotonic()
        remaining = pending.sent_at + self.timeout_seconds - now
        if not line.connected or remaining <= 0:
            return False
        together = [device] if self.model.in_turn else [d for d, line in self._lines.items() if line.connected]
        given = self._pace.given(together, remaining)
        frame = Frame(FrameId(self._name, pending.number), min(self._pending), given, pending.array)
        if not line.send(self._codec.encode(frame)):
            return False
        pending.asked[device] = now
        return True

    def _pass_on(self, pending: Pending) -> None:
        """Where devices take turns: to one more of them."""
        loads = {device: self._load(device) for device in self._lines}
        for device in self._turns.order(pending.number, loads, pending.asked):
            if self._send(pending, device):
                return

    def _load(self, device: int) -> int:
        """How many frames a device was given, and has not answered or refused."""
        return sum(device in pending.waiting for pending in self._pending.values())

    def _connect(self, end: float) -> None:
        """Before the first frames: wait for a first connection until ``end``, and a little longer for the others."""
        first = None
        while self._next <= 1 and not all(line.connected for line in self._lines.values()):
            now = time.monotonic()
            if first is None and any(line.connected for line in self._lines.values()):
                first = now
            limit = end if first is None else min(end, first + min(CONNECT_SECONDS, self.timeout_seconds / 4))
            if now >= limit:
                return
            self._pump(limit)

    # -- receiving

    def _pump(self, until: float) -> None:
        """Wait for something to happen, at most to ``until``, and deal with it."""
        due = self._lines.due
        wait = max(0.0, (until if due is None else min(due, until)) - time.monotonic())
        for _ in range(1 + len(self._lines)):
            ready = self._watch.wait(wait)
            wait = 0.0
            if not ready:
                break
            for device, line in self._lines.items():
                if line.socket is not None and line.socket in ready:
                    self._receive(device, line.socket)
            for device, up in self._lines.changes(ready):
                if not up:
                    self._on_disconnect(device)
        self._lines.tend(time.monotonic())
        self._judge()

    def _receive(self, device: int, socket: zmq.Socket[bytes]) -> None:
        for frames in received(socket):
            try:
                message = self._codec.decode(frames, device)
            except MessageError as error:
                self.dropped += 1
                if isinstance(error, OtherBuildError):
                    self._lines.meet_other_build(device, str(error), time.monotonic())
                continue
            self._turns.heard(device)
            self._lines.meet_same_build(device)
            self._choice.heard(device)
            if isinstance(message, Status):
                self._on_status(device, message)
            elif isinstance(message, messages.Answer | Refused) and message.frame.client == self._name:
                self._on_reply(device, message)

    def _on_status(self, device: int, message: Status) -> None:
        try:
            model = message.document["model"]
            self._model = Model(
                tuple(map(int, model["input_shape"])),
                int(model["outputs"]),
                tuple(map(str, model["classes"])),
                dict(model["preprocessing"]),
                str(model.get("activation", "softmax")),
                int(model["exchanges"]),
                not model["exchanges"] and message.document.get("spares") != "hot",
            )
        except (KeyError, TypeError, ValueError):
            self.dropped += 1
            return
        self._statuses[device] = message.document

    def _on_reply(self, device: int, message: messages.Answer | Refused) -> None:
        number, now = message.frame.number, time.monotonic()
        pending = self._pending.get(number) or self._decided.get(number)
        if pending is None:
            return
        if isinstance(message, Refused):
            pending.refusals[device] = message.reason
            return
        if pending.first_at is None:
            pending.first_at = now
        self._choice.answered(device, message.coverage, now - pending.first_at)
        if device in pending.asked:
            seconds = now - pending.asked[device]
            self._turns.answered(device, seconds)
            self._pace.answered(device, seconds - message.seconds, now)
        pending.answers[device] = message, now

    def _on_disconnect(self, device: int) -> None:
        for pending in self._pending.values():
            if device not in pending.answers:
                pending.asked.pop(device, None)  # it may be asked again, should nobody else be left

    # -- deciding

    def _judge(self) -> None:
        now = time.monotonic()
        in_turn = self._model is not None and self._model.in_turn
        for pending in list(self._pending.values()):
            alone = not pending.asked  # nobody was connected, or nobody of those who were is left
            if alone or (not in_turn and not pending.answers and now >= self._newcomers_at(pending)):
                self._dispatch(pending)
            waiting = pending.waiting
            due = self._choice.due(pending.coverages, waiting, pending.first_at)
            full = 1.0 in pending.coverages.values()
            if full or now >= pending.sent_at + self.timeout_seconds:
                self._resolve(pending)
            elif in_turn:
                overdue = [d for d in waiting if now >= self._overdue_at(pending, d)]
                self._turns.missed(overdue)
                if len(overdue) == len(waiting):
                    self._pass_on(pending)
                if len(pending.refusals) == len(self._lines):
                    self._resolve(pending)
            elif pending.asked and due is not None and now >= due:
                if pending.first_at is not None:
                    self._choice.expire(pending.coverages, waiting, pending.first_at, now)
                self._resolve(pending)

    def _newcomers_at(self, pending: Pending) -> float:
        return pending.sent_at + NEWCOMERS_AFTER * self.timeout_seconds

    def _overdue_at(self, pending: Pending, device: int) -> float:
        return self._turns.overdue_at(device, pending.asked[device], self._load(device))

    def _next_due(self) -> float:
        times = []
        in_turn = self._model is not None and self._model.in_turn
        for pending in self._pending.values():
            times.append(pending.sent_at + self.timeout_seconds)
            if not pending.asked:
                times.append(time.monotonic() + 0.02)
            elif in_turn:
                overdue = [self._overdue_at(pending, device) for device in pending.asked]
                times += [moment for moment in overdue if moment > time.monotonic()]
            else:
                due = self._choice.due(pending.coverages, pending.waiting, pending.first_at)
                times += [] if due is None else [due]
                newcomers = self._newcomers_at(pending)
                times += [newcomers] if newcomers > time.monotonic() else []
        return min(times)

    def _resolve(self, pending: Pending) -> None:
        del self._pending[pending.number]
        pending.array = pending.array[:0]
        self._decided[pending.number] = pending
        while len(self._decided) > REMEMBERED_FRAMES:
            self._decided.popitem(last=False)
        taken = time.monotonic() - pending.sent_at if pending.answers else self.timeout_seconds
        late = bool(pending.answers) and all(answer.late for answer, _ in pending.answers.values())
        self._pace.finished(taken, pending.among, late)
        if not pending.answers:
            self._pace.unanswered({device: pending.asked[device] for device in pending.waiting})
            heard = bool(pending.asked.keys() - self.troubles().keys())
            reason = next(iter(pending.refusals.values()), None) or (
                "no device answered in time" if heard else self.unreachable()
            )
            latency = time.monotonic() - pending.sent_at
            self._done[pending.number] = Answer(
                pending.number, None, None, None, 0.0, 0.0, (), latency, None, (), reason
            )
            return
        best, at = max(pending.answers.values(), key=lambda entry: (entry[0].coverage, -entry[1]))
        outputs = np.array(best.outputs, np.float32)
        probabilities = probabilities_of(outputs, self.model.activation)
        self._done[pending.number] = Answer(
            number=pending.number,
            outputs=outputs,
            probabilities=probabilities,
            class_index=None if probabilities is None else int(probabilities.argmax()),
            coverage=best.coverage,
            from_spares=best.from_spares,
            down=best.down,
            latency_seconds=at - pending.sent_at,
            device=best.sender,
            sources=best.sources,
            expected_accuracy=best.expected,
        )

    def troubles(self) -> dict[int, str]:
        """Why devices cannot be asked: :meth:`robustdice.runtime.wire.lines.Lines.troubles`."""
        return self._lines.troubles()

    def unreachable(self) -> str:
        """Why no device answers, as far as that is known, and the way out."""
        return self._lines.unreachable(self.cluster.here)


def _close(context: zmq.Context[Any], lines: Lines, watch: Watch) -> None:
    lines.close()
    watch.close()
    context.term()
