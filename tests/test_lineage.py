"""What shards say they were built on: a view while all is well, shares of every exchange when it is not."""

from __future__ import annotations

import pytest

from bundles import make_manifest, make_plan
from robustdice.runtime.protocol.events import Received
from robustdice.runtime.protocol.lineage import Ancestry
from robustdice.runtime.wire.messages import Lineage, Shards
from simulation import World

ANCESTRY = Ancestry(make_manifest(make_plan(4, holders=1), 0))
ALL = (0, 1, 2, 3)
FIRST = {(0, s): s for s in range(4)}
SECOND = {(1, s): s for s in range(4)}


@pytest.mark.parametrize("crash", [False, True])
def test_while_all_is_computed_in_one_view_the_view_is_all_that_is_said(crash: bool) -> None:
    world = World(make_plan(4), 1)
    said: list[Lineage] = []
    transmit = world.transmit

    def listen(source: int, target: int, event: Received) -> None:
        if isinstance(event.message, Shards) and event.message.stage and world.now > 1.0:
            said.append(event.message.lineage)
        transmit(source, target, event)

    world.transmit = listen  # type: ignore[method-assign]
    if crash:
        world.at(0.5, world.crash, 3)
    world.start_client(0.2, 2.0)
    world.run(4.0)
    assert set(said) == {Lineage((0, 1, 2) if crash else ALL)}


def test_a_view_stands_for_what_its_publishers_give() -> None:
    assert ANCESTRY.after(0, Lineage(ALL), ALL, FIRST, dict.fromkeys(FIRST, Lineage(ALL))) == Lineage(ALL)
    assert ANCESTRY.worth(Lineage(ALL), 2) == 1.0
    assert ANCESTRY.shares(Lineage((0, 1, 2)), 2) == Lineage(None, (0.75, 0.75), (0.0, 0.0))


def test_what_goes_on_in_another_view_is_not_what_was_measured_of_either() -> None:
    """It has all shards, but from now on it is corrected for other devices being down."""
    fewer = ANCESTRY.after(1, Lineage(ALL), (0, 1, 2), SECOND, dict.fromkeys(SECOND, Lineage(ALL)))
    assert fewer == Lineage(None, (1.0, 1.0), (0.0, 0.0))


def test_a_shard_hands_on_what_it_was_built_on_in_proportion_to_its_neurons() -> None:
    less = Lineage(None, (0.25,), (0.0,))
    lineages = {shard: less if device == 3 else Lineage(ALL) for shard, device in SECOND.items()}
    assert ANCESTRY.less(less, Lineage(ALL), 1)
    assert not ANCESTRY.less(Lineage(ALL), less, 1)
    mixed = ANCESTRY.after(1, Lineage(ALL), ALL, SECOND, lineages)
    assert mixed == Lineage(None, ((3 + 1 / 4) / 4, 1.0), (0.0, 0.0))
    kept_out = {shard: device for shard, device in SECOND.items() if device != 3}
    assert ANCESTRY.after(1, Lineage(ALL), ALL, kept_out, lineages) == Lineage(None, (1.0, 0.75), (0.0, 0.0))


def test_a_device_that_has_less_itself_does_not_get_more_by_what_others_hand_on() -> None:
    mine = Lineage(None, (0.5,), (0.0,))
    after = ANCESTRY.after(1, mine, ALL, SECOND, dict.fromkeys(SECOND, Lineage(ALL)))
    assert after.present == (0.5, 1.0)


def test_what_parity_makes_up_for_is_as_good_as_the_worst_that_it_is_worked_out_from() -> None:
    ancestry = Ancestry(make_manifest(make_plan(4, parity=True), 0))
    taken = {(1, s): s for s in (0, 1, 3)}
    less = Lineage(None, (0.5,), (0.0,))
    lineages = {(1, 0): Lineage(None, (1.0,), (0.0,)), (1, 1): Lineage(None, (1.0,), (0.0,)), (1, 3): less}
    after = ancestry.after(1, Lineage(None, (1.0,), (0.0,)), ALL, taken, lineages)
    assert after.present == pytest.approx((0.5 + 0.5 * 2 / 3, 1.0))
    assert after.spares == pytest.approx((0.0, 1 / 3))
