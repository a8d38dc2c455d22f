"""Processes stand still for a moment when others run: that is no fault, and costs time and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bundles import make_plan
from robustdice.plan import Plan
from robustdice.runtime.wire.messages import Answer, FrameId
from scenarios import SPLITS, plan_of
from simulation import PAUSE_SECONDS, World


def given(world: World) -> list[Answer]:
    """What all devices have answered; every one of them must have, and every frame."""
    assert all(len(world.answers.get(number, ())) == world.plan.devices for number in world.sent)
    return [answer for answers in world.answers.values() for _, answer in answers]


def assert_nobody_was_missed(world: World) -> None:
    assert all(a.coverage == 1.0 and a.from_spares == 0.0 and a.expected == 1.0 for a in given(world))
    assert not [text for _, _, text in world.notes if "suspect" in text or "goes on" in text]


@pytest.mark.parametrize(("split", "holders"), [*((split, 1) for split in SPLITS), ("neurons", 2), ("hidden", 2)])
def test_while_everybody_pauses_now_and_then_frames_have_full_coverage_from_primaries(split: str, holders: int) -> None:
    world = World(plan_of(3, holders, split, "float32"), holders, window=4)
    world.interval = 0.04
    world.start_client(0.2, 3.2)
    world.let_pause()
    world.run(5.5)
    world.check()
    assert len(world.sent) > 50
    assert_nobody_was_missed(world)


def spares_at_first_only() -> Plan:
    """Of the first layer every neuron has two holders, of all others one."""
    twice, once = make_plan(3), make_plan(3, holders=1)
    return replace(once, shards=(twice.shards[0], *once.shards[1:]))


def test_a_device_that_is_behind_is_waited_for_when_others_can_stand_in_for_it_now_but_not_later() -> None:
    world = World(spares_at_first_only(), 1, window=1)
    world.at(1.0, setattr, world.nodes[1], "free_at", 1.45)  # its executor gets no time until then
    world.start_client(0.2, 2.0)
    world.run(4.0)
    world.check()
    assert max(answered for number in world.sent for answered, _ in world.answers[number][:1]) > 1.45
    assert_nobody_was_missed(world)


@pytest.mark.parametrize("number", [0, 30])
def test_a_client_may_pause_while_it_hands_over_a_frame(number: int) -> None:
    """Its first frame, too."""
    world = World(make_plan(3, holders=1), 2, window=1)
    send = world.send_to

    def paused(device: int, frame: FrameId, oldest: int) -> None:
        world.after(1.5 * PAUSE_SECONDS * (frame.number == number and device > 0), send, device, frame, oldest)

    world.send_to = paused  # type: ignore[method-assign]
    world.start_client(0.2, 1.0)
    world.run(4.0)
    world.check()
    assert len(world.sent) > 30
    assert_nobody_was_missed(world)


def test_a_device_that_a_client_cannot_reach_holds_up_one_frame_at_most() -> None:
    world = World(make_plan(3), 3, window=1)
    world.at(1.0, world.cut_client, "c0", 1)
    world.start_client(0.2, 2.0)
    world.run(4.0)
    world.check()
    assert set(world.coverage()) == {1.0}
    seconds = sorted(world.answers[number][0][0] - sent for number, sent in world.sent.items())
    assert seconds[-1] < 0.3
    assert seconds[-2] < 0.1
