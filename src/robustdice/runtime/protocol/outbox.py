"""What a device hands to others: words, and the shards that are its task to publish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from robustdice.runtime.protocol import adding
from robustdice.runtime.protocol.contact import Contacts
from robustdice.runtime.protocol.events import Action, Send
from robustdice.runtime.protocol.inflight import InFlight
from robustdice.runtime.protocol.membership import Membership
from robustdice.runtime.protocol.state import Phase
from robustdice.runtime.wire.messages import FrameId, Lineage, Message, Parcel, Pass, Refused, ShardId, Shards, Want


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
        self.want_all(frame, [shard for shard, device in frame.missing().items() if device == publisher], publisher)

    def want_all(self, frame: InFlight, shards: Iterable[ShardId], publisher: int) -> None:
        """Ask a peer for shards, of whatever stages they are."""
        if publisher == self._me:
            return
        for stage, some in groupby(sorted(shards), key=frame.ancestry.stage_of):
            self.send(publisher, Want(self._me, frame.id, stage, tuple(some)))

    def want_sums(self, frame: InFlight, shards: Iterable[ShardId]) -> None:
        """Ask for what is missing of the sums that some shards are computed from, if these are of owners."""
        missing: dict[int, list[ShardId]] = {}
        for owners, number in shards:
            if (sums := frame.manifest.sums_of.get(owners)) is not None and frame.entered((sums, 0)):
                for shard, device in adding.sums_for(frame, owners, number).items():
                    missing.setdefault(device, []).append(shard)
        for device, some in missing.items():
            self.want_all(frame, some, device)

    def publish_due(self, frame: InFlight, stage: int, now: float) -> None:
        """Publish what is computed, was not published yet, and is this device's task in the frame's view."""
        mine = [shard for shard in frame.ancestry.shards_of[stage] if shard in frame.own]
        task = [shard for shard in mine if frame.publisher(shard) == self._me]
        due = [shard for shard in task if shard not in frame.published]
        peers = [device for device in self._membership.reachable if device not in frame.parted]
        for_owners = [shard for shard in task if frame.manifest.exchanges[shard[0]].owners is not None]
        owners = {shard: adding.owner(frame, shard) for shard in for_owners}
        self.publish(frame, stage, [shard for shard in due if shard not in owners], peers, now)
        for device in peers if owners else ():
            self.publish(frame, stage, [shard for shard in due if owners.get(shard) == device], [device], now)
        frame.published.update(due)
        used = frame.phase is Phase.DONE or stage < frame.stage
        for shard in task:
            if owners[shard] == self._me if shard in owners else shard in due and not used:
                frame.offer([(shard, frame.own[shard])], self._me, frame.lineage_of(shard))
        requests: dict[int, list[ShardId]] = {}
        for shard in mine:
            for device in frame.wanted.pop(shard, ()):
                if shard not in due or (shard in owners and owners[shard] != device):
                    requests.setdefault(device, []).append(shard)
        for device, shards in requests.items():
            self.publish(frame, stage, shards, [device], now)

    def publish(self, frame: InFlight, stage: int, shards: Iterable[ShardId], to: Sequence[int], now: float) -> None:
        """Hand over shards that are computed, in one message for all that was built on the same."""
        alike: dict[Lineage, list[ShardId]] = {}
        for shard in sorted(shards):
            alike.setdefault(frame.lineage_of(shard), []).append(shard)
        for lineage, some in alike.items():
            self.hand_over(frame, stage, Parcel(tuple(some), [frame.own[shard] for shard in some]), to, lineage, now)

    def publish_straight(self, frame: InFlight, stage: int, parcels: Sequence[Parcel], now: float) -> None:
        """Publish what a frame that nothing irregular has happened to has to give in a stage."""
        assert frame.straight is not None  # only of such frames anything is due in parcels
        peers, lineage = self._membership.peers, frame.built[stage]
        for parcel, receivers in zip(parcels, frame.straight.receivers[stage], strict=True):
            self.hand_over(frame, stage, parcel, [d for d in receivers if peers[d].connected], lineage, now)

    def hand_over(
        self, frame: InFlight, stage: int, parcel: Parcel, to: Sequence[int], lineage: Lineage, now: float
    ) -> None:
        """A parcel for some peers."""
        if not to:
            return
        message = Shards(self._me, self._contacts.hand_over(to, now), frame.id, stage, parcel, lineage)
        for device in to:
            self._actions.append(Send(device, message))
