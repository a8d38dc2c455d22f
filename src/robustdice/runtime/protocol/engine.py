"""The protocol of one device as a pure state machine: (event, now) -> actions.

No clock, socket, thread, randomness or arithmetic on arrays. Frames go through the stages; in each the device
publishes its shards, waits for the others' until all that have a live holder are there, and goes on with what there
is when a deadline passes. Whoever was silent is suspect, and its shards become the next holders' task at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.protocol.deadlines import Deadlines, Record
from robustdice.runtime.protocol.events import (
    Action,
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
    Task,
    Tick,
)
from robustdice.runtime.protocol.frames import Frames
from robustdice.runtime.protocol.inflight import Early, InFlight, Phase
from robustdice.runtime.protocol.membership import Membership
from robustdice.runtime.wire.messages import Answer, Frame, FrameId, Hello, Pass, Refused, ShardId, Shards, Want

EXTENSION = 3.0
"""So much longer may a device take that nobody can stand in for."""


QUEUED_TASKS = 2
"""That the executor is given at once."""


class Engine:
    """Device ``manifest.device``. ``incarnation`` is a text that no earlier run of it has used."""

    def __init__(self, manifest: Manifest, settings: Settings | None = None, incarnation: str = "0") -> None:
        """No peer is known to be there yet."""
        self.manifest = manifest
        self.me = manifest.device
        self.settings = settings or Settings()
        self.membership = Membership(self.me, manifest.devices, self.settings)
        self._incarnation = incarnation
        self.frames = Frames(self.settings)
        self._tasks: deque[Task] = deque()
        """What the executor computes, and what it does next: at most ``QUEUED_TASKS``, of different frames. With one
        in reserve it need not wait while this device hands over what it has just computed."""
        self._computing_since = 0.0
        """When the executor began with the first of them."""
        self._head: FrameId | None = None
        """The oldest frame that is not DONE. Devices work on it first, so only it shows that a peer is silent: a
        younger frame's shards may just have to queue. Stage deadlines run for the head alone."""
        self._deadlines = Deadlines(len(manifest.stages), self.settings)
        self._record = Record()
        self._actions: list[Action] = []
        """Of the event being handled; empty between events."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about ``event``, in order. ``now`` never goes back."""
        match event:
            case Received(Frame() as message):
                self._on_frame(message, now)
            case Received(Shards() as message):
                self._on_shards(message, now)
            case Received(Want() as message):
                self._on_want(message, now)
            case Received(Pass(sender, frame)):
                self._on_pass(sender, frame, now)
            case Received(Hello() as message):
                self._on_hello(message, now)
            case PeerUp(device):
                self.membership.connected(device)
                self._send(device, Hello(self.me, self._incarnation, reply=True))
            case PeerDown(device):
                if self.membership.disconnected(device, now):
                    self._lost([device], now, "its connection is gone")
            case Computed():
                self._on_computed(event, now)
            case Tick(due):
                self._on_tick(due, now)
        self._schedule(now)
        self._lead(now)
        actions, self._actions = self._actions, []
        return actions

    def next_due(self) -> float | None:
        """When a Tick is needed, if no other event comes before."""
        times = [early.since + self._early_seconds(early) for _, early in self.frames.early_ones()]
        for frame in self.frames:
            if frame.phase is Phase.WAITING:
                times.append(self._deadlines.hurry_at(frame))
                if frame.id == self._head:
                    times.append(frame.wait_until if frame.nudge_at is None else frame.nudge_at)
            elif frame.phase is Phase.DONE:
                times.append(frame.deadline)
        return min(times, default=None)

    def status(self, now: float) -> dict[str, Any]:
        """For ``robustdice status``: who is up in this device's view, frames per second, the last fault."""
        return {
            "up": self.membership.up(now),
            "in_flight": self.frames.in_flight,
            **self._record.status(now),
        }

    # -- what others say

    def _on_frame(self, message: Frame, now: float) -> None:
        client = message.frame.client
        for frame in self.frames:
            if frame.id.client == client and frame.id.number < message.oldest:
                self._drop(frame.id)  # the client has its answer, or has given up
        if not self.frames.is_new(message.frame) or message.frame.number < message.oldest:
            return
        if self.frames.in_flight >= self.settings.window:
            reason = f"device {self.me} already works on {self.frames.in_flight} frames, its window; send fewer at once"
            self._refuse(message.frame, reason)
            self.frames.forget(message.frame)
            return
        live, entering = self.membership.admit(now)
        for device in entering:
            number = message.frame.number
            text = f"device {device} takes part from frame {number} on"
            self._actions.append(Note(text, "admitted", peer=device, frame=number))
        deadline = now + message.timeout_seconds
        self.frames.admit(InFlight(message.frame, self.manifest, deadline, live, message.array))

    def _on_shards(self, message: Shards, now: float) -> None:
        frame = self.frames.get(message.frame)
        if frame is None:
            if early := self.frames.early(message.frame, now):
                for shard, array in zip(message.shards, message.arrays, strict=True):
                    early.shards.setdefault(shard, (array, message.sender))
            return
        if frame.phase is Phase.DONE:
            return
        self._judge(frame, message, now)
        if message.stage >= frame.stage:
            frame.offer(zip(message.shards, message.arrays, strict=True), message.sender)
            self._complete(frame, now)

    def _judge(self, frame: InFlight, message: Shards, now: float) -> None:
        """Does this message show that a suspect keeps up? If it is only a little slow, deadlines learn from it."""
        if message.sender in frame.live:
            return
        estimate, since = self._deadlines.waits[message.stage], frame.since.get(message.stage)
        if since is not None:
            estimate.observe(min(now - since, self.settings.maximum_wait))
        if message.stage >= frame.stage or (since is not None and now - since <= estimate.deadline(self.settings)):
            self.membership.evidence(message.sender)

    def _on_want(self, message: Want, now: float) -> None:
        frame = self.frames.get(message.frame)
        if frame is None:
            early = self.frames.early(message.frame, now)
            if early is None or early.told:
                self._send(message.sender, Pass(self.me, message.frame))
            else:
                for shard in message.shards:
                    early.wanted.setdefault(shard, set()).add(message.sender)
            return
        ready = [shard for shard in message.shards if shard in frame.own]
        self._publish(frame, message.stage, ready, [message.sender])
        for shard in set(message.shards) - set(ready):
            frame.wanted.setdefault(shard, set()).add(message.sender)
            frame.owes = True

    def _on_pass(self, sender: int, frame_id: FrameId, now: float) -> None:
        frame = self.frames.get(frame_id)
        if frame is not None:
            self._shrink(frame, {sender}, now)
        elif early := self.frames.early(frame_id, now):
            early.passed.add(sender)

    def _on_hello(self, message: Hello, now: float) -> None:
        if self.membership.hello(message.sender, message.incarnation, now):
            self._lost([message.sender], now, "it has restarted")
        if message.reply:
            self._send(message.sender, Hello(self.me, self._incarnation, reply=False))

    # -- computing

    def _schedule(self, now: float) -> None:
        """Give the executor its next task: what others wait for first, then the oldest frame's next stage."""
        for frame in self.frames:
            if len(self._tasks) == QUEUED_TASKS:
                return
            if frame.id not in self.frames or any(task.frame == frame.id for task in self._tasks):
                continue
            if frame.owes and (task := self._owed(frame)):
                self._run(task, now)
            elif frame.phase is Phase.READY and now > frame.deadline:
                self._give_up(frame, f"device {self.me} did not get to this frame in time")
            elif frame.phase is Phase.READY:
                self._enter(frame, now)

    def _owed(self, frame: InFlight) -> RunPieces | None:
        entered = frame.stage + (frame.phase is not Phase.READY)
        for stage in range(entered):
            if pieces := frame.pieces_due(stage, self.me):
                return RunPieces(frame.id, stage, pieces, frame.down)
        frame.owes = False
        return None

    def _enter(self, frame: InFlight, now: float) -> None:
        stage = frame.stage
        gathered = frame.gather(stage - 1, self.me) if stage else {}
        every = range(len(self.manifest.stages[stage].pieces))
        pieces = tuple(every) if self.manifest.spares == "hot" else frame.pieces_due(stage, self.me)
        task = RunStage(frame.id, stage, frame.array, gathered, pieces, frame.down)
        frame.array, frame.phase = None, Phase.COMPUTING
        self._run(task, now)

    def _run(self, task: Task, now: float) -> None:
        if not self._tasks:
            self._computing_since = now
        self._tasks.append(task)
        self._actions.append(task)

    def _on_computed(self, event: Computed, now: float) -> None:
        task, started = event.task, self._computing_since
        self._tasks.popleft()
        self._computing_since = now
        frame = self.frames.get(task.frame)
        if frame is None:
            return
        if event.error is not None:
            number = task.frame.number
            text = f"frame {number} failed in stage {task.stage}: {event.error}"
            self._actions.append(Note(text, "failed", frame=number, reason=event.error))
            self._give_up(frame, f"device {self.me} could not compute stage {task.stage}: {event.error}")
            return
        frame.own.update(event.shards)
        self._publish_due(frame, task.stage)
        if isinstance(task, RunPieces):
            self._complete(frame, now)
            return
        self._deadlines.computes[task.stage].observe(now - started)
        if task.stage + 1 == len(self.manifest.stages):
            self._finish(frame, event.outputs, now)
            return
        frame.phase, frame.since[task.stage] = Phase.WAITING, now
        frame.clean, frame.extended = True, False
        self._deadlines.arm(frame, now)
        self._complete(frame, now)

    def _publish_due(self, frame: InFlight, stage: int) -> None:
        """Publish what is computed, was not published yet, and is this device's task in the frame's view."""
        mine = [shard for shard in frame.shards_of(stage) if shard in frame.own]
        due = [shard for shard in mine if shard not in frame.published and frame.publisher(shard) == self.me]
        self._publish(frame, stage, due, self.membership.reachable)
        frame.published.update(due)
        if stage >= frame.stage and frame.phase is not Phase.DONE:
            frame.offer(((shard, frame.own[shard]) for shard in due), self.me)
        requests: dict[int, list[ShardId]] = {}
        for shard in mine:
            for device in frame.wanted.pop(shard, ()):
                if shard not in due:
                    requests.setdefault(device, []).append(shard)
        for device, shards in requests.items():
            self._publish(frame, stage, shards, [device])

    def _publish(self, frame: InFlight, stage: int, shards: Iterable[ShardId], to: Iterable[int]) -> None:
        ordered = tuple(sorted(shards))
        if ordered:
            arrays = tuple(frame.own[shard] for shard in ordered)
            message = Shards(self.me, frame.id, stage, ordered, arrays)
            for device in to:
                self._send(device, message)

    # -- waiting

    def _lead(self, now: float) -> None:
        """Let the head's deadline run from the moment that it has become the head."""
        head = self.frames.head()
        if head is not None and head.id != self._head and head.phase is Phase.WAITING:
            head.since[head.stage] = now
            self._deadlines.arm(head, now)
        self._head = None if head is None else head.id

    def _complete(self, frame: InFlight, now: float) -> None:
        """Go on to the next stage when everything that has a live holder is there."""
        if frame.phase is Phase.WAITING and not frame.missing():
            if frame.clean and frame.id == self._head:
                self._deadlines.waits[frame.stage].observe(now - frame.since[frame.stage])
            self._advance(frame)

    def _advance(self, frame: InFlight) -> None:
        frame.stage += 1
        frame.phase, frame.nudge_at = Phase.READY, None

    def _on_tick(self, due: float, now: float) -> None:
        frozen = now - due > self.settings.late_timer
        for frame in self.frames:
            if frame.phase is Phase.DONE and now >= frame.deadline:
                self._drop(frame.id)
            elif frame.phase is Phase.WAITING:
                self._on_wait(frame, frozen, now)
        for frame_id, early in self.frames.early_ones():
            if now >= early.since + self._early_seconds(early):
                if early.told:
                    self.frames.forget(frame_id)
                else:
                    self._tell_all(Pass(self.me, frame_id))
                    early.told = True

    def _on_wait(self, frame: InFlight, frozen: bool, now: float) -> None:
        if now >= self._deadlines.hurry_at(frame):
            since = frame.since[frame.stage]
            if now - since >= self.settings.minimum_wait and now >= frame.wait_until and not frozen:
                self._suspect(frame, now, final=True)
            if frame.phase is Phase.WAITING:
                self._advance(frame)
        elif frame.id != self._head:
            return
        elif frozen and not frame.rearmed:
            self._deadlines.arm(frame, now)
            frame.rearmed = True
        elif now >= frame.wait_until:
            self._suspect(frame, now)
            if frame.phase is Phase.WAITING and now >= frame.wait_until:  # nobody to blame, or nobody to replace them
                self._deadlines.arm(frame, now, factor=EXTENSION)
                frame.extended = True
        elif frame.nudge_at is not None and now >= frame.nudge_at:
            frame.nudge_at = None
            self._ask(frame)

    def _ask(self, frame: InFlight) -> None:
        wants: dict[int, list[ShardId]] = {}
        for shard, publisher in frame.missing().items():
            if publisher != self.me:
                wants.setdefault(publisher, []).append(shard)
        for device, shards in wants.items():
            self._send(device, Want(self.me, frame.id, frame.stage, tuple(sorted(shards))))

    # -- who takes part

    def _suspect(self, frame: InFlight, now: float, final: bool = False) -> None:
        """Blame the publishers of what is missing. Those that nobody can stand in for only at the second time, unless
        this is the last one: going on without them costs accuracy, going on too early does so needlessly."""
        silent = sorted(set(frame.missing().values()) - {self.me})
        if not (frame.extended or final):
            silent = [device for device in silent if frame.replaceable(device)]
        for device in silent:
            if self.membership.peers[device].admitted:
                self.membership.fault(device, now)
        reason = f"frame {frame.id.number} waited {now - frame.since[frame.stage]:.3f} s for it in stage {frame.stage}"
        self._lost(silent, now, reason, frame.id.number)

    def _lost(self, devices: Iterable[int], now: float, reason: str, frame: int | None = None) -> None:
        """Devices left (``frame`` waited for them in vain): no frame in flight counts on them any longer."""
        gone = set(devices)
        for device in gone:
            self._record.fault = device, now, reason
            self._actions.append(Note(f"device {device} is suspect: {reason}", "suspect", device, frame, reason))
        for each in self.frames:
            self._shrink(each, gone, now)

    def _shrink(self, frame: InFlight, gone: set[int], now: float) -> None:
        """Take devices out of a frame's view, and take over at once what has become this device's task."""
        if not frame.live & gone:
            return
        frame.live -= gone
        if frame.phase is Phase.DONE:
            return
        frame.owes, frame.clean = True, False
        for stage in range(frame.stage + (frame.phase is not Phase.READY)):
            self._publish_due(frame, stage)
        self._complete(frame, now)
        if frame.phase is Phase.WAITING:
            self._ask(frame)
            self._deadlines.arm(frame, now, factor=2.0)

    # -- the end of a frame

    def _finish(self, frame: InFlight, outputs: Any, now: float) -> None:
        coverage, from_spares, sources = frame.coverage()
        down = tuple(sorted(frame.down))
        answer = Answer(self.me, frame.id, outputs, coverage, from_spares, sources, down)
        self._send(frame.id.client, answer)
        self._record.answer(now)
        self._retire(frame)

    def _give_up(self, frame: InFlight, reason: str) -> None:
        self._refuse(frame.id, reason)
        self._retire(frame)

    def _retire(self, frame: InFlight) -> None:
        frame.phase = Phase.DONE
        frame.got.clear()
        for frame_id in self.frames.surplus():
            self._drop(frame_id)

    def _refuse(self, frame_id: FrameId, reason: str) -> None:
        self._send(frame_id.client, Refused(self.me, frame_id, reason))
        self._tell_all(Pass(self.me, frame_id))

    def _drop(self, frame_id: FrameId) -> None:
        self.frames.forget(frame_id)
        self._actions.append(Forget(frame_id))

    def _early_seconds(self, early: Early) -> float:
        return self.settings.maximum_wait if early.told else self.settings.pass_after

    def _tell_all(self, message: Pass) -> None:
        for device in self.membership.reachable:
            self._send(device, message)

    def _send(self, to: int | str, message: Any) -> None:
        self._actions.append(Send(to, message))
