"""What a device hands to others: words, and the shards that are its task to publish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from robustdice.runtime.protocol.contact import Contacts
from robustdice.runtime.protocol.events import Action, Send
from robustdice.runtime.protocol.inflight import InFlight, Phase
from robustdice.runtime.protocol.membership import Membership
from robustdice.runtime.wire.messages import FrameId, Message, Parcel, Pass, Refused, ShardId, Shards, Want


class Outbox:
    """Collects the actions of device ``me`` while it handles an event."""

    def __init__(self, me: int, membership: Membership, contacts: Contacts) -> None:
        """Nothing is to be done yet."""
        self._me, self._membership, self._contacts = me, membership, contacts
        self._actions: list[Action] = []

    def add(self, action: Action) -> None:
        """Something that is no message."""
        self._actions.append(action)

    def take(self) -> list[Action]:
        """All actions, in order; none are left."""
        actions, self._actions = self._actions, []
        return actions

    def send(self, to: int | str, message: Message) -> None:
        """A message to a device (its number) or a client (its name)."""
        self.add(Send(to, message))

    def tell_all(self, message: Message) -> None:
        """A message to all peers that can be reached."""
        for device in self._membership.reachable:
            self.send(device, message)

    def refuse(self, frame_id: FrameId, reason: str) -> None:
        """This device does not answer a frame, and nobody is to wait for it."""
        self.send(frame_id.client, Refused(self._me, frame_id, reason))
        self.tell_all(Pass(self._me, frame_id))

    def pulse(self, to: Iterable[int], owes: Sequence[FrameId], now: float, reply: bool = False) -> None:
        """Say to peers how this device is, and ask for a ``reply``."""
        for device in to:
            self.send(device, self._contacts.pulse(device, owes, now, reply))

    def want(self, frame: InFlight, publisher: int) -> None:
        """Ask a peer for what is missing of it."""
        shards = sorted(shard for shard, device in frame.missing().items() if device == publisher)
        if shards and publisher != self._me:
            self.send(publisher, Want(self._me, frame.id, frame.stage, tuple(shards)))

    def publish_due(self, frame: InFlight, stage: int, now: float) -> None:
        """Publish what is computed, was not published yet, and is this device's task in the frame's view."""
        mine = [shard for shard in frame.shards_of(stage) if shard in frame.own]
        due = [shard for shard in mine if shard not in frame.published and frame.publisher(shard) == self._me]
        self.publish(frame, stage, due, [d for d in self._membership.reachable if d not in frame.parted], now)
        frame.published.update(due)
        if stage >= frame.stage and frame.phase is not Phase.DONE:
            frame.offer(((shard, frame.own[shard]) for shard in due), self._me, frame.built[stage])
        requests: dict[int, list[ShardId]] = {}
        for shard in mine:
            for device in frame.wanted.pop(shard, ()):
                if shard not in due:
                    requests.setdefault(device, []).append(shard)
        for device, shards in requests.items():
            self.publish(frame, stage, shards, [device], now)

    def publish(self, frame: InFlight, stage: int, shards: Iterable[ShardId], to: Sequence[int], now: float) -> None:
        """Hand over shards that are computed, in one message."""
        ordered = tuple(sorted(shards))
        if ordered:
            self.hand_over(frame, stage, Parcel(ordered, [frame.own[shard] for shard in ordered]), to, now)

    def publish_straight(self, frame: InFlight, stage: int, parcel: Parcel, now: float) -> None:
        """Publish what a frame that nothing irregular has happened to has to give in a stage."""
        self.hand_over(frame, stage, parcel, self._membership.reachable, now)

    def hand_over(self, frame: InFlight, stage: int, parcel: Parcel, to: Sequence[int], now: float) -> None:
        """A parcel for some peers."""
        message = Shards(self._me, self._contacts.hand_over(to, now), frame.id, stage, parcel, frame.built[stage])
        for device in to:
            self.send(device, message)
