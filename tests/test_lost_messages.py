"""Messages that are lost though connections stand: what they said is asked for again, and nobody is left out for it."""

from __future__ import annotations

import pytest

from bundles import make_plan
from robustdice.runtime.protocol.events import Received
from robustdice.runtime.wire.messages import Mark, Shards
from scenarios import Fault, Scenario, play
from simulated_network import Network
from simulation import World


@pytest.mark.parametrize(("losses", "seconds"), [(1, 0.3), (3, 1.0)])
def test_a_lost_message_is_asked_for_before_anybody_is_suspected(losses: int, seconds: float) -> None:
    """Also when what is sent again gets lost again, and nothing else is under way that would tell."""
    world = World(make_plan(3), 3, window=1)
    lost: list[Shards] = []
    transmit = world.transmit

    def lose_some(source: int, target: int, event: Received) -> None:
        message = event.message
        wanted = isinstance(message, Shards) and (message.frame.number, message.stage, target) == (20, 1, 2)
        if wanted and source == 0 and len(lost) < losses:
            assert isinstance(message, Shards)
            lost.append(message)
        else:
            transmit(source, target, event)

    world.transmit = lose_some  # type: ignore[method-assign]
    world.start_client(0.2, 2.0)
    world.run(5.0)
    world.check()
    assert len(lost) == losses
    assert losses <= world.wants <= 6 * losses  # the others may ask the one that is held up
    assert set(world.coverage()) == {1.0}
    assert max(at for at, _ in world.answers[20]) - world.sent[20] < seconds
    assert not [text for _, _, text in world.notes if "suspect" in text]


def test_what_was_lost_of_several_frames_is_not_asked_for_at_every_word_while_words_take_long() -> None:
    world = World(make_plan(3), 1, network=Network(delay=0.1, reordering=False), window=6)
    world.interval, world.timeout_seconds = 0.02, 6.0
    lost, transmit = set[int](), world.transmit

    def lose_first(source: int, target: int, event: Received) -> None:
        message = event.message
        number = message.frame.number if isinstance(message, Shards) and message.stage == 1 else -1
        if (source, target) == (0, 2) and 6 <= number < 12 and number not in lost:
            lost.add(number)
        else:
            transmit(source, target, event)

    world.transmit = lose_first  # type: ignore[method-assign]
    world.start_client(0.2, 3.0)
    world.run(9.0)
    world.check()
    assert set(world.coverage()) == {1.0}
    assert len(lost) <= world.wants <= 8 * len(lost), "three devices wait for each, and some wait long"


def test_no_frame_stands_still_behind_a_cut_that_is_over() -> None:
    """Two devices lose some of what they say to each other about several frames, and wait for different ones first:
    each for what the other one has only when it has what it is not asked for."""
    cuts = Fault("two ways", 1.038, 0.019, 1, 2, 0.0), Fault("one way", 1.182, 0.201, 2, 1, 0.0)
    world = play(Scenario(102_242, window=6, clients=2, reordering=True, faults=cuts))
    over = {number: max(cuts[1].end, sent) for number, sent in world.sent.items()}
    assert max(at - over[number] for number, given in world.answers.items() for at, _ in given) < 0.4


@pytest.mark.parametrize(("devices", "seconds"), [(3, 0.4), (5, 0.6)])
def test_a_device_that_takes_over_a_slice_computes_the_sums_of_it_that_it_needs_itself(
    devices: int, seconds: float
) -> None:
    """An owner is gone, and then another device is not heard by who adds up instead: of what both have handed over
    nothing is there, and by who has published since nobody seems to lack it."""
    gone = Fault("silent crash", 0.756, 0.74, devices - 1, 0, 0.0)
    unheard = Fault("one way", 0.924, 0.346, devices - 2, 0, 0.0)
    world = play(Scenario(100_609, devices=devices, split="hidden", window=1, faults=(gone, unheard)))
    assert max(at - world.sent[number] for number, given in world.answers.items() for at, _ in given) < seconds


def test_who_lost_what_frames_went_on_without_takes_part_at_once_when_no_more_is_lost() -> None:
    """As long as nothing that is said of shards comes through, both are well and too far away for each other."""
    world = World(make_plan(3), 1, window=1)
    world.interval, world.timeout_seconds = 0.05, 1.0
    transmit = world.transmit

    def lose(source: int, target: int, event: Received) -> None:
        lost = isinstance(event.message, Shards | Mark) and {source, target} == {0, 1} and 1.0 < world.now < 2.2
        if not lost:
            transmit(source, target, event)

    world.transmit = lose  # type: ignore[method-assign]
    world.start_client(0.2, 3.0)
    world.run(4.2)
    world.check()
    assert any(answer.late for given in world.answers.values() for _, answer in given)
    later = [answer for number, sent in world.sent.items() if sent > 2.5 for _, answer in world.answers[number]]
    assert later
    assert {(answer.late, answer.from_spares) for answer in later} == {((), 0.0)}
