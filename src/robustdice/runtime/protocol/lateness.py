"""Why a frame still waits: whose fault is it, and who merely has a slow way?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from robustdice.runtime.protocol.contact import Contact, Standing
from robustdice.runtime.protocol.inflight import InFlight


@dataclass(frozen=True)
class Verdict:
    """The peers that a frame misses shards of."""

    silent: frozenset[int]
    """They do not answer."""
    behind: frozenset[int]
    """They have not done their part."""
    late: frozenset[int]
    """They are well, and what they have sent may be on the way; or a word from them may be."""
    stalled: frozenset[int]
    """Those of ``late`` that are to be asked (again) for what is missing: no shards have come from them lately."""


def judge(frame: InFlight, contacts: Mapping[int, Contact], me: int, now: float) -> Verdict:
    """What is to be thought of the publishers of what ``frame`` misses."""
    standings = {device: contacts[device].standing(frame.id, frame.asked_at, now) for device in frame.awaited(me)}
    late = [d for d, standing in standings.items() if standing in {Standing.UNKNOWN, Standing.ON_THE_WAY}]
    return Verdict(
        silent=frozenset(d for d, standing in standings.items() if standing is Standing.SILENT),
        behind=frozenset(d for d, standing in standings.items() if standing is Standing.BEHIND),
        late=frozenset(late),
        stalled=frozenset(device for device in late if _stalled(frame, device, contacts[device].shards_at, now)),
    )


def _stalled(frame: InFlight, device: int, shards_at: float, now: float) -> bool:
    """Nothing came since the device was asked how it is; later on, for as long as had been waited when it was asked
    last: what is sent again may get lost again, but must not fill a link that is only slow."""
    if device not in frame.asked_again and shards_at < frame.asked_at:
        return True
    asked = frame.asked_again.get(device, frame.asked_at)
    return now - max(asked, shards_at) >= asked - frame.since[frame.stage]
