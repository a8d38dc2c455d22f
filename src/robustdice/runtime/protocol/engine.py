"""The protocol of one device as a pure state machine: (event, now) -> actions.

No clock, socket, thread, randomness or arithmetic on arrays. Frames go through the stages; in each the device
publishes its shards, waits for the others' until all that have a live holder are there, and goes on with what there
is when a deadline passes. Whoever was silent, or behind with its work, is suspect, and its shards become the next
holders' task at once. Whose shards are merely on a slow way is not: the frame waits for them as long as it can.
"""

from __future__ import annotations

import math
from typing import Any

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.protocol import adding, notes
from robustdice.runtime.protocol.contact import Contacts
from robustdice.runtime.protocol.deadlines import Deadlines, Record
from robustdice.runtime.protocol.events import (
    Action,
    Computed,
    Event,
    Forget,
    PeerDown,
    PeerUp,
    Received,
    RunPieces,
    Settings,
    Task,
    Tick,
)
from robustdice.runtime.protocol.frames import Frames
from robustdice.runtime.protocol.inflight import InFlight
from robustdice.runtime.protocol.lineage import Ancestry
from robustdice.runtime.protocol.membership import Membership
from robustdice.runtime.protocol.oneway import OneWay
from robustdice.runtime.protocol.outbox import Outbox
from robustdice.runtime.protocol.state import Phase
from robustdice.runtime.protocol.waiting import Waiting
from robustdice.runtime.protocol.workload import QUEUED_TASKS, Workload
from robustdice.runtime.wire.messages import (
    Answer,
    ClientMessage,
    DeviceMessage,
    Frame,
    FrameId,
    Hello,
    Mark,
    Pass,
    Pulse,
    Refused,
    Shards,
    StatusRequest,
    Want,
)

_OF_PEERS = (Hello, Pulse, Shards, Mark, Want, Pass)


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
        self._workload = Workload()
        self._deadlines = Deadlines(manifest, self.settings)
        self._contacts = Contacts(self.me, manifest.devices, self.settings)
        self._ancestry = Ancestry(manifest)
        self.views = self._ancestry.views
        """What is to be done in each view, worked out once: whoever reads and writes messages needs it, too."""
        self._record = Record()
        self._one_way = OneWay(self.settings)
        self._waking = False
        """It has stood still, and there may be something from then that is not read yet."""
        self._handled_at = -math.inf
        """When the last event was dealt with."""
        self._out = Outbox(self.me, self.membership, self._contacts)
        """The actions of the event being handled; empty between events."""
        known = self.membership, self._contacts, self._deadlines, self.frames
        self._waiting = Waiting(self.me, self.settings, *known, self._record, self._out)

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about ``event``, in order. ``now`` never goes back."""
        if now - self._handled_at > self.settings.pulse + self.settings.late_timer:
            self._deadlines.awake_since, self._waking = now, True  # a timer was due meanwhile
        self._handled_at = now
        match event:
            case Received(message, key):
                if (frame := self._waiting.take_straight(message, now)) is None:
                    self._on_message(message, key, now)
                elif frame.phase is not Phase.READY:
                    return []  # as for most messages: the frame waits on, and nothing else has changed
            case Computed():
                self._on_computed(event, now)
            case PeerUp(device):
                self.membership.connected(device)
                self._contacts.of[device].connected(now)
                self._out.send(device, Hello(self.me, self._incarnation, reply=True))
            case PeerDown(device):
                if self.membership.disconnected(device, now):
                    self._waiting.lose([device], now, "its connection is gone")
            case Tick(due):
                self._on_tick(due, now)
        self._schedule(now)
        if self.frames.head is not self._waiting.leading:
            self._waiting.lead(now)
        return self._out.take()

    def next_due(self, now: float) -> float:
        """When a Tick is needed, if no other event comes before."""
        times = [self._contacts.pulse_at]
        times += [self._contacts.of[device].silent_at(self.settings) for device in self.membership.admitted]
        times += self.frames.due(self._deadlines, self._waiting.leading, now)
        return min(times)

    def status(self, now: float) -> dict[str, Any]:
        """For ``robustdice status``: who is up in this device's view, frames per second, the last fault."""
        return {
            "up": self.membership.up(now),
            "in_flight": self.frames.in_flight,
            "one_way": self._one_way.status(now),
            **self._record.status(now),
        }

    # -- what others say

    def _on_message(self, message: DeviceMessage | ClientMessage, key: str, now: float) -> None:
        if isinstance(message, _OF_PEERS) and self._contacts.of[message.sender].heard(now):
            self.membership.evidence(message.sender)
        match message:
            case Shards():
                self._on_shards(message, now)
            case Frame():
                self._on_frame(message, key, now)
            case Pulse():
                self._on_pulse(message, now)
            case Mark(sender, serial):
                self._contacts.of[sender].take_mark(serial)
                self._waiting.ask_for_lost(sender, now)
            case Want():
                self._on_want(message, now)
            case Pass(sender, frame):
                self._on_pass(sender, frame, now)
            case Hello():
                self._on_hello(message, now)
            case StatusRequest(client):
                self.frames.meet(client)

    def _on_frame(self, message: Frame, key: str, now: float) -> None:
        client = message.frame.client
        self.frames.meet(client)
        for frame in self.frames:
            if frame.id.client == client and frame.id.number < message.oldest:
                self._drop(frame.id)  # the client has its answer, or has given up
        if not self.frames.is_new(message.frame) or message.frame.number < message.oldest:
            return
        if (reason := self.frames.refusal(message.frame, key)) is not None:
            # Peers are told only as far as they work on it: very many may be refused.
            said = f"device {self.me} already {reason}; send fewer at once"
            self._out.send(client, Refused(self.me, message.frame, said))
            for device in sorted(self.frames.refuse(message.frame)):
                self._out.send(device, Pass(self.me, message.frame))
            return
        live, entering = self.membership.admit(now)
        for device in entering:
            self._out.add(notes.admitted(device, message.frame.number))
        deadline = now + message.timeout_seconds
        known = message.frame, self.manifest, self._ancestry
        view = self._ancestry.views.of(tuple(sorted(live)))
        frame = InFlight(*known, now, deadline, live, frozenset(live), message.array, view, key)
        early = self.frames.admit(frame)
        if early:
            self._deadlines.observe(self._deadlines.introductions, early.since, now)
        contacts, others = self._contacts.of, sorted(frame.live - {self.me})
        self._waiting.part(frame, [device for device in others if contacts[device].far(self.settings, now)], now)

    def _on_pulse(self, message: Pulse, now: float) -> None:
        contact, sender = self._contacts.of[message.sender], message.sender
        contact.take_pulse(message, now, self._deadlines.awake_since, self._waking)
        if self.membership.told(sender, message.hears):
            self._waiting.blame([sender], now, "it hears nothing of this device")
        if not message.owes and not self.frames.in_flight:
            self.membership.evidence(sender)
        if message.reply:
            self._out.pulse([sender], self.frames.owing(), now)
        self._waiting.ask_for_lost(sender, now)

    def _on_shards(self, message: Shards, now: float) -> None:
        self._contacts.of[message.sender].take_shards(message.serial, now)
        frame = self.frames.get(message.frame)
        if frame is None:
            if early := self.frames.early(message.frame, now):
                early.keep(message)
            elif self.frames.refused(message.frame):
                self._out.send(message.sender, Pass(self.me, message.frame))
            return
        if frame.phase is Phase.DONE:
            adding.take_late(frame, message)
            return
        self._judge(frame, message, now)
        if message.stage >= frame.stage:
            frame.take(message)
            if message.stage == frame.stage and frame.phase is not Phase.READY:
                self._waiting.weigh(frame, now)
            self._waiting.ask(frame, self._waiting.complete(frame, now), now)
        else:
            adding.take_late(frame, message)

    def _judge(self, frame: InFlight, message: Shards, now: float) -> None:
        """Does this message show that a suspect keeps up? If it is only a little slow, deadlines learn from it."""
        if message.sender in frame.live:
            return
        estimate, since = self._deadlines.waits[message.stage], frame.since.get(message.stage)
        if since is not None:
            self._deadlines.observe(estimate, max(since, now - self.settings.maximum_wait), now)
        if message.stage >= frame.stage or (since is not None and now - since <= estimate.deadline(self.settings)):
            self.membership.evidence(message.sender)

    def _on_want(self, message: Want, now: float) -> None:
        frame = self.frames.get(message.frame)
        if frame is None:
            early = self.frames.early(message.frame, now)
            if early is None or early.told:
                self._out.send(message.sender, Pass(self.me, message.frame))
            else:
                for shard in message.shards:
                    early.wanted.setdefault(shard, set()).add(message.sender)
            return
        frame.unfold()
        frame.asked_by(message.sender, message.shards)
        ready = [shard for shard in message.shards if shard in frame.own]
        self._out.publish(frame, message.stage, ready, [message.sender], now)
        for shard in set(message.shards) - set(ready):
            frame.wanted.setdefault(shard, set()).add(message.sender)
            frame.owes = True
        self._out.want_sums(frame, [shard for shard in message.shards if shard not in ready])

    def _on_pass(self, sender: int, frame_id: FrameId, now: float) -> None:
        frame = self.frames.get(frame_id)
        if frame is not None:
            frame.unfold()
            frame.parted.add(sender)
            self._waiting.shrink(frame, {sender}, now)
        elif early := self.frames.early(frame_id, now):
            early.passed.add(sender)

    def _on_hello(self, message: Hello, now: float) -> None:
        if self.membership.hello(message.sender, message.incarnation, now):
            self._waiting.lose([message.sender], now, "it has restarted")
        if message.reply:
            self._out.send(message.sender, Hello(self.me, self._incarnation, reply=False))

    # -- computing

    def _schedule(self, now: float) -> None:
        """Give the executor its next task: what others wait for first, then the oldest frame's next stage."""
        queued = self._workload.frames
        for frame in self.frames.admitted:
            if len(queued) == QUEUED_TASKS:
                return
            if frame.phase is not Phase.READY and not frame.owes and not frame.hurried:
                continue
            if frame.id in queued:
                if frame.hurried:
                    return  # its next stage must find the executor free
                continue
            if frame.owes and (task := frame.owed(self.me)):
                self._run(task, now)
            elif frame.phase is Phase.READY and now > frame.deadline:
                self._give_up(frame, f"device {self.me} did not get to this frame in time", now)
                self._schedule(now)  # others may have been dropped for it
                return
            elif frame.phase is Phase.READY:
                self._run(frame.enter(self.me), now)

    def _run(self, task: Task, now: float) -> None:
        self._workload.add(task, now)
        self._out.add(task)

    def _on_computed(self, event: Computed, now: float) -> None:
        task, started = event.task, self._workload.done(now)
        frame = self.frames.get(task.frame)
        if frame is None:
            return
        if event.error is not None:
            self._out.add(notes.failed(task.frame.number, task.stage, event.error))
            self._give_up(frame, f"device {self.me} could not compute stage {task.stage}: {event.error}", now)
            return
        due = frame.computed(task, event.parcels)
        if due is not None:
            self._out.publish_straight(frame, task.stage, due, now)
        elif frame.straight is None:
            self._out.publish_due(frame, task.stage, now)
        if isinstance(task, RunPieces):
            self._waiting.complete(frame, now)
            return
        self._deadlines.observe(self._deadlines.computes[task.stage], started, now)
        if task.stage + 1 == len(self.manifest.stages):
            self._finish(frame, event.outputs, now)
            return
        frame.phase, frame.since[task.stage] = Phase.WAITING, now
        frame.clean, frame.extended = True, False
        frame.asked_again.clear()
        if frame.straight is not None and frame.complete:
            self._waiting.go_on(frame, now)
            return
        self._waiting.expect(frame, now)
        if frame.straight is not None:
            return
        self._waiting.weigh(frame, now)
        if late := adding.to_ask_for(frame):
            self._out.want_sums(frame, late)
            frame.owes = True
        self._waiting.ask(frame, self._waiting.complete(frame, now), now)
        if frame.hurried and frame.phase is Phase.WAITING and now >= self._deadlines.hurry_at(frame):
            self._waiting.hurry(frame, now)

    def _on_tick(self, due: float, now: float) -> None:
        frozen, self._waking = now - due > self.settings.late_timer, False
        if frozen:
            self._contacts.stood_still(now - due, now)
        if now >= self._contacts.pulse_at:
            self._keep_contact(now)
        for device in self._contacts.silent(self.membership.admitted, now):
            contact = self._contacts.of[device]
            contact.lost = True
            silence = now - contact.heard_at
            cost = silence if self.frames.in_flight else 0.0
            self._waiting.blame([device], now, f"nothing came from it for {silence:.3f} s", cost=cost)
        for frame in self.frames:
            if frame.phase is Phase.DONE and now >= frame.deadline:
                self._drop(frame.id)
        for frame, hurry_at in reversed(list(self._deadlines.hurries(self.frames.pending(), now))):
            if frame.phase is Phase.WAITING:
                self._waiting.look_at(frame, frozen, hurry_at, now)
        for frame_id, early in self.frames.early_ones():
            if now >= self._deadlines.early_until(early):
                if early.told:
                    self.frames.forget(frame_id)
                else:
                    self._out.tell_all(Pass(self.me, frame_id))
                    self.frames.miss(frame_id.client)
                    early.told = True

    def _keep_contact(self, now: float) -> None:
        self._contacts.pulse_at = now + self.settings.pulse
        for device in self.membership.reachable:
            contact = self._contacts.of[device]
            if contact.unacknowledged(self.settings, now):
                self._out.send(device, Mark(self.me, contact.sent))
        self._out.pulse(self.membership.reachable, self.frames.owing(), now)
        for note in self._one_way.look(self.membership, self._contacts, now):
            self._out.add(note)
        for device in sorted({*self._one_way.unheard, *self.membership.unknown}):
            self._out.send(device, Hello(self.me, self._incarnation, reply=True))

    # -- the end of a frame

    def _finish(self, frame: InFlight, outputs: Any, now: float) -> None:
        coverage, from_spares, sources = frame.coverage()
        down = tuple(sorted(frame.down))
        late, seconds = tuple(sorted(frame.parted)), now - frame.admitted_at
        answer = Answer(
            *(self.me, frame.id, outputs, coverage, from_spares, sources, down, late, seconds),
            expected=frame.expected_accuracy(),
        )
        self._out.send(frame.id.client, answer)
        self._record.answer(now)
        self._retire(frame, now)

    def _give_up(self, frame: InFlight, reason: str, now: float) -> None:
        self._out.refuse(frame.id, reason)
        frame.failed = True
        self._retire(frame, now)

    def _retire(self, frame: InFlight, now: float) -> None:
        self.frames.retire(frame)
        self._deadlines.finished(frame, now)
        for frame_id in self.frames.surplus():
            self._drop(frame_id)

    def _drop(self, frame_id: FrameId) -> None:
        self.frames.forget(frame_id)
        self._out.add(Forget(frame_id))
