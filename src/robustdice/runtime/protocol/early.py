"""What is known of a frame before it is here."""

from __future__ import annotations

from dataclasses import dataclass, field

from robustdice.runtime.wire.messages import ShardId, Shards


@dataclass
class Early:
    """What peers said about a frame before its client did."""

    since: float
    expected: bool = False
    """Its client can reach this device: it is only late."""
    messages: list[Shards] = field(default_factory=list)
    """Each has a shard that those before it do not have of the same sender."""
    known: set[tuple[ShardId, int]] = field(default_factory=set)
    """Shards that they have, and of whom."""
    wanted: dict[ShardId, set[int]] = field(default_factory=dict)
    passed: set[int] = field(default_factory=set)
    told: bool = False
    """Peers have been told that this device does not know the frame."""

    @property
    def speakers(self) -> set[int]:
        """The peers that work on the frame."""
        return {message.sender for message in self.messages}.union(*self.wanted.values())

    def keep(self, message: Shards) -> None:
        """Keep what a peer publishes until the frame is here."""
        new = {(shard, message.sender) for shard in message.parcel.shards} - self.known
        if new:
            self.known |= new
            self.messages.append(message)
