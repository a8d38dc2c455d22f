"""Links that carry less than the devices could send: a slow link slows, and nothing collapses."""

from __future__ import annotations

import pytest

from bundles import make_plan
from robustdice.runtime.choice import Pace
from simulated_network import Network
from simulation import World


def behind_a_link(seconds_per_frame: float, seed: int, delay: float, until: float = 6.0) -> World:
    """Four devices behind a shared link on which the shards of one frame take so long."""
    world = World(make_plan(4), seed, ("hot", "standby")[seed % 2], Network(delay=delay, bytes_per_second=1.0))
    assert world.link is not None
    world.link.bytes_per_second = 3 * 400 * (128 + 192 + 10) / seconds_per_frame
    world.pace = Pace(4, world.timeout_seconds, 4)
    world.interval = 0.01
    world.start_client(0.2, until)
    return world


def answered_in_time(world: World) -> list[float]:
    """For every frame, the best coverage that was there in time."""
    coverages = []
    for number, sent in world.sent.items():
        given = [(at, answer.coverage) for at, answer in world.answers.get(number, ())]
        coverages.append(max((c for at, c in given if at <= sent + world.timeout_seconds), default=0.0))
    return coverages


def suspicions(world: World) -> list[tuple[float, int, str]]:
    return [note for note in world.notes if "suspect" in note[2]]


@pytest.mark.parametrize(("seconds_per_frame", "delay"), [(0.05, 0.02), (0.3, 0.005), (0.3, 0.1), (0.6, 0.02)])
def test_a_slow_link_slows_and_costs_nothing_else(seconds_per_frame: float, delay: float) -> None:
    until = 0.2 + 10 * (seconds_per_frame + 7 * delay)
    world = behind_a_link(seconds_per_frame, 1, delay, until)
    world.run(until + 3.0)
    world.check()
    coverages = answered_in_time(world)
    assert len(coverages) > 5
    assert set(coverages) == {1.0}
    assert not suspicions(world)


@pytest.mark.parametrize("seconds_per_frame", [1.9, 3.0, 5.0])
def test_where_not_all_can_take_part_in_time_frames_are_answered_with_fewer(seconds_per_frame: float) -> None:
    world = behind_a_link(seconds_per_frame, int(seconds_per_frame), 0.02)
    world.run(9.0)
    world.check()
    coverages = answered_in_time(world)
    assert min(coverages) == 0.5, "what a device alone has with two holders of every neuron on four devices"
    assert not suspicions(world)
    assert any(answer.late for given in world.answers.values() for _, answer in given)


def test_when_the_link_is_fast_again_all_take_part_again() -> None:
    world = behind_a_link(5.0, 2, 0.02, until=9.0)
    assert world.link is not None
    world.at(3.0, setattr, world.link, "bytes_per_second", 2e6)
    world.run(11.0)
    world.check()
    late = [c for (number, sent), c in zip(world.sent.items(), answered_in_time(world), strict=True) if sent > 7.0]
    assert len(late) > 4
    assert set(late) == {1.0}


def test_a_crash_behind_a_slow_link_is_still_found_and_made_up_for() -> None:
    world = behind_a_link(0.3, 3, 0.02)
    world.at(3.0, world.crash, 2, True)
    world.run(9.0)
    world.check()
    assert min(answered_in_time(world)) == 1.0
    first = min(at for at, _, _ in suspicions(world))
    assert 3.0 < first < 4.0
    assert {text[:8] for _, device, text in suspicions(world) if device != 2} == {"device 2"}


@pytest.mark.parametrize("idle", [True, False])
def test_a_frozen_peer_on_a_fast_link_is_found_within_350_ms(idle: bool) -> None:
    world = World(make_plan(4), 4)
    world.start_client(0.2, 0.9 if idle else 1.4)
    world.at(1.0, world.freeze, 1)
    world.run(1.6)
    found = {device: at for at, device, text in reversed(world.notes) if "device 1 is suspect" in text}
    assert set(found) == {0, 2, 3}
    assert max(found.values()) < 1.35
