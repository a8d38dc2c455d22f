"""Seeded worlds with every kind of fault: they hold, they are the same each time, and failing ones become small."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scenarios import KINDS, SPLITS, WIRES, Fault, Scenario, draw, failure, play, shrink
from simulate import described, main, sweep

REGRESSIONS = {
    79: "a clock that jumps by a year: what a device has learnt of how long things take is not what happened in it",
    11: "another device whose copy is as poor as the one that is there is known to be poor, too; and a suspect's copy, "
    "which is poorer still, does not end the wait for it",
    124: "two devices do not hear each other: whoever is to stand in for one of them is asked, for it sees both",
    1200: "a peer that has not said who it is is asked again",
    2206: "a poor shard came while its stage was computed: who has a better one is asked at once",
    100_031: "a suspect's shard has come all the same: so only one is missing, and parity makes up for it, which was "
    "nobody's task by who is up",
    100_353: "shards that were built on less are weighed in the order of what they are worth, not of their devices",
    200_724: "likewise, where strips of a map are handed over",
    100_642: "frames that are not the oldest one lost shards behind a cut: they are asked for again all the same, "
    "while a device that is slow has the time for them",
    102_242: "two devices' oldest frames each wait for what the other one lacks for a younger one",
    101_318: "a device lost what a frame went on without: it has nothing under way to it, and takes part again",
    101_966: "likewise, where single messages are lost",
    102_442: "likewise, where a connection was made again in one direction only",
    102_770: "likewise, in a cluster of four",
    100_609: "who takes over a slice computes the sums of it that it alone still lacks: it waited for itself, and then "
    "a device that is slow had no time left",
    105_591: "a device does not wait for itself: what it has computed of a poor shard is no better than what is there",
    106_072: "what a process said before it crashed lets nobody in: the next one could not reach this device yet",
}
"""Seeds that found something."""

CHUNK = 1000


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_whatever_fails_what_must_be_true_is_true(first: int) -> None:
    assert [(seed, why) for seed in range(first, first + 10) if (why := failure(draw(seed)))] == []


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_what_was_found_once_does_not_come_back(seed: int) -> None:
    assert failure(draw(seed)) is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(100_000, 110_000, CHUNK))
def test_thousands_of_seeds_hold(first: int, worker_id: str) -> None:
    """On all cores: xdist's workers have one chunk each, and without them a chunk has them all."""
    jobs = (os.cpu_count() or 1) if worker_id == "master" else 1
    found = sweep(first, CHUNK, jobs, show=False)
    assert found == []


def test_seeds_have_every_kind_of_fault_split_and_wire_and_go_without_some() -> None:
    scenarios = [draw(seed) for seed in range(300)]
    kinds = [scenario.kinds for scenario in scenarios]
    assert frozenset().union(*kinds) == set(KINDS)
    assert all(any(kind not in of for of in kinds) for kind in KINDS)
    assert {scenario.split for scenario in scenarios} == set(SPLITS)
    assert {(scenario.split, scenario.wire) for scenario in scenarios} >= {("rows", wire) for wire in WIRES}
    assert {scenario.clients for scenario in scenarios} == {1, 2, 3}
    for always in ("duplication", "reordering", "clocks", "prune", "pauses"):
        assert len({bool(getattr(scenario, always)) for scenario in scenarios}) == 2


def test_equal_seeds_go_the_same_way_in_every_process() -> None:
    here = {seed: play(draw(seed)).trace for seed in (3, 5)}
    assert len(set(here.values())) == 2
    script = "from scenarios import draw, play; print(play(draw(3)).trace, play(draw(5)).trace)"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": path}
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert there.stdout.split() == list(here.values())


def test_a_failing_seed_becomes_a_short_schedule() -> None:
    """One fault of six is needed, and lasts no longer than it has to; nothing else goes on."""
    scenario = draw(next(seed for seed in range(100) if len(draw(seed).faults) == 5))
    needed = replace(scenario.faults[2], kind="crash", length=0.9)
    scenario = replace(scenario, faults=(*scenario.faults[:2], needed, *scenario.faults[3:]), clients=3)

    def fails(of: Scenario) -> bool:
        return any(fault.kind == "crash" and fault.length > 0.2 for fault in of.faults)

    small = shrink(scenario, fails)
    assert small.faults == (replace(needed, length=0.225),)
    assert (small.clients, small.duplication, small.reordering, small.clocks, small.window) == (1, 0.0, False, 0.0, 1)


def test_one_command_replays_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--replay", "3"]) == 0
    told = capsys.readouterr().out
    assert described(draw(3)) in told
    assert f"trace {play(draw(3)).trace}" in told


def test_without_faults_every_scenario_is_as_usual() -> None:
    for split in SPLITS:
        world = play(Scenario(1, split=split, clients=2, duplication=0.1, reordering=True, clocks=1e6))
        assert world.wants == 0
        assert not [note for note in world.notes if "suspect" in note[2]]


def test_a_cut_client_is_answered_by_those_that_hear_it() -> None:
    fault = Fault("client cut", 0.5, 0.8, 0, 1, 0.0)
    world = play(Scenario(2, faults=(fault,)))
    cut = [given for number, given in world.answers.items() if 0.6 < world.sent[number] < 1.2]
    assert cut
    assert all(answer.sender != 0 and answer.coverage == 1.0 for given in cut for _, answer in given)
