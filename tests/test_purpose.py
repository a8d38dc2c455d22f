"""Plans for a purpose: the fastest or the smallest of those that keep nearly as much as the most accurate one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

import robustdice as rd
from nets import Plain, random_images, relative_error, shared_network
from robustdice.auto import Candidate, Table, corrected, tabulate
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.cost.model import Judge, alone
from robustdice.cost.purpose import TOLERATED, Purpose, nearly_best, ordered_for
from robustdice.divided import divided
from robustdice.errors import PlanError
from robustdice.plan import Plan, failure_sets
from robustdice.report.considered import considered_json, considered_summary
from robustdice.runtime.inprocess import InProcess
from robustdice.workshop import choose_from, choose_plan
from test_coarse_bundles import predicted
from test_cost import device
from test_strips import headed

DEAR, CHEAP = device(1.0, 1e9), device(1e-6, 1e6)
"""Devices to which exchanges are everything, and nothing."""


@cache
def table() -> Table:
    return tabulate(shared_network(headed, 3, 32, 32), random_images(24, (3, 32, 32)), devices=3)


@cache
def found_for(name: str, profile: str, memory: float = 1.0) -> list[Candidate]:
    judge = Judge({"dear": DEAR, "cheap": CHEAP}[profile], None, "throughput" if name == "memory" else name)
    return choose_from(table(), memory, Purpose(name, judge))


def families(found: Sequence[Candidate]) -> set[str]:
    return {each.family for each in found}


def candidate(method: str, *agreement: float) -> Candidate:
    return Candidate(method, rd.partition(shared_network(Plain, 1, 8, 8), devices=2, method=method), agreement, 100)


def test_for_a_purpose_the_cheapest_is_taken_of_those_that_keep_nearly_as_much() -> None:
    full, lop, cdc = candidate("full", 1.0, 1.0), candidate("lop", 1.0, 0.985), candidate("cdc", 1.0, 0.97)
    assert nearly_best([full, lop, cdc, Candidate("unfit", lop.plan)]) == [full, lop]
    by_latency, by_memory = (Purpose(name, Judge(CHEAP, None, "latency")) for name in ("latency", "memory"))
    assert families(ordered_for(by_memory, [full, lop, cdc])[:1]) == {"lop"}
    assert [each.family for each in ordered_for(by_latency, [full, cdc, lop])] == ["lop", "full", "cdc"]
    worse = candidate("lop", 1.0, 1.0 - 1.5 * TOLERATED)
    assert ordered_for(by_latency, [worse, full])[0] is full
    # One number of devices down is enough to be too much worse, whatever the mean is.
    assert nearly_best([candidate("full", 0.95, 0.95, 0.95), candidate("lop", 1.0, 0.92, 0.92)])[0].family == "full"


def test_where_exchanges_are_dear_devices_take_whole_frames_in_turn_and_it_says_so() -> None:
    found = found_for("throughput", "dear")
    plan, judge = found[0].plan, Judge(DEAR)
    assert not plan.exchanges
    assert judge.seconds(plan) < 1 / alone(DEAR, plan.layers).frames_per_second
    said = considered_summary(found, judge, Purpose("throughput", judge))
    assert "modelled to be the fastest" in said
    assert "No split of layers that keeps as much is modelled to be faster" in said


def test_where_exchanges_are_cheap_a_split_that_loses_nothing_answers_a_frame_sooner(tmp_path: Path) -> None:
    found, judge = found_for("latency", "cheap"), Judge(CHEAP, None, "latency")
    plan, best = found[0].plan, max(found, key=lambda each: each.merit)
    assert plan.exchanges
    assert judge.seconds(plan) < 0.7 * alone(CHEAP, plan.layers).latency_seconds
    assert all(a >= b - TOLERATED - 1e-9 for a, b in zip(found[0].agreement, best.agreement, strict=True))
    assert judge.seconds(plan) == min(judge.seconds(each.plan) for each in nearly_best(found))
    assert "ms for a frame alone" in considered_summary(found, judge, Purpose("latency", judge))
    # What is predicted of it is what its bundles do, whoever is down.
    network, images = table().network, random_images(2, (3, 32, 32))
    together = InProcess(list(map(load_bundle, write_bundles(network, plan, tmp_path / "build"))))
    for failed in (failed for size in range(3) for failed in failure_sets(3, size)):
        assert relative_error(together.run(images, failed), predicted(network, plan, images, failed)) < 1e-4


def test_every_split_is_considered() -> None:
    names = families(found_for("throughput", "dear"))
    for kind in ("float32", "int8"):
        assert {f"the paper's method, {kind}", f"slices (LOP), {kind}", f"slices (LOP), {kind}, rows"} <= names
        assert f"slices (LOP), {kind}, hidden" in names
    assert {f"float32 slices, int8 everywhere, {split}" for split in ("neurons", "hidden", "rows")} <= names
    assert any(name.endswith(", auto") for name in names)
    made = divided(table(), (int(0.14 * 4 * table().network.parameters),) * 3, Judge(CHEAP))
    in_rows = [each.plan for each in made if each.family.startswith("spread") and each.family.endswith("rows")]
    assert in_rows
    for plan in in_rows:  # what it says of the layers that all hold for that is what they are
        (strips,) = plan.strips
        for index in strips.layers:
            said = [plan.settings[name][index] for name in ("holders", "decisive", "precision", "spare_precision")]
            assert said == [3, 0.0, "float32", "float32"]


def test_layers_in_strips_change_nothing_about_which_failure_sets_have_corrections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def recorded(table: Table, plan: Plan, least_down: int) -> Plan:
        asked.append(least_down)
        return corrected(table, plan, least_down)

    monkeypatch.setattr("robustdice.divided.corrected", recorded)
    made = divided(table(), (int(0.14 * 4 * table().network.parameters),) * 3, Judge(CHEAP))
    assert 2 in asked  # what is on two of three devices has none for one that is down
    assert any(set(map(len, each.plan.corrections)) == {2} for each in made)


def test_what_is_considered_says_how_fast_it_is_modelled_to_be() -> None:
    found = found_for("latency", "cheap")
    said = considered_json(found, Judge(CHEAP))
    assert [each["family"] for each in said] == [each.family for each in found]
    assert all(each["frames_per_second"] > 0 and each["latency_seconds"] > 0 for each in said)
    assert said[0]["latency_seconds"] < min(each["latency_seconds"] for each in said if each["frame_parallel"])


def test_for_memory_the_smallest_is_taken_also_of_what_fits_into_less() -> None:
    found = found_for("memory", "dear")
    smallest = min(nearly_best(found), key=lambda each: max(each.plan.bytes_per_device))
    assert max(found[0].plan.bytes_per_device) == max(smallest.plan.bytes_per_device)
    assert found[0].plan.memory_share < 0.25
    judge = Judge(DEAR)
    assert "it is the smallest:" in considered_summary(found, judge, Purpose("memory", judge))


def test_a_budget_bounds_what_is_taken() -> None:
    found = found_for("throughput", "cheap", 0.3)
    assert found[0].fits
    assert found[0].plan.memory_share <= 0.3
    assert all(each.fits == (each.plan.memory_share <= 0.3) for each in found)


def test_only_what_exists_can_be_chosen_for() -> None:
    with pytest.raises(PlanError, match="nothing can be chosen for 'fun'; known: throughput, latency, memory"):
        Purpose("fun", Judge())
    with pytest.raises(PlanError, match="nothing can be chosen for 'fun'"):
        choose_plan(shared_network(Plain, 1, 8, 8), random_images(8, (1, 8, 8)), devices=2, goal="fun")
    with pytest.raises(PlanError, match="say what memory there is"):
        choose_plan(shared_network(Plain, 1, 8, 8), random_images(8, (1, 8, 8)), devices=2)
