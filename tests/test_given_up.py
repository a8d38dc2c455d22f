"""What a frame keeps while it is under way: what somebody may still lack, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bundles import INPUT_SHAPE, Network, make_manifest, make_plan, write_bundles
from robustdice.bundle.read import Bundle
from robustdice.runtime.protocol.events import Event, PeerDown, PeerUp, Received, Tick
from robustdice.runtime.protocol.inflight import InFlight
from robustdice.runtime.protocol.views import Views
from robustdice.runtime.wire.messages import Answer, Frame, FrameId
from test_straight import Device, Dying, run

FRAME = FrameId("ab", 1)


@pytest.fixture(autouse=True)
def all_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustdice.runtime.worker.BRIEF_SECONDS", np.inf)


class Watched(Device):
    """Knows of which stages of the frame it has kept anything, of its own and for spares, at any one time."""

    def __init__(self, bundle: Bundle) -> None:
        self.published, self.read = set[int](), set[int]()
        self.most = 0, 0
        super().__init__(bundle)

    def handle(self, event: Event, now: float) -> None:
        super().handle(event, now)
        frame = self.engine.frames.get(FRAME)
        if isinstance(frame, InFlight):
            self.published = {stage for stage, device in frame.parcels if device == self.me}
        self.read = set(self.worker._inputs.get(FRAME, {}))
        self.most = max(self.most[0], len(self.published)), max(self.most[1], len(self.read))


def ran(devices: list[Watched]) -> list[Answer]:
    image = np.random.default_rng(0).standard_normal((1, *INPUT_SHAPE)).astype(np.float32)
    for device in devices:
        device.handle(Received(Frame(FRAME, 1, 2.0, image)), 1.0)
    return [message for message in run(devices, 1.0) if isinstance(message, Answer)]


def test_what_no_device_can_lack_any_more_is_given_up_while_the_frame_is_under_way(tmp_path: Path) -> None:
    devices = [Watched(bundle) for bundle in write_bundles(tmp_path, make_plan(3), Network())]
    run(devices, 0.0)
    assert [answer.coverage for answer in ran(devices)] == [1.0] * 3
    assert len(devices[0].engine.manifest.exchanges) == 3
    # What was published is kept, and what spares would read of the stage that all are in and the one before.
    assert [device.most for device in devices] == [(3, 2)] * 3


def test_while_a_device_is_down_everything_is_kept_for_it(tmp_path: Path) -> None:
    devices = [Watched(bundle) for bundle in write_bundles(tmp_path, make_plan(3), Network())]
    run(devices, 0.0)
    for device in devices[:2]:
        device.handle(PeerDown(2), 0.5)
    assert [answer.coverage for answer in ran(devices[:2])] == [1.0] * 2
    assert [device.most[1] for device in devices[:2]] == [0, 3]  # the first stands in for the one that is down


class LateDying(Watched, Dying):
    """Its last words are of the second stage."""


def test_who_dies_when_much_was_given_up_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_straight.DIES_IN", 2)
    kinds = (Watched, Watched, LateDying)
    bundles = write_bundles(tmp_path, make_plan(3), Network())
    devices = [kind(bundle) for kind, bundle in zip(kinds, bundles, strict=True)]
    run(devices, 0.0)
    assert [answer.sender for answer in ran(devices)] == [2]
    survivors = devices[:2]
    assert [device.read for device in survivors] == [{1, 2}] * 2
    for device in survivors:
        device.handle(PeerDown(2), 1.1)
    answers = [message for message in run(survivors, 1.1) if isinstance(message, Answer)]
    assert [(answer.coverage, answer.down) for answer in answers] == [(1.0, (2,))] * 2


def test_who_restarts_in_the_middle_is_given_what_it_missed(tmp_path: Path) -> None:
    bundles = write_bundles(tmp_path, make_plan(3), Network())
    devices = [Watched(bundle) for bundle in bundles]
    run(devices, 0.0)
    assert len(ran(devices)) == 3
    newcomer = Watched(bundles[2])
    for device in devices[:2]:
        device.handle(PeerDown(2), 1.1)
        device.handle(PeerUp(2), 1.2)
    together = [*devices[:2], newcomer]
    run(together, 1.2)
    image = np.random.default_rng(0).standard_normal((1, *INPUT_SHAPE)).astype(np.float32)
    newcomer.handle(Received(Frame(FRAME, 1, 5.0, image)), 1.2)
    answers = run(together, 1.2)
    for now in np.arange(1.25, 3.0, 0.05).tolist():
        for device in together:
            device.handle(Tick(now), now)
        answers += run(together, now)
    assert [(a.sender, a.coverage) for a in answers if isinstance(a, Answer)] == [(2, 1.0)]


@pytest.mark.parametrize("spares", ["standby", "hot"])
def test_nothing_is_given_up_where_sums_have_owners(spares: str) -> None:
    """Who stands in for an owner that has died needs the sums of the stage before, which only that one was sent."""
    everyone = (0, 1, 2)
    for owned in (False, True):
        manifest = make_manifest(make_plan(3, 3, pair=True, owned=owned), 0, spares)
        assert (max(Views(manifest).of(everyone).settled) == 0) == owned
