"""Choosing a plan for a budget, as people do it."""

from pathlib import Path

import pytest

from commands import fails, run_json
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
    assert plan.method == "auto"
    assert plan.memory_share == found["memory_share"] <= 0.1
    merits = [sum(each["agreement"].values()) for each in found["considered"]]
    assert merits == sorted(merits, reverse=True)
    assert {"whole"} <= {each["family"] for each in found["considered"]}
    assert all(set(each["agreement"]) == {"0", "1", "2"} for each in found["considered"])


def test_auto_needs_a_budget_and_images(tmp_path: Path) -> None:
    auto = ("plan", DEMO, "--devices", "3", "--method", "auto", "-o", tmp_path / "plan.json")
    assert "--data" in fails(*auto, "--memory", "0.1")
    assert "--memory" in fails(*auto, "--data", "digits")
