"""Who was turned away, and when to say it again: what happens every second is logged once a minute."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

SAY_SECONDS = 60.0
REMEMBERED = 64
"""Strangers can think of any number of keys."""


class Reminders:
    """What has been said about whom: the same thing is worth a line in the log once a minute."""

    def __init__(self) -> None:
        """Nothing has been said yet."""
        self._said: OrderedDict[object, tuple[str, float]] = OrderedDict()

    def due(self, subject: object, text: str, now: float) -> bool:
        """Is ``text`` to be said about ``subject``? True at most once a minute, and when it was another text before."""
        before, at = self._said.get(subject, ("", 0.0))
        if text == before and now < at + SAY_SECONDS:
            return False
        self._said[subject] = text, now
        self._said.move_to_end(subject)
        while len(self._said) > REMEMBERED:
            self._said.popitem(last=False)
        return True

    def settled(self, subject: object) -> bool:
        """The matter is over: True when anything had been said about it."""
        return self._said.pop(subject, None) is not None


@dataclass
class _Refusal:
    address: str | None
    public_key: str | None
    reason: str
    count: int = 0
    last_at: float = 0.0


class Refusals:
    """The connections and messages that a device has refused, by who was refused and why; the latest few."""

    def __init__(self) -> None:
        """Nobody yet."""
        self._entries: OrderedDict[tuple[str | None, str | None, str], _Refusal] = OrderedDict()

    def add(self, address: str | None, public_key: str | None, reason: str, now: float) -> None:
        """One more; ``address`` and ``public_key`` (Z85) where they are known."""
        entry = self._entries.setdefault((address, public_key, reason), _Refusal(address, public_key, reason))
        entry.count, entry.last_at = entry.count + 1, now
        self._entries.move_to_end((address, public_key, reason))
        while len(self._entries) > REMEMBERED:
            self._entries.popitem(last=False)

    def status(self, now: float) -> list[dict[str, Any]]:
        """For ``robustdice status``, the latest first."""
        return [
            {
                "address": entry.address,
                "public_key": entry.public_key,
                "reason": entry.reason,
                "count": entry.count,
                "seconds_ago": now - entry.last_at,
            }
            for entry in reversed(self._entries.values())
        ]
