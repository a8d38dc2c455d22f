"""Peers that this device hears and that do not hear it, or the reverse.

So it is with a board that has a new address which nobody was told, or behind a firewall.
"""

from __future__ import annotations

from typing import Any

from robustdice.runtime.protocol import notes
from robustdice.runtime.protocol.contact import Contact, Contacts
from robustdice.runtime.protocol.events import Note, Settings
from robustdice.runtime.protocol.membership import Membership, Peer

CANNOT_REACH = "it is heard, but cannot be reached"
NOT_HEARD_BY = "it is heard, but hears nothing of this device"
NOT_HEARD = "it is connected to, but nothing is heard of it"


class OneWay:
    """Who is so, and since when: while connections are made, everybody is so for a moment."""

    def __init__(self, settings: Settings) -> None:
        """Nobody is."""
        self._settings = settings
        self._found: dict[int, tuple[str, float]] = {}
        """What was seen of a peer at the last look, and for how long it has been."""
        self._named: dict[int, str] = {}

    def look(self, membership: Membership, contacts: Contacts, now: float) -> list[Note]:
        """Look at all peers; what is to be logged."""
        found = []
        for device, peer in membership.peers.items():
            what = _judge(peer, contacts.of[device], self._settings, now)
            known, since = self._found.get(device, (None, now))
            if what is None:
                self._found.pop(device, None)
                if self._named.pop(device, None) and peer.connected:
                    found.append(notes.both_ways(device))
            elif what != known:
                self._found[device] = what, now
            elif now - since >= self._settings.one_way and self._named.get(device) != what:
                self._named[device] = what
                found.append(notes.one_way(device, what))
        return found

    @property
    def unheard(self) -> list[int]:
        """Peers that are connected to, and are to be told again that this device is there."""
        return [device for device, (what, _) in self._found.items() if what == NOT_HEARD]

    def status(self, now: float) -> list[dict[str, Any]]:
        """For ``robustdice status``."""
        return [
            {"device": device, "reason": reason, "seconds": now - self._found[device][1]}
            for device, reason in sorted(self._named.items())
            if device in self._found
        ]


def _judge(peer: Peer, contact: Contact, settings: Settings, now: float) -> str | None:
    if not peer.connected:  # where it cannot be reached, its pulses do not come either
        return CANNOT_REACH if contact.heard_of and now < contact.heard_at + settings.one_way else None
    if now >= contact.silent_at(settings):
        return NOT_HEARD
    return None if peer.hears else NOT_HEARD_BY
