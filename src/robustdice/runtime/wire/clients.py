"""By what names clients go, and where replies to these are sent."""

from __future__ import annotations

from collections import OrderedDict

REMEMBERED_NAMES = 64
"""Of a key. Whoever makes up names pushes out none of another key."""


class ClientNames:
    """The names that clients have used lately, by whose key; a name is theirs who used it first."""

    def __init__(self) -> None:
        """Nobody has spoken yet."""
        self._known: dict[str, tuple[str, bytes]] = {}
        """A name -> whose it is, and where he was heard last."""
        self._of: dict[str, OrderedDict[str, None]] = {}
        """A key -> its names, the least recently heard of first."""

    def heard(self, name: str, key: str, route: bytes) -> bool:
        """Somebody with this key has spoken by this name; False when the name is another's."""
        if self._known.get(name, (key,))[0] != key:
            return False
        self._known[name] = key, route
        names = self._of.setdefault(key, OrderedDict())
        names[name] = None
        names.move_to_end(name)
        while len(names) > REMEMBERED_NAMES:
            del self._known[names.popitem(last=False)[0]]
        return True

    def route(self, name: str) -> bytes | None:
        """Where to send what is for it; None when it is not known any more."""
        known = self._known.get(name)
        return None if known is None else known[1]
