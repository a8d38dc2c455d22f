"""Eight bugs that an engine could have: each is caught by the simulation, on the seed that stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from robustdice.runtime.protocol import adding
from robustdice.runtime.protocol.engine import Engine
from robustdice.runtime.protocol.events import RunPieces, RunStage
from robustdice.runtime.protocol.frames import Frames
from robustdice.runtime.protocol.inflight import InFlight
from robustdice.runtime.protocol.membership import Membership
from robustdice.runtime.protocol.outbox import Outbox
from robustdice.runtime.protocol.waiting import Waiting
from robustdice.runtime.wire.messages import Lineage, Parcel
from scenarios import draw, failure

Patch = Callable[[pytest.MonkeyPatch], None]


def drop_the_takeover(patch: pytest.MonkeyPatch) -> None:
    """A device that has become a publisher does not compute what it has not computed yet."""

    def owed(self: InFlight, _: int) -> None:
        self.owes = False

    patch.setattr(InFlight, "owed", owed)


def accept_a_stale_frame(patch: pytest.MonkeyPatch) -> None:
    """A frame that is over is begun again when another copy of it arrives."""
    patch.setattr(Frames, "is_new", lambda self, frame_id: frame_id not in self._admitted)


def wait_for_a_device(patch: pytest.MonkeyPatch) -> None:
    """Frames in flight go on counting on whoever has left."""
    patch.setattr(Waiting, "lose", lambda *_: None)


def forget_a_spares_shard(patch: pytest.MonkeyPatch) -> None:
    """Of what is computed to stand in for others the last shard is not kept."""
    keep = InFlight.computed

    def computed(self: InFlight, task: RunStage | RunPieces, parcels: tuple[Parcel, ...]) -> tuple[Parcel, ...] | None:
        if isinstance(task, RunPieces):
            parcels = tuple(Parcel(parcel.shards[:-1], parcel.arrays[:-1]) for parcel in parcels)
        return keep(self, task, parcels)

    patch.setattr(InFlight, "computed", computed)


def trust_an_old_incarnation(patch: pytest.MonkeyPatch) -> None:
    """A peer that has started again is taken for the one that it was."""

    def hello(self: Membership, device: int, incarnation: str, _: float) -> bool:
        self.peers[device].incarnation = incarnation
        self.peers[device].ready = True
        return False

    patch.setattr(Membership, "hello", hello)


def count_twice(patch: pytest.MonkeyPatch) -> None:
    """Sums of which some have the same neurons are all added up."""
    patch.setattr(adding, "without_overlaps", lambda _, held, __: dict(held))


def leak_a_finished_frame(patch: pytest.MonkeyPatch) -> None:
    """What is over is kept."""
    patch.setattr(Engine, "_drop", lambda *_: None)


def publish_under_a_wrong_view(patch: pytest.MonkeyPatch) -> None:
    """Shards claim to be built with everybody's."""
    hand_over = Outbox.hand_over

    def claim(
        self: Outbox, frame: InFlight, stage: int, parcel: Parcel, to: Sequence[int], _: Lineage, now: float
    ) -> None:
        hand_over(self, frame, stage, parcel, to, Lineage(tuple(range(frame.manifest.devices))), now)

    patch.setattr(Outbox, "hand_over", claim)


PLANTED: list[tuple[Patch, int, str]] = [
    (drop_the_takeover, 82, "nothing moved"),
    (accept_a_stale_frame, 6, "is admitted twice"),
    (wait_for_a_device, 70, "nothing moved"),
    (forget_a_spares_shard, 0, "did not return"),
    (trust_an_old_incarnation, 82, "nothing moved"),
    (count_twice, 12, "a neuron counts twice"),
    (leak_a_finished_frame, 0, "keeps values"),
    (publish_under_a_wrong_view, 1, "but was computed with"),
]
"""The bug, a seed that catches it, and what that says."""


@pytest.mark.parametrize(("bug", "seed", "said"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_bug_is_caught(bug: Patch, seed: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure(draw(seed)) is None
    bug(monkeypatch)
    found = failure(draw(seed))
    assert found is not None
    assert said in found
