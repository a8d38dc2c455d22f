"""Who takes part: which devices the next frame will wait for, and when a suspect is let in again."""

from __future__ import annotations

from dataclasses import dataclass, field

from robustdice.runtime.protocol.events import Settings


@dataclass
class Peer:
    """What this device believes about another one."""

    connected: bool = False
    """The transport says so; nothing is sent to a peer that is not."""
    incarnation: str | None = None
    """From its last Hello; None before the first on a connection."""
    hears: bool = True
    """It does not say that it hears nothing of this device."""
    admitted: bool = False
    """New frames wait for its shards. Implies ``connected`` and ``hears``: what only one of two hears of the other,
    the two would compute differently."""
    ready: bool = False
    """It has shown since its last fault that it keeps up. Only matters while it is not admitted."""
    credit: float = 0.0
    """Seconds that it may still cost the others, as of ``fault_at``; below zero what it has cost too much."""
    fault_at: float = float("-inf")
    not_before: float = float("-inf")
    """It is not admitted again before this time: when what it has cost too much is made up for."""


@dataclass
class Membership:
    """The peers of device ``me``. A peer leaves by a fault at any time, and enters only by :meth:`admit`."""

    me: int
    devices: int
    settings: Settings
    peers: dict[int, Peer] = field(init=False)

    def __post_init__(self) -> None:
        self.peers = {device: Peer() for device in range(self.devices) if device != self.me}

    @property
    def reachable(self) -> list[int]:
        """Peers that the transport has a connection to, suspects included: they must be able to catch up."""
        return [device for device, peer in self.peers.items() if peer.connected]

    @property
    def unknown(self) -> list[int]:
        """Peers that can be reached, and have not said who they are."""
        return [device for device, peer in self.peers.items() if peer.connected and peer.incarnation is None]

    @property
    def admitted(self) -> list[int]:
        """Peers that the next frame waits for."""
        return [device for device, peer in self.peers.items() if peer.admitted]

    def up(self, now: float) -> list[int]:
        """The devices that a frame admitted now would wait for, this one included."""
        candidates = [device for device, peer in self.peers.items() if peer.admitted or _admissible(peer, now)]
        return sorted([self.me, *candidates])

    def admit(self, now: float) -> tuple[set[int], list[int]]:
        """At a frame's start: the devices that it waits for, and those among them that have just been let in."""
        entering = [device for device, peer in self.peers.items() if not peer.admitted and _admissible(peer, now)]
        for device in entering:
            self.peers[device].admitted = True
        return {self.me, *(device for device, peer in self.peers.items() if peer.admitted)}, entering

    def connected(self, device: int) -> None:
        """The connection to a peer stands (again)."""
        self.peers[device].connected = self.peers[device].hears = True

    def told(self, device: int, hears: bool) -> bool:
        """A peer says whether it hears this device; True, and a fault is due, when it does not and was admitted."""
        peer = self.peers[device]
        if hears and not peer.hears:
            self.evidence(device)
        peer.hears = hears
        return peer.admitted and not hears

    def disconnected(self, device: int, now: float) -> bool:
        """The connection is gone: True, and a fault, when the peer was admitted."""
        peer = self.peers[device]
        admitted = peer.admitted
        if admitted:
            self.fault(device, now)
        peer.connected, peer.ready, peer.incarnation = False, False, None
        return admitted

    def hello(self, device: int, incarnation: str, now: float) -> bool:
        """A peer introduces itself, which is evidence that it is well; True when it has restarted unnoticed. Whoever is
        not connected may be gone; when it is connected again it is asked who it is."""
        peer = self.peers[device]
        if not peer.connected:
            return False
        restarted = peer.admitted and peer.incarnation not in {None, incarnation}
        if restarted:
            self.fault(device, now)
        peer.incarnation = incarnation
        self.evidence(device)
        return restarted

    def evidence(self, device: int) -> None:
        """A peer has shown that it keeps up with frames in flight, or owes nothing while there are none. What comes
        when its connection is gone, or before it has said who it is, tells nothing of whoever is there next."""
        peer = self.peers[device]
        peer.ready = peer.ready or (peer.connected and peer.incarnation is not None)

    def fault(self, device: int, now: float, cost: float = 0.0) -> None:
        """A peer has failed to do its part, and others have waited for it for ``cost`` seconds: it is suspect. As long
        as its faults cost little it is let in again soon; else so much later that they do not cost more than a small
        share of all time."""
        peer, settings = self.peers[device], self.settings
        regained = peer.credit + settings.cost_share * (now - peer.fault_at)
        peer.credit = min(settings.cost_credit, regained) - settings.fault_cost - cost
        peer.credit = max(peer.credit, -settings.cost_share * settings.longest_backoff)
        backoff = max(settings.first_backoff, -peer.credit / settings.cost_share)
        peer.fault_at, peer.not_before = now, now + backoff
        peer.admitted = peer.ready = False


def _admissible(peer: Peer, now: float) -> bool:
    return peer.connected and peer.hears and peer.ready and now >= peer.not_before
