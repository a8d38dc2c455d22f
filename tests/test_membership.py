"""When a device that has failed is let in again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bundles import make_plan
from robustdice.runtime.protocol.events import Settings
from robustdice.runtime.protocol.membership import Membership
from simulation import World

FIRST, LONGEST = Settings().first_backoff, Settings().longest_backoff


def backoffs(faults: int, cost: float, well_seconds: float) -> list[float]:
    """Of a device that is let in as soon as it may be, is well for so long, and then costs others so many seconds."""
    membership, waits, now = Membership(0, 2, Settings()), [], 100.0
    for _ in range(faults):
        membership.connected(1)
        membership.hello(1, "0", now)
        now = max(now, membership.peers[1].not_before)
        assert membership.admit(now)[0] == {0, 1}
        now += well_seconds + cost
        membership.fault(1, now, cost)
        assert membership.admit(now)[0] == {0}
        waits.append(membership.peers[1].not_before - now)
    return waits


def test_a_device_that_others_wait_for_again_and_again_takes_at_most_a_tenth_of_the_time() -> None:
    waits = backoffs(40, 0.3, 0.1)
    assert waits[:3] == pytest.approx([FIRST] * 3)
    assert 0.3 * 20 / (sum(waits[20:]) + 0.4 * 20) < 0.1
    assert max(waits) <= LONGEST


def test_a_device_is_kept_out_for_no_longer_than_the_longest_backoff_whatever_it_has_cost() -> None:
    assert max(backoffs(10, 30.0, 0.0)) == pytest.approx(LONGEST)


def test_a_device_that_is_well_for_long_between_its_faults_is_let_in_again_soon_after_each() -> None:
    assert backoffs(100, 0.3, 4.0) == pytest.approx([FIRST] * 100)


def test_a_device_that_fails_often_without_keeping_anybody_waiting_is_let_in_again_soon() -> None:
    assert backoffs(100, 0.0, 0.3) == pytest.approx([FIRST] * 100)


def test_silence_that_nobody_waited_for_costs_nothing() -> None:
    world = World(make_plan(2), 3)
    for number in range(8):
        world.start_client(0.7 + number, 0.8 + number)  # who is admitted is counted on, also when frames have ended
        world.at(1.0 + number, world.freeze, 1)
        world.at(1.6 + number, world.thaw, 1)
    world.run(8.9)
    engine = world.nodes[0].engine
    assert engine is not None
    peer = engine.membership.peers[1]
    assert peer.fault_at > 8.0
    assert peer.not_before - peer.fault_at == pytest.approx(FIRST)


@pytest.mark.parametrize(
    "words",
    [
        lambda membership: membership.evidence(1),
        lambda membership: membership.hello(1, "0", 2.5),
        lambda membership: [membership.told(1, hears) for hears in (False, True)],
    ],
    ids=["shards", "hello", "pulses"],
)
def test_what_comes_late_from_a_process_that_is_gone_does_not_let_in_the_next_one(
    words: Callable[[Membership], object],
) -> None:
    membership = Membership(0, 2, Settings())
    membership.connected(1)
    membership.hello(1, "0", 1.0)
    assert membership.admit(1.0)[0] == {0, 1}
    assert membership.disconnected(1, 2.0)
    words(membership)
    membership.connected(1)
    membership.evidence(1)
    assert membership.admit(3.0)[0] == {0}
    assert membership.unknown == [1], "it is asked who it is"
    membership.hello(1, "1", 3.0)
    assert membership.admit(3.0)[0] == {0, 1}


def test_a_device_that_was_slow_is_up_again_before_the_next_frame_comes() -> None:
    """It was blamed for being behind, and has been done with everything for a while."""
    world = World(make_plan(3), 4, window=1)
    world.at(1.0, world.slow_down, 2, 200.0)
    world.at(1.1, world.slow_down, 2, 1.0)
    world.start_client(0.2, 1.3)
    world.run(5.0)
    assert [text for _, device, text in world.notes if device != 2 and text.startswith("device 2 is suspect: frame")]
    for node in world.nodes:
        assert node.engine is not None
        assert node.engine.status(5.0 + node.offset)["up"] == [0, 1, 2]
    world.start_client(5.1, 5.3)
    world.run(9.0)
    world.check()
    later = [answer for number, sent in world.sent.items() if sent > 5.0 for _, answer in world.answers[number]]
    assert later
    assert {(answer.coverage, answer.from_spares) for answer in later} == {(1.0, 0.0)}
