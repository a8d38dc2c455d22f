"""The protocol of one device as a pure state machine: (event, now) -> actions.

No clock, socket, thread, randomness or arithmetic on arrays. Frames go through the stages; in each the device
publishes its shards, waits for the others' until all that have a live holder are there, and goes on with what there
is when a deadline passes. Whoever was silent, or behind with its work, is suspect, and its shards become the next
holders' task at once. Whose shards are merely on a slow way is not: the frame waits for them as long as it can.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.protocol import notes
from robustdice.runtime.protocol.contact import Contacts
from robustdice.runtime.protocol.deadlines import EXTENSION, Deadlines, Record
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
from robustdice.runtime.protocol.inflight import InFlight, Phase
from robustdice.runtime.protocol.lateness import judge
from robustdice.runtime.protocol.lineage import Ancestry
from robustdice.runtime.protocol.membership import Membership
from robustdice.runtime.protocol.oneway import OneWay
from robustdice.runtime.protocol.outbox import Outbox
from robustdice.runtime.protocol.workload import Workload
from robustdice.runtime.wire.messages import Answer, Frame, FrameId, Hello, Pass, Pulse, Shards, Want


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
        self._head: FrameId | None = None
        """The oldest frame that is not DONE. Devices work on it first, so only it shows that a peer is silent: a
        younger frame's shards may just have to queue. Stage deadlines run for the head alone."""
        self._deadlines = Deadlines(manifest, self.settings)
        self._contacts = Contacts(self.me, manifest.devices, self.settings)
        self._ancestry = Ancestry(manifest)
        self._record = Record()
        self._one_way = OneWay(self.settings)
        self._out = Outbox(self.me, self.membership, self._contacts)
        """The actions of the event being handled; empty between events."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about ``event``, in order. ``now`` never goes back."""
        said = event.message if isinstance(event, Received) else None
        if isinstance(said, Hello | Pulse | Shards | Want | Pass) and self._contacts.of[said.sender].heard(now):
            self.membership.evidence(said.sender)
        match event:
            case Received(Frame() as message):
                self._on_frame(message, now)
            case Received(Pulse() as message):
                self._on_pulse(message, now)
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
                self._contacts.of[device].connected(now)
                self._out.send(device, Hello(self.me, self._incarnation, reply=True))
            case PeerDown(device):
                if self.membership.disconnected(device, now):
                    self._lost([device], now, "its connection is gone")
            case Computed():
                self._on_computed(event, now)
            case Tick(due):
                self._on_tick(due, now)
        self._schedule(now)
        self._lead(now)
        return self._out.take()

    def next_due(self, now: float) -> float | None:
        """When a Tick is needed, if no other event comes before."""
        times = [self._contacts.pulse_at]
        times += [self._contacts.of[device].silent_at(self.settings) for device in self.membership.admitted]
        times += self.frames.due(self._deadlines, self._head, now)
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

    def _on_frame(self, message: Frame, now: float) -> None:
        client = message.frame.client
        for frame in self.frames:
            if frame.id.client == client and frame.id.number < message.oldest:
                self._drop(frame.id)  # the client has its answer, or has given up
        if not self.frames.is_new(message.frame) or message.frame.number < message.oldest:
            return
        if self.frames.in_flight >= self.settings.window:
            reason = f"device {self.me} already works on {self.frames.in_flight} frames, its window; send fewer at once"
            self._out.refuse(message.frame, reason)
            self.frames.forget(message.frame)
            return
        live, entering = self.membership.admit(now)
        for device in entering:
            self._out.add(notes.admitted(device, message.frame.number))
        deadline = now + message.timeout_seconds
        known = message.frame, self.manifest, self._ancestry
        frame = InFlight(*known, now, deadline, live, frozenset(live), message.array)
        early = self.frames.admit(frame)
        if early:
            self._deadlines.introductions.observe(now - early.since)
        contacts, others = self._contacts.of, sorted(frame.live - {self.me})
        self._part(frame, [device for device in others if contacts[device].far(self.settings, now)], now)

    def _on_pulse(self, message: Pulse, now: float) -> None:
        contact, sender = self._contacts.of[message.sender], message.sender
        contact.take_pulse(message, now)
        if self.membership.told(sender, message.hears):
            self._blame([sender], now, "it hears nothing of this device")
        if message.reply:
            self._out.pulse([sender], self.frames.owing(), now)
        head = self.frames.head()
        if head is not None and head.phase is Phase.WAITING and contact.has_delivered(head.id) and now >= head.asked_at:
            self._out.want(head, sender)

    def _on_shards(self, message: Shards, now: float) -> None:
        self._contacts.of[message.sender].take_shards(message.serial, now)
        frame = self.frames.get(message.frame)
        if frame is None:
            if early := self.frames.early(message.frame, now):
                for shard, array in zip(message.shards, message.arrays, strict=True):
                    early.shards.setdefault((shard, message.sender), (array, message.lineage))
            return
        if frame.phase is Phase.DONE:
            return
        self._judge(frame, message, now)
        if message.stage >= frame.stage:
            frame.offer(zip(message.shards, message.arrays, strict=True), message.sender, message.lineage)
            if message.stage == frame.stage and frame.phase is not Phase.READY:
                self._weigh(frame, now)
            self._complete(frame, now)

    def _weigh(self, frame: InFlight, now: float) -> None:
        """Ask others than those that have turned out to have built on less."""
        if poorer := frame.poorer():
            for device in sorted(poorer & frame.live):
                self._out.add(notes.poor(device, frame.id.number, frame.stage))
            self._revise(frame, set(), poorer, now)

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
                self._out.send(message.sender, Pass(self.me, message.frame))
            else:
                for shard in message.shards:
                    early.wanted.setdefault(shard, set()).add(message.sender)
            return
        ready = [shard for shard in message.shards if shard in frame.own]
        self._out.publish(frame, message.stage, ready, [message.sender], now)
        for shard in set(message.shards) - set(ready):
            frame.wanted.setdefault(shard, set()).add(message.sender)
            frame.owes = True

    def _on_pass(self, sender: int, frame_id: FrameId, now: float) -> None:
        frame = self.frames.get(frame_id)
        if frame is not None:
            frame.parted.add(sender)
            self._shrink(frame, {sender}, now)
        elif early := self.frames.early(frame_id, now):
            early.passed.add(sender)

    def _on_hello(self, message: Hello, now: float) -> None:
        if self.membership.hello(message.sender, message.incarnation, now):
            self._lost([message.sender], now, "it has restarted")
        if message.reply:
            self._out.send(message.sender, Hello(self.me, self._incarnation, reply=False))

    # -- computing

    def _schedule(self, now: float) -> None:
        """Give the executor its next task: what others wait for first, then the oldest frame's next stage."""
        for frame in self.frames:
            if not (frame.owes or frame.hurried or frame.phase is Phase.READY) or frame.id not in self.frames:
                continue
            if self._workload.full:
                return
            if self._workload.of(frame.id):
                if frame.hurried:
                    return  # its next stage must find the executor free
                continue
            if frame.owes and (task := frame.owed(self.me)):
                self._run(task, now)
            elif frame.phase is Phase.READY and now > frame.deadline:
                self._give_up(frame, f"device {self.me} did not get to this frame in time", now)
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
        frame.own.update(event.shards)
        self._out.publish_due(frame, task.stage, now)
        if isinstance(task, RunPieces):
            self._complete(frame, now)
            return
        self._deadlines.computes[task.stage].observe(now - started)
        if task.stage + 1 == len(self.manifest.stages):
            self._finish(frame, event.outputs, now)
            return
        frame.phase, frame.since[task.stage] = Phase.WAITING, now
        frame.clean, frame.extended = True, False
        frame.asked_again.clear()
        self._await(frame, now)
        self._weigh(frame, now)
        self._complete(frame, now)
        if frame.hurried and frame.phase is Phase.WAITING and now >= self._deadlines.hurry_at(frame):
            self._hurry(frame, now)

    # -- waiting

    def _lead(self, now: float) -> None:
        """Let the head's deadline run from the moment that it has become the head."""
        head = self.frames.head()
        if head is not None and head.id != self._head and head.phase is Phase.WAITING:
            head.since[head.stage] = now
            self._await(head, now)
        self._head = None if head is None else head.id

    def _await(self, frame: InFlight, now: float) -> None:
        self._deadlines.be_patient(frame, now)
        self._deadlines.arm(frame, now)
        frame.asked_at = math.inf

    def _complete(self, frame: InFlight, now: float) -> None:
        """Go on to the next stage when everything that has a live holder is there."""
        if frame.phase is Phase.WAITING and not frame.missing():
            if frame.clean and not frame.parted and frame.id == self._head:
                self._deadlines.waits[frame.stage].observe(now - frame.since[frame.stage])
            self._advance(frame)

    def _advance(self, frame: InFlight) -> None:
        frame.stage += 1
        frame.phase, frame.nudge_at = Phase.READY, None

    def _on_tick(self, due: float, now: float) -> None:
        frozen = now - due > self.settings.late_timer
        if frozen:
            self._contacts.stood_still(now - due, now)
        if now >= self._contacts.pulse_at:
            self._keep_contact(now)
        for device in self._contacts.silent(self.membership.admitted, now):
            self._contacts.of[device].lost = True
            self._blame([device], now, f"nothing came from it for {now - self._contacts.of[device].heard_at:.3f} s")
        for frame in self.frames:
            if frame.phase is Phase.DONE and now >= frame.deadline:
                self._drop(frame.id)
        for frame, hurry_at in reversed(list(self._deadlines.hurries(self.frames.pending(), now))):
            if frame.phase is Phase.WAITING:
                self._on_wait(frame, frozen, hurry_at, now)
        for frame_id, early in self.frames.early_ones():
            if now >= self._deadlines.early_until(early):
                if early.told:
                    self.frames.forget(frame_id)
                else:
                    self._out.tell_all(Pass(self.me, frame_id))
                    early.told = True

    def _keep_contact(self, now: float) -> None:
        self._contacts.pulse_at = now + self.settings.pulse
        self._out.pulse(self.membership.reachable, self.frames.owing(), now)
        for note in self._one_way.look(self.membership, self._contacts, now):
            self._out.add(note)
        for device in self._one_way.unheard:
            self._out.send(device, Hello(self.me, self._incarnation, reply=True))

    def _on_wait(self, frame: InFlight, frozen: bool, hurry_at: float, now: float) -> None:
        if now >= hurry_at:
            since = frame.since[frame.stage]
            if now - since >= self.settings.minimum_wait and now >= frame.wait_until and not frozen:
                self._suspect(frame, now, final=True)
            if frame.phase is Phase.WAITING:
                self._hurry(frame, now)
        elif frame.id != self._head:
            return
        elif frozen and not frame.rearmed:
            self._deadlines.arm(frame, now)
            frame.rearmed = True
        elif now >= frame.wait_until:
            self._suspect(frame, now)
        elif frame.nudge_at is not None and now >= frame.nudge_at:
            frame.nudge_at, frame.asked_at = None, now
            self._out.pulse(frame.awaited(self.me), self.frames.owing(), now, reply=True)

    def _hurry(self, frame: InFlight, now: float) -> None:
        """Go on with what there is."""
        frame.hurried = frame.hurried or (frame.stage, now)
        self._advance(frame)

    # -- who takes part

    def _suspect(self, frame: InFlight, now: float, final: bool = False) -> None:
        """The wait is over. Blame the publishers of what is missing that have no excuse; those that nobody can stand in
        for only at the second time, unless this is the last one: going on without them costs accuracy, going on too
        early does so needlessly. Wait on for the others, but in the end go on without them too."""
        stage, verdict = frame.stage, judge(frame, self._contacts.of, self.me, now)
        guilty = verdict.silent | verdict.behind
        blamed = [device for device in sorted(guilty) if frame.extended or final or frame.replaceable(device)]
        for device in verdict.silent.intersection(blamed):
            self._contacts.of[device].lost = True
        reason = f"frame {frame.id.number} waited {now - frame.since[stage]:.3f} s for it in stage {stage}"
        self._blame(blamed, now, reason, frame.id.number)
        if final or frame.phase is not Phase.WAITING or frame.stage != stage or now < frame.wait_until:
            return
        if verdict.late and now >= frame.patient_until:
            for device in verdict.late:
                self._contacts.of[device].part()
            self._part(frame, sorted(verdict.late), now)
        elif guilty:  # nobody to replace them
            self._deadlines.arm(frame, now, factor=EXTENSION)
            frame.extended = True
        else:
            for device in sorted(verdict.stalled):
                frame.asked_again[device] = now
                self._out.want(frame, device)
            self._deadlines.arm(frame, now)

    def _part(self, frame: InFlight, late: list[int], now: float) -> None:
        """Go on without devices that are well, but too far away for this frame."""
        for device in late:
            self._out.add(notes.late(device, frame.id.number))
        frame.parted.update(late)
        for device in late:
            self._out.send(device, Pass(self.me, frame.id))
        self._shrink(frame, set(late), now)

    def _blame(self, devices: list[int], now: float, reason: str, frame: int | None = None) -> None:
        for device in devices:
            if self.membership.peers[device].admitted:
                self.membership.fault(device, now)
        self._lost(devices, now, reason, frame)

    def _lost(self, devices: Iterable[int], now: float, reason: str, frame: int | None = None) -> None:
        """Devices left (``frame`` waited for them in vain): no frame in flight counts on them any longer."""
        gone = set(devices)
        for device in gone:
            self._record.fault = device, now, reason
            self._out.add(notes.suspect(device, frame, reason))
        for each in self.frames:
            self._shrink(each, gone, now)

    def _shrink(self, frame: InFlight, gone: set[int], now: float) -> None:
        """Take devices out of a frame's view."""
        if frame.live & gone:
            self._revise(frame, gone, set(), now)

    def _revise(self, frame: InFlight, gone: set[int], poorer: set[int], now: float) -> None:
        """Count on other devices, and take over at once what has become this device's task."""
        before = frame.missing() if frame.phase is Phase.WAITING else {}
        frame.live -= gone
        frame.lesser |= poorer
        if frame.phase is Phase.DONE:
            return
        frame.owes, frame.clean = True, False
        for stage in range(frame.stage + (frame.phase is not Phase.READY)):
            self._out.publish_due(frame, stage, now)
        self._complete(frame, now)
        if frame.phase is Phase.WAITING:
            taken_over = {device for shard, device in frame.missing().items() if before.get(shard) != device}
            for device in taken_over:
                self._out.want(frame, device)
            self._deadlines.be_patient(frame, now)
            self._deadlines.arm(frame, now, factor=2.0)

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
        frame.phase = Phase.DONE
        self._deadlines.finished(frame, now)
        frame.got.clear()
        for frame_id in self.frames.surplus():
            self._drop(frame_id)

    def _drop(self, frame_id: FrameId) -> None:
        self.frames.forget(frame_id)
        self._out.add(Forget(frame_id))
