"""Waiting for what peers publish, and going on without them.

A frame waits until everything that has a live holder is there. Whoever was silent, or behind with its work, is blamed:
no frame counts on it any longer, and its shards become the next holders' task at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from robustdice.runtime.protocol import notes
from robustdice.runtime.protocol.contact import Contacts
from robustdice.runtime.protocol.deadlines import EXTENSION, Deadlines, Record
from robustdice.runtime.protocol.events import Settings
from robustdice.runtime.protocol.frames import Frames
from robustdice.runtime.protocol.inflight import InFlight
from robustdice.runtime.protocol.lateness import judge
from robustdice.runtime.protocol.membership import Membership
from robustdice.runtime.protocol.outbox import Outbox
from robustdice.runtime.protocol.state import Phase
from robustdice.runtime.wire.messages import Message, Pass, ShardId, Shards


class Waiting:
    """The frames of device ``me`` that wait."""

    def __init__(
        self,
        me: int,
        settings: Settings,
        membership: Membership,
        contacts: Contacts,
        deadlines: Deadlines,
        frames: Frames,
        record: Record,
        out: Outbox,
    ) -> None:
        """What an engine knows; nothing waits yet."""
        self._me, self._settings = me, settings
        self._membership, self._contacts, self._deadlines, self._frames = membership, contacts, deadlines, frames
        self._record, self._out = record, out
        self.leading: InFlight | None = None
        """The oldest frame that is not DONE. Devices work on it first, so only it shows that a peer is silent: a
        younger frame's shards may just have to queue. Stage deadlines run for the head alone."""

    def lead(self, now: float) -> None:
        """Let the head's deadline run from the moment that it has become the head."""
        head = self._frames.head
        if head is not None and head is not self.leading and head.phase is Phase.WAITING:
            head.since[head.stage] = now
            self.expect(head, now)
        self.leading = head

    def expect(self, frame: InFlight, now: float) -> None:
        """From now on a frame waits in its stage."""
        self._deadlines.be_patient(frame, now)
        self._deadlines.arm(frame, now)
        frame.asked_at = math.inf

    def take_straight(self, message: Message, now: float) -> InFlight | None:
        """Take what a peer publishes of a frame that nothing irregular has happened to, as nearly always, and give the
        frame; None, and nothing was done, if it is anything else."""
        if type(message) is not Shards:
            return None
        frame, sender = self._frames.get(message.frame), self._contacts.of[message.sender]
        if frame is None or sender.lost or not frame.take_straight(message):
            return None
        sender.take_shards(message.serial, now)
        if frame.phase is Phase.WAITING and message.stage == frame.stage and frame.complete:
            self.go_on(frame, now)
        return frame

    def complete(self, frame: InFlight, now: float) -> dict[ShardId, int]:
        """Go on to the next stage when everything that has a live holder is there. What the frame waits for, if it does
        and shards are looked after one by one, and who is to publish that."""
        if frame.phase is not Phase.WAITING:
            return {}
        if frame.straight is not None:
            if frame.complete:
                self.go_on(frame, now)
            return {}
        missing = frame.missing()
        if self._me in missing.values():
            frame.owes = True  # what has come may have made it this device's task
            self._out.publish_due(frame, frame.stage, now)
            missing = frame.missing()
        if not missing:
            self.go_on(frame, now)
        return missing

    def go_on(self, frame: InFlight, now: float) -> None:
        """Everything that has a live holder is there."""
        if frame.clean and not frame.parted and frame is self.leading:
            self._deadlines.observe(self._deadlines.waits[frame.stage], frame.since[frame.stage], now)
        self._advance(frame)

    def _advance(self, frame: InFlight) -> None:
        frame.stage += 1
        frame.phase, frame.nudge_at = Phase.READY, None

    def weigh(self, frame: InFlight, now: float) -> None:
        """Ask others than those that have turned out to have built on less."""
        if frame.straight is None and (poorer := frame.poorer()):
            for device in sorted(poorer & frame.live):
                self._out.add(notes.poor(device, frame.id.number, frame.stage))
            self._revise(frame, set(), poorer, now)

    def ask(self, frame: InFlight, missing: Mapping[ShardId, int], now: float) -> None:
        """Ask those that would not send what is missing by themselves, once."""
        for device in sorted(frame.unaware(missing) - frame.asked_again.keys()):
            frame.asked_again[device] = now
            self._out.want(frame, device)

    def ask_for_lost(self, device: int, now: float) -> None:
        """What a peer has sent is here. What was missed of it for long, and is not its work now, was lost."""
        contact = self._contacts.of[device]
        for frame in self._frames.pending():
            if not frame.waits_long(now) or not contact.has_delivered(frame.id):
                continue
            if frame.awaits(device):
                frame.unfold()
                self._out.want(frame, device)
                if frame is not self.leading:
                    frame.nudge_at = now + self._settings.minimum_wait  # words must not fill a link that is slow

    def look_at(self, frame: InFlight, frozen: bool, hurry_at: float, now: float) -> None:
        """Has it waited for too long? ``frozen``: this device itself stood still; ``hurry_at``: from when on it is to
        wait for nothing."""
        if now >= hurry_at:
            since = frame.since[frame.stage]
            if now - since >= self._settings.minimum_wait and now >= frame.wait_until and not frozen:
                self._suspect(frame, now, final=True)
            if frame.phase is Phase.WAITING:
                self.hurry(frame, now)
        elif frame is not self.leading:
            return
        elif frozen and not frame.rearmed:
            self._deadlines.arm(frame, now)
            frame.rearmed = True
        elif now >= frame.wait_until:
            self._suspect(frame, now)
        elif frame.nudge_at is not None and now >= frame.nudge_at:
            frame.unfold()
            frame.nudge_at, frame.asked_at = None, now
            self._out.pulse(frame.awaited(self._me), self._frames.owing(), now, reply=True)

    def hurry(self, frame: InFlight, now: float) -> None:
        """Go on with what there is."""
        frame.unfold()
        frame.hurried = frame.hurried or (frame.stage, now)
        self._advance(frame)

    def _suspect(self, frame: InFlight, now: float, final: bool = False) -> None:
        """The wait is over. Blame the publishers of what is missing that have no excuse; those that nobody can stand in
        for only at the second time, unless this is the last one: going on without them costs accuracy, going on too
        early does so needlessly. Wait on for the others, but in the end go on without them too."""
        frame.unfold()
        stage, verdict = frame.stage, judge(frame, self._contacts.of, self._me, now)
        guilty = verdict.silent | verdict.behind
        blamed = [device for device in sorted(guilty) if frame.extended or final or frame.replaceable(device)]
        for device in verdict.silent.intersection(blamed):
            self._contacts.of[device].lost = True
        reason = f"frame {frame.id.number} waited {now - frame.since[stage]:.3f} s for it in stage {stage}"
        self.blame(blamed, now, reason, frame.id.number, now - frame.since[stage])
        if final or frame.phase is not Phase.WAITING or frame.stage != stage or now < frame.wait_until:
            return
        if verdict.late and now >= frame.patient_until:
            for device in verdict.late:
                self._contacts.of[device].part()
            self.part(frame, sorted(verdict.late), now)
        elif guilty:  # nobody to replace them
            self._deadlines.arm(frame, now, factor=EXTENSION)
            frame.extended = True
        else:
            for device in sorted(verdict.stalled):
                frame.asked_again[device] = now
                self._out.want(frame, device)
            self._deadlines.arm(frame, now)

    def part(self, frame: InFlight, late: list[int], now: float) -> None:
        """Go on without devices that are well, but too far away for this frame."""
        if not late:
            return
        frame.unfold()
        for device in late:
            self._out.add(notes.late(device, frame.id.number))
        frame.parted.update(late)
        for device in late:
            self._out.send(device, Pass(self._me, frame.id))
        self.shrink(frame, set(late), now)

    def blame(self, devices: list[int], now: float, reason: str, frame: int | None = None, cost: float = 0.0) -> None:
        """It is the devices' own fault that they are not counted on any longer, and ``cost`` others so many seconds."""
        for device in devices:
            if self._membership.peers[device].admitted:
                self._membership.fault(device, now, cost)
        self.lose(devices, now, reason, frame)

    def lose(self, devices: Iterable[int], now: float, reason: str, frame: int | None = None) -> None:
        """Devices left (``frame`` waited for them in vain): no frame in flight counts on them any longer."""
        gone = set(devices)
        for device in gone:
            self._record.fault = device, now, reason
            self._out.add(notes.suspect(device, frame, reason))
        for each in self._frames:
            self.shrink(each, gone, now)

    def shrink(self, frame: InFlight, gone: set[int], now: float) -> None:
        """Take devices out of a frame's view."""
        if frame.live & gone:
            self._revise(frame, gone, set(), now)

    def _revise(self, frame: InFlight, gone: set[int], poorer: set[int], now: float) -> None:
        """Count on other devices, and take over at once what has become this device's task."""
        frame.unfold()
        before = frame.missing() if frame.phase is Phase.WAITING else {}
        frame.live -= gone
        frame.lesser |= poorer
        if frame.phase is Phase.DONE:
            return
        frame.owes, frame.clean = True, False
        for stage in range(frame.stage + (frame.phase is not Phase.READY)):
            self._out.publish_due(frame, stage, now)
        missing = self.complete(frame, now)
        if frame.phase is Phase.WAITING:
            taken_over = {device for shard, device in missing.items() if before.get(shard) != device}
            for device in taken_over:
                frame.asked_again[device] = now
                self._out.want(frame, device)
            self._deadlines.be_patient(frame, now)
            self._deadlines.arm(frame, now, factor=2.0)
