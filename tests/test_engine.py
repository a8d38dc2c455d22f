"""The engine in a simulated world: what it does about one thing after another. All at once: test_simulation.py."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bundles import make_manifest, make_plan
from robustdice.plan import Holder
from robustdice.runtime.protocol.engine import Engine
from robustdice.runtime.protocol.events import (
    Action,
    Computed,
    Event,
    Forget,
    PeerUp,
    Received,
    RunPieces,
    RunStage,
    Send,
    Tick,
)
from robustdice.runtime.wire.messages import Frame, FrameId, Hello, Parcel, Pass, Pulse, Refused, Shards, Want
from simulated_network import Network
from simulation import World


@pytest.mark.parametrize("seed", range(12))
def test_when_an_owner_dies_its_slices_are_added_up_by_others_in_the_same_frame(seed: int) -> None:
    """Every neuron of the first layer has another holder, so that nothing is missing of any frame."""
    devices = 3 + seed % 3
    plan = make_plan(devices, 3, pair=True, owned=True)
    first = tuple(
        replace(s, holders=tuple(Holder((d + k) % devices) for k in range(2)))
        for s in plan.shards[0]
        for d in s.devices[:1]
    )
    plan = replace(plan, shards=(first, *plan.shards[1:]))
    network = Network(slow=0.02 * (seed % 2), duplication=0.1 * (seed % 3 == 0))
    world = World(plan, seed, ("hot", "standby")[seed % 2], network, window=1 + seed % 4)
    world.at(1.0 + 0.0007 * seed, world.crash, seed % devices, seed % 4 == 3)
    world.start_client(0.2, 2.0)
    world.run(6.0)
    world.check()
    assert set(world.coverage()) == {1.0}


@pytest.mark.parametrize("spares", ["hot", "standby"])
@pytest.mark.parametrize("lost", range(4))
def test_a_parity_shard_repairs_the_loss_of_any_one_device(spares: str, lost: int) -> None:
    world = World(make_plan(4, parity=True), 1, spares)
    world.start_client(0.2, 3.0)
    world.at(1.0, world.crash, lost)
    world.run(6.0)
    world.check()
    assert min(world.coverage()) == 1.0
    late = [answer for _, answer in world.answers[max(world.answers)]]
    assert {answer.down for answer in late} == {(lost,)}
    assert all((answer.from_spares > 0) == (lost != 3) for answer in late)
    assert {d for answer in late for exchange in answer.sources for d in exchange} <= {-1, 0, 1, 2, 3} - {lost}


def test_with_two_devices_down_parity_repairs_nothing_and_coverage_says_so() -> None:
    world = World(make_plan(4, parity=True), 1)
    world.start_client(0.2, 4.0)
    world.at(1.0, world.crash, 0)
    world.at(1.5, world.crash, 1)
    world.run(7.0)
    world.check()
    late = [answer for _, answer in world.answers[max(world.answers)]]
    assert {answer.coverage for answer in late} == {2 / 8}  # conv1: 3, 3 and 2 neurons
    assert {answer.from_spares for answer in late} == {0.0}


@pytest.mark.parametrize("seed", range(10))
def test_without_faults_nothing_is_repaired(seed: int) -> None:
    spares = ("hot", "standby")[seed % 2]
    world = World(make_plan(2 + seed % 4), seed, spares, Network(duplication=0.1), window=1 + seed % 5)
    world.start_client(0.2, 2.0)
    world.run(5.0)
    world.check()
    assert len(world.sent) > 50
    assert set(world.coverage()) == {1.0}
    assert_all_is_as_measured(world)


def assert_all_is_as_measured(world: World) -> None:
    given = [answer for answers in world.answers.values() for _, answer in answers]
    assert all(answer.from_spares == 0.0 and not answer.down and answer.expected == 1.0 for answer in given)
    assert all(len(answers) == world.plan.devices for answers in world.answers.values())
    assert world.wants == 0
    assert not [note for note in world.notes if "suspect" in note[2]]


@pytest.mark.parametrize("seed", range(8))
def test_a_frame_can_leave_the_straight_path_at_any_moment(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, handle = random.Random(seed), Engine.handle  # noqa: S311

    def unsettled(engine: Engine, event: Event, now: float) -> list[Action]:
        for frame in engine.frames:
            if chance.random() < 0.1:
                frame.unfold()
        return handle(engine, event, now)

    monkeypatch.setattr(Engine, "handle", unsettled)
    plan = make_plan(3, parity=seed % 4 == 1, pair=seed % 4 >= 2, owned=seed % 4 == 3)
    world = World(plan, seed, ("hot", "standby")[seed % 2], Network(duplication=0.1), window=2)
    world.start_client(0.2, 1.0)
    world.run(3.0)
    world.check()
    assert_all_is_as_measured(world)


@pytest.mark.parametrize("seed", range(40))
def test_a_crash_loses_no_shard_that_has_a_live_holder(seed: int) -> None:
    """Two holders each, one crash at any moment: full coverage of every frame, at every survivor."""
    devices = 2 + seed % 4
    world = World(make_plan(devices), seed, ("hot", "standby")[seed % 2], Network(slow=0.02), window=4)
    world.at(0.7 + 0.1 * world.random.random(), world.crash, seed % devices, seed % 3 == 0)
    world.start_client(0.2, 2.0)
    world.run(5.0)
    world.check()
    assert set(world.coverage()) == {1.0}
    for number, given in world.answers.items():
        survivors = [answer for _, answer in given if answer.sender != seed % devices]
        assert len(survivors) == devices - 1, f"seed {seed}: frame {number}"
        assert all(answer.coverage == 1.0 for answer in survivors), f"seed {seed}: frame {number}"


def test_who_stands_in_for_a_device_that_died_is_asked_once() -> None:
    world = World(make_plan(5), 5, window=4)
    asked, transmit = list[Want](), world.transmit

    def see(source: int, target: int, event: Received) -> None:
        asked.extend([event.message] if isinstance(event.message, Want) else [])
        transmit(source, target, event)

    world.transmit = see  # type: ignore[method-assign]
    world.at(1.0035, world.crash, 0)
    world.start_client(0.2, 1.2)
    world.run(2.5)
    world.check()
    assert len(asked) == len(set(asked)) > 5


@pytest.mark.parametrize("spares", ["hot", "standby"])
def test_a_frozen_device_blames_nobody_and_is_back_soon(spares: str) -> None:
    world = World(make_plan(4), 5, spares)
    world.at(1.0, world.freeze, 2)
    world.at(2.5, world.thaw, 2)
    world.start_client(0.2, 5.0)
    world.run(8.0)
    world.check()
    blamed = [(at, device, text) for at, device, text in world.notes if "suspect" in text]
    assert {text[:8] for _, device, text in blamed if device != 2} == {"device 2"}
    assert not [text for _, device, text in blamed if device == 2 and "waited" in text]
    assert set(world.coverage()) == {1.0}
    tail = [a for number, sent in world.sent.items() if sent > 3.0 for _, a in world.answers[number]]
    assert all(answer.from_spares == 0.0 for answer in tail)


def test_a_device_that_comes_and_goes_is_let_in_rarely_enough_and_holds_up_few_frames() -> None:
    world = World(make_plan(3), 6, window=1)
    world.interval = 0.03
    for k in range(20):
        world.at(1.0 + 0.5 * k, world.freeze, 2)
        world.at(1.36 + 0.5 * k, world.thaw, 2)
    world.start_client(0.2, 11.0)
    world.run(14.0)
    world.check()
    assert set(world.coverage()) == {1.0}
    held_up = [sent for number, sent in world.sent.items() if world.answers[number][0][0] - sent > 0.06]
    assert len(held_up) <= 8, "some at once, then a tenth of the time"
    assert len([sent for sent in held_up if sent > 5.0]) <= 2


def test_without_a_spare_the_answer_says_what_is_missing() -> None:
    world = World(make_plan(4, holders=1), 1)
    world.at(1.0, world.crash, 3)
    world.start_client(0.2, 2.0)
    world.run(4.0)
    world.check()
    _, answer = world.answers[max(world.answers)][0]
    assert answer.down == (3,)
    assert answer.coverage == 0.75
    assert [sources[3] for sources in answer.sources] == [-1, -1, -1]


def test_a_device_alone_answers_with_what_it_has() -> None:
    world = World(make_plan(3), 1)
    for device in (1, 2):
        world.at(1.0, world.crash, device)
    world.start_client(0.2, 2.0)
    world.run(4.0)
    world.check()
    _, answer = world.answers[max(world.answers)][0]
    assert answer.down == (1, 2)
    assert 0.5 < answer.coverage < 1.0


def test_a_frame_beyond_the_window_is_refused_and_nobody_waits_for_it() -> None:
    world = World(make_plan(3), 2, window=40, compute_seconds=0.02)
    world.interval = 0.001
    world.start_client(0.2, 1.0)
    world.run(4.0)
    world.check()
    assert world.refusals
    assert "its window" in world.refusals[0].reason
    assert not [text for _, _, text in world.notes if "suspect" in text]


@pytest.mark.parametrize("spares", ["hot", "standby"])
@pytest.mark.parametrize("fault", ["deafen", "mute"])
def test_a_device_that_is_connected_one_way_only_leaves_every_view_and_is_named(fault: str, spares: str) -> None:
    world = World(make_plan(4), 1, spares)
    world.interval = 0.05
    world.start_client(0.2, 8.0)
    world.at(1.0, getattr(world, fault), 3)
    world.run(1.6)
    up = [node.engine.status(world.now)["up"] for node in world.nodes if node.engine]
    assert up == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [3]]
    world.run(2.6)
    named = [[who["device"] for who in node.engine.status(world.now)["one_way"]] for node in world.nodes if node.engine]
    assert named == [[3], [3], [3], [0, 1, 2]]
    logged = {(device, text[:8]) for _, device, text in world.notes if "one way only" in text}
    assert logged == {
        (0, "device 3"),
        (1, "device 3"),
        (2, "device 3"),
        (3, "device 0"),
        (3, "device 1"),
        (3, "device 2"),
    }
    world.at(3.0, world.heal, 3)
    world.run(10.0)
    world.check()
    assert set(world.coverage()) == {1.0}
    cut_off = [a for number, sent in world.sent.items() if 1.5 < sent < 3.0 for _, a in world.answers[number]]
    assert {answer.coverage for answer in cut_off if answer.sender != 3} == {1.0}
    if fault == "deafen":
        assert max(answer.coverage for answer in cut_off if answer.sender == 3) < 1.0
    last = world.answers[max(world.answers)]
    assert all(answer.from_spares == 0.0 for _, answer in last)
    assert [node.engine.status(world.now)["one_way"] for node in world.nodes if node.engine] == [[]] * 4


@pytest.mark.parametrize("spares", ["hot", "standby"])
def test_what_nobody_else_has_is_taken_from_a_device_that_built_on_less_and_counts_as_that(spares: str) -> None:
    """One shard of the first stage does not reach one device in time: the shards that it goes on to compute have one
    holder, and contain three quarters of that exchange."""
    world = World(make_plan(4, holders=1), 1, spares, window=1)
    transmit = world.transmit

    def lose(source: int, target: int, event: Received) -> None:
        message = event.message
        if not (isinstance(message, Shards) and message.stage == 0 and (source, target) == (0, 3)):
            transmit(source, target, event)

    world.transmit = lose  # type: ignore[method-assign]
    world.start_client(0.2, 0.3)
    world.run(5.0)
    world.check()
    answers = {answer.sender: answer for _, answer in world.answers[0]}
    assert answers[3].coverage <= 0.75
    for device in (1, 2):
        assert all(-1 not in exchange for exchange in answers[device].sources)
        assert answers[device].coverage == pytest.approx(0.91875)  # 3/4 to 15/16 of it in the last stage's shards
    assert all(answer.expected is None for answer in answers.values())


@pytest.mark.parametrize(("seed", "slowness", "interval"), [(3, 8.0, 0.01), (2, 12.0, 0.03), (6, 12.0, 0.001)])
def test_frames_that_are_held_up_together_are_answered_in_time_one_after_the_other(
    seed: int, slowness: float, interval: float
) -> None:
    """A slow device gets nothing any more: whatever waits must leave younger frames the time for their work."""
    world = World(make_plan(3), seed, window=6)
    world.interval = interval
    world.slow_down(0, slowness)
    transmit = world.transmit

    def lose(source: int, target: int, event: Received) -> None:
        if not (isinstance(event.message, Shards) and target == 0 and world.now > 1.5):
            transmit(source, target, event)

    world.transmit = lose  # type: ignore[method-assign]
    world.start_client(0.2, 4.0)
    world.run(7.0)
    world.check()


def admitted(
    engine: Engine, number: int, oldest: int = 0, now: float = 1.0, client: str = "c0", key: str = ""
) -> list[Action]:
    frame = Frame(FrameId(client, number), oldest, 2.0, "input")
    return engine.handle(Received(frame, key), now)


def taken(engine: Engine, frames: int, client: str, key: str, first: int = 0) -> int:
    """How many of so many more frames are not refused."""
    actions = [admitted(engine, first + number, client=client, key=key) for number in range(frames)]
    refusals = [a.message for some in actions for a in some if isinstance(a, Send) and isinstance(a.message, Refused)]
    assert all("its window" in each.reason for each in refusals)
    return frames - len(refusals)


def test_a_client_alone_has_the_whole_window_and_each_of_several_its_share() -> None:
    engine = Engine(make_manifest(make_plan(3), 0))
    window = engine.settings.window
    assert taken(engine, 20, "aa", "greedy") == window
    assert taken(engine, 20, "bb", "modest") == window // 2, "who comes to a full window need not wait"
    assert taken(engine, 20, "cc", "third") == window // 3
    assert taken(engine, 20, "dd", "fourth") == window // 4
    admitted(engine, 20, oldest=window - 1, client="aa", key="greedy")  # all but one of its frames are over
    assert engine.frames.in_flight == window // 2 + window // 3 + window // 4 + 2
    assert taken(engine, 20, "aa", "greedy", first=21) == 0, "it has its share already"


def test_a_key_has_no_more_for_the_names_that_it_makes_up() -> None:
    engine = Engine(make_manifest(make_plan(3), 0))
    window = engine.settings.window
    assert sum(taken(engine, 1, f"{name:x}", "greedy") for name in range(100)) <= window + window // 2
    assert taken(engine, 20, "bb", "modest") == window // 2
    assert engine.frames.in_flight <= 2 * window


def test_clients_of_one_key_share_what_it_has() -> None:
    engine = Engine(make_manifest(make_plan(3), 0))
    window = engine.settings.window
    assert taken(engine, 20, "aa", "both") == window
    assert taken(engine, 20, "bb", "both") == window // 2


def test_frames_that_the_client_no_longer_waits_for_are_dropped() -> None:
    engine = Engine(make_manifest(make_plan(3), 0))
    (task,) = admitted(engine, 0)
    assert isinstance(task, RunStage)
    (reserve,) = admitted(engine, 1)
    assert isinstance(reserve, RunStage)
    assert not admitted(engine, 2)
    actions = admitted(engine, 3, oldest=2)
    assert actions == [Forget(FrameId("c0", 0)), Forget(FrameId("c0", 1))]
    assert engine.frames.in_flight == 2
    (following,) = engine.handle(Computed(task, ()), 1.1)  # the result is of no use; the executor goes on
    assert isinstance(following, RunStage)
    assert following.frame.number == 2
    assert not admitted(engine, 1, oldest=2), "a late copy is admitted again"


def test_a_computation_that_fails_costs_the_frame_only() -> None:
    engine = Engine(make_manifest(make_plan(2), 0))
    engine.handle(PeerUp(1), 0.5)
    (task,) = admitted(engine, 0)
    assert isinstance(task, RunStage)
    actions = engine.handle(Computed(task, (), error="out of memory"), 1.1)
    sent = [action.message for action in actions if isinstance(action, Send)]
    assert [type(message) for message in sent] == [Refused, Pass]
    assert isinstance(sent[0], Refused)
    assert "out of memory" in sent[0].reason
    asked = engine.handle(Received(Want(1, task.frame, 0, ((0, 0),))), 1.2)
    assert not [action for action in asked if isinstance(action, RunPieces)], "it is not tried again"
    assert [type(action) for action in admitted(engine, 1)] == [RunStage]


def test_a_frame_with_next_to_no_time_takes_none_from_those_before_it() -> None:
    manifest = make_manifest(make_plan(2, holders=1), 0)
    engine = Engine(manifest)
    engine.handle(PeerUp(1), 0.5)
    engine.handle(Received(Hello(1, "7", reply=False)), 0.6)
    engine.handle(Received(Pulse(1, 0.6, 0.5, False, 0, 0, ())), 0.6)
    (task,) = [action for action in admitted(engine, 0) if isinstance(action, RunStage)]
    engine.handle(Computed(task, (Parcel(task.due[0], ["own"] * len(task.due[0])),)), 1.01)
    hurried = Frame(FrameId("c1", 0), 0, 0.001, "input")
    actions = [*engine.handle(Received(hurried), 1.02), *engine.handle(Tick(1.03), 1.03)]
    later = [action for action in actions if isinstance(action, RunStage) and action.frame == task.frame]
    assert not later, "the first one still waits for the other device's shards"
