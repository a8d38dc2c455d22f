"""Which frames a device knows, and how many it remembers: its memory is bounded whatever others say."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from robustdice.runtime.protocol.deadlines import Deadlines
from robustdice.runtime.protocol.early import Early
from robustdice.runtime.protocol.events import Settings
from robustdice.runtime.protocol.inflight import InFlight
from robustdice.runtime.protocol.state import Phase
from robustdice.runtime.wire.messages import FrameId


class Frames:
    """The frames that were admitted, those that only peers spoke of, and the names of those that are over."""

    def __init__(self, settings: Settings) -> None:
        """No frame is known."""
        self._settings = settings
        self._admitted: dict[FrameId, InFlight] = {}
        """In the order of admission. At most ``window`` that are not DONE (twice that with several clients), and
        ``window`` that are."""
        self.admitted = self._admitted.values()
        """The oldest first; only to be looked through as long as they do not change."""
        self.get = self._admitted.get
        """The frame with an id, if it is admitted."""
        self._pending: dict[FrameId, InFlight] = {}
        """Those of them that are not DONE."""
        self.head: InFlight | None = None
        """The oldest of these."""
        self._early: OrderedDict[FrameId, Early] = OrderedDict()
        """At most 2 ``window``, never one that was admitted or is over."""
        self._over: OrderedDict[FrameId, bool] = OrderedDict()
        """The last ``remembered_frames`` frames that were dropped or refused (True): late messages mean nothing."""
        self._met: OrderedDict[str, None] = OrderedDict()
        """Clients that can reach this device, by what was seen last; at most ``remembered_frames``."""

    def __iter__(self) -> Iterator[InFlight]:
        """Those admitted, the oldest first; they may change meanwhile."""
        return iter(list(self._admitted.values()))

    def __contains__(self, frame_id: FrameId) -> bool:
        """Whether the frame is admitted."""
        return frame_id in self._admitted

    def is_new(self, frame_id: FrameId) -> bool:
        """Whether it was neither admitted nor is it over."""
        return frame_id not in self._admitted and frame_id not in self._over

    def refusal(self, frame_id: FrameId, key: str) -> str | None:
        """Why not one more frame of this client, whose key this is, is worked on now; None when it is.

        A client that is alone may use the whole window. Who comes to a full one need not wait: keys have equal shares
        of it, and the clients of a key of that. Whoever had more before gets nothing new until it has less. Two windows
        are never exceeded, nor a key's share by more than half, whatever names it makes up.
        """
        pending, window = self._pending.values(), self._settings.window
        of_key = [frame for frame in pending if frame.key == key]
        names, keys = {frame.id.client for frame in of_key}, {frame.key for frame in pending}
        share = max(1, window // len(keys | {key}))
        part = max(1, share // len(names | {frame_id.client}))
        own = sum(frame.id.client == frame_id.client for frame in of_key)
        if own < part and len(of_key) < share + share // 2 and len(pending) < 2 * window:
            return None
        if len(pending) == own:
            return f"works on {own} frames, its window"
        return f"works on {len(pending)} frames, {own} of this client, whose share of its window of {window} is {part}"

    def meet(self, client: str) -> None:
        """Something has come from a client."""
        self._met[client] = None
        self._met.move_to_end(client)
        if len(self._met) > self._settings.remembered_frames:
            self._met.popitem(last=False)

    def miss(self, client: str) -> None:
        """A frame of a client has not come."""
        self._met.pop(client, None)

    def admit(self, frame: InFlight) -> Early | None:
        """Work on a frame, with what peers have already said about it, which is returned."""
        self._admitted[frame.id] = self._pending[frame.id] = frame
        self.head = self.head or frame
        early = self._early.pop(frame.id, None)
        if early:
            if early.passed or early.wanted:
                frame.unfold()
            frame.live -= early.passed
            frame.parted |= early.passed
            frame.wanted = early.wanted
            for message in early.messages:
                frame.take(message)
        return early

    def early(self, frame_id: FrameId, now: float) -> Early | None:
        """What peers say about a frame that was not admitted yet; None when it is over."""
        if frame_id in self._over:
            return None
        early = self._early.setdefault(frame_id, Early(now, frame_id.client in self._met))
        while len(self._early) > 2 * self._settings.window:
            self._early.popitem(last=False)
        return early

    def early_ones(self) -> list[tuple[FrameId, Early]]:
        """All frames that only peers spoke of."""
        return list(self._early.items())

    def due(self, deadlines: Deadlines, head: InFlight | None, now: float) -> list[float]:
        """When something is to be done about a frame, or at least looked at; stage deadlines run for the head alone."""
        times = [deadlines.early_until(early) for early in self._early.values()]
        times += [hurry_at for _, hurry_at in deadlines.hurries(self.pending(), now)]
        for frame in self._admitted.values():
            if frame.phase is Phase.WAITING and frame is head:
                times.append(frame.wait_until if frame.nudge_at is None else frame.nudge_at)
            elif frame.phase is Phase.DONE:
                times.append(frame.deadline)
        return times

    def retire(self, frame: InFlight) -> None:
        """The frame was answered or given up: it is DONE."""
        frame.retire()
        self._remove(frame.id)

    def forget(self, frame_id: FrameId) -> None:
        """The frame is over: nothing that is said about it matters any more."""
        self._admitted.pop(frame_id, None)
        self._remove(frame_id)
        self._early.pop(frame_id, None)
        self._over[frame_id] = False
        while len(self._over) > self._settings.remembered_frames:
            self._over.popitem(last=False)

    def refuse(self, frame_id: FrameId) -> set[int]:
        """The frame is not worked on here; the peers that are known to work on it."""
        early = self._early.get(frame_id)
        self.forget(frame_id)
        self._over[frame_id] = True
        return early.speakers if early else set()

    def refused(self, frame_id: FrameId) -> bool:
        """Whether it was refused, as far as that is remembered."""
        return self._over.get(frame_id, False)

    def surplus(self) -> list[FrameId]:
        """Those that are DONE, but for the last ``window``."""
        done = [frame.id for frame in self._admitted.values() if frame.phase is Phase.DONE]
        return done[: -self._settings.window]

    def _remove(self, frame_id: FrameId) -> None:
        self._pending.pop(frame_id, None)
        self.head = next(iter(self._pending.values()), None)

    def owing(self) -> list[FrameId]:
        """Those that wait for nothing but this device's own work."""
        return [frame.id for frame in self if frame.phase in {Phase.READY, Phase.COMPUTING} or frame.owes]

    def pending(self) -> list[InFlight]:
        """Those admitted that are not DONE, the oldest first."""
        return list(self._pending.values())

    @property
    def in_flight(self) -> int:
        """Frames admitted and not answered yet."""
        return len(self._pending)

    @property
    def buffered(self) -> int:
        """Arrays held for all frames."""
        early = sum(len(early.known) for early in self._early.values())
        return early + sum(frame.buffered for frame in self._admitted.values())
