"""Choosing a plan for a budget, as people do it."""

import re
from pathlib import Path

import pytest

from commands import fails, run, run_json
from robustdice.plan import Plan

DEMO = "robustdice.demo.network:digits_cnn"


@pytest.mark.slow
def test_auto_says_what_it_considered_and_takes_the_best_within_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    found = run_json(
        *("plan", DEMO, "--devices", "3", "--method", "auto", "--memory", "0.1", "--survive", "2"),
        *("--data", "digits", "-o", path),
    )
    plan = Plan.load(path)
    taken = found["considered"][0]
    assert list(plan.bytes_per_device) == taken["bytes_per_device"]
    as_good = [each for each in found["considered"] if each["agreement"] == taken["agreement"]]
    assert len(as_good) > 1  # so small a task loses nothing by several plans: of these the fastest is taken
    assert taken["frames_per_second"] == max(each["frames_per_second"] for each in as_good)
    assert plan.memory_share == found["memory_share"] <= 0.1
    merits = [sum(each["agreement"].values()) for each in found["considered"]]
    assert merits == sorted(merits, reverse=True)
    assert {"whole, mixed"} <= {each["family"] for each in found["considered"]}
    assert all(set(each["agreement"]) == {"0", "1", "2"} for each in found["considered"] if each["fits"])


@pytest.mark.slow
def test_auto_for_devices_that_do_not_fail_says_what_is_kept_while_all_are_up(tmp_path: Path) -> None:
    auto = ("plan", DEMO, "--devices", "3", "--method", "auto", "--memory", "0.1", "--survive", "0", "--data", "digits")
    said = run(*auto, "-o", tmp_path / "plan.json").stdout
    assert re.search(r"answers like the intact network in [\d.]+ % while all are up;", " ".join(said.split()))
    assert "leave out --samples" in fails(*auto, "--samples", "5", "-o", tmp_path / "plan.json")


def test_amounts_of_each_device_are_for_auto(tmp_path: Path) -> None:
    to = (
        "plan",
        DEMO,
        "--devices",
        "3",
        "-o",
        tmp_path / "plan.json",
        "--memory",
        "40KB,40KB,80KB",
        "--data",
        "digits",
    )
    assert "auto" in fails(*to, "--samples", "4")
    assert "3 amounts for 2 devices" in fails(*to, "--method", "auto", "--devices", "2")


def test_auto_needs_a_budget_and_images(tmp_path: Path) -> None:
    auto = ("plan", DEMO, "--devices", "3", "--method", "auto", "-o", tmp_path / "plan.json")
    assert "--data" in fails(*auto, "--memory", "0.1")
    assert "--memory" in fails(*auto, "--data", "digits")


@pytest.mark.slow
def test_auto_for_a_purpose_shows_every_split_and_says_why_it_takes_what_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    found = run_json(
        *("plan", DEMO, "--devices", "3", "--method", "auto", "--for", "throughput", "--link", "100Mbit"),
        *("--data", "digits", "-o", path),
    )
    plan, (taken, *others) = Plan.load(path), found["considered"]
    assert taken["bytes_per_device"] == list(plan.bytes_per_device)
    assert {"slices (LOP), float32, hidden", "float32 slices, int8 everywhere, neurons"} <= {
        each["family"] for each in others
    }
    modelled = found["modelled"]
    assert taken["frames_per_second"] == modelled["plans"][-1]["frames_per_second"]
    assert modelled["splitting_pays"]["throughput"]  # no slower than one device
    assert "at most 2 points less often" in found["why"]
