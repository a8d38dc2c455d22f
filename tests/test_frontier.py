"""The frontier's tables say what was measured, and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from frontier_report import Point, comparison_table, comparisons, expecting, goals_table, picture, point, write_report

from robustdice.plan.certificate import wilson


def measured(method: str, share: float, right: int, down: int = 1, budget: float | None = None, of: int = 500) -> Point:
    low, high = wilson(right / of, of)
    return Point("net", method, "", budget, share, 1000, down, right / of, low, high, 0.8, of, "abc", "here")


def test_a_competitor_is_only_better_beyond_sampling_error_when_the_interval_of_the_difference_says_so() -> None:
    auto = measured("auto", 0.08, 380, budget=0.08)
    close, far = (measured("whole, GPTQ", 0.08, right) for right in (385, 420))
    (near,) = comparisons([auto, close])
    (clear,) = comparisons([auto, far])
    assert (near.gap > 0, near.certain) == (True, False)
    assert clear.certain
    assert "| 8 | 1 | 76.0 | whole, GPTQ | 8.00 | 84.0 |" in comparison_table([auto, far])
    assert "below in 1, beyond the sampling error in 0" in comparison_table([auto, close])


def test_a_competitor_counts_at_every_budget_that_it_fits_and_at_no_other() -> None:
    autos = [measured("auto", share, 400, budget=share) for share in (0.05, 0.08, 0.1)]
    rivals = [measured("whole, GPTQ", 0.08, 390), measured("whole, GPTQ", 0.0801, 450)]
    found = {each.auto.budget: each.rival.worst for each in comparisons([*autos, *rivals])}
    assert found == {0.08: 0.78, 0.1: 0.9}


def test_competitors_are_compared_with_as_many_devices_down_and_on_as_many_images() -> None:
    auto = measured("auto", 0.08, 400, down=2, budget=0.08)
    assert not list(comparisons([auto, measured("LOP", 0.08, 450, down=1)]))
    assert not list(comparisons([auto, measured("LOP", 0.08, 90, down=2, of=100)]))


def test_a_plan_that_is_told_how_many_may_fail_is_compared_where_so_many_did_and_stands_in_no_other_table() -> None:
    autos = [measured("auto", 0.08, 300, down, 0.08) for down in range(4)]
    told = [
        replace(measured("auto", 0.08, 300 + 10 * most if down == most else 100, down, 0.08), variant=expecting(most))
        for most in range(3)
        for down in range(4)
    ]
    rivals = [measured("LOP", 0.08, 340, down) for down in range(4)]
    points = [*autos, *told, *rivals]
    assert [each.auto.worst for each in comparisons(points)] == [0.6] * 4
    assert [each.auto.worst for each in comparisons(points, told=True)] == [0.6, 0.6, 0.62, 0.64]
    assert goals_table(points) == goals_table([*autos, *rivals])
    lines = comparison_table(points).splitlines()
    assert "for any number of failures: 4 comparisons" in lines[2]
    assert any("(`--survive`): 4 comparisons" in line for line in lines)


def test_the_goals_table_marks_what_is_met_what_may_be_and_what_is_not() -> None:
    points = [measured("auto", 0.0298, right, down, 0.03) for down, right in enumerate((400, 370, 255, 60))]
    row = next(line for line in goals_table(points).splitlines() if line.startswith("| 3 |"))
    assert row == "| 3 | 2.98 | 500 | 80.0 | 80.0 | **92.5** | 63.8 (65) ~ | 15.0 (35) | none fits |"
    rivals = [measured("LOP", 0.03, right, down) for down, right in ((1, 100), (2, 380), (3, 40))]
    rivals += [measured("CDC", share, 200, down) for share in (0.03, 0.0301) for down in (1, 2, 3)]
    assert "15.0 (35) | 50.0 (CDC) / 95.0 (LOP) / 50.0 (CDC) |" in goals_table([*points, *rivals])
    refined = [replace(each, method="auto, refined", worst=0.5) for each in points]
    (row,) = (each for each in goals_table([*points, *refined, *rivals]).splitlines() if "refined |" in each)
    assert row.startswith("| 3 refined | 2.98 | 500 | 80.0 | 50.0 | ")
    assert row.endswith("| 50.0 (CDC) / 95.0 (LOP) / 50.0 (CDC) |")
    assert goals_table(points).endswith("Not measured: the budgets 25, 12.5, 10, 8, 6, 5, 4.")


def test_pictures_and_tables_are_written_from_the_rows_of_the_file(tmp_path: Path) -> None:
    keys = {"model": "net", "variant": "", "device_bytes": "10", "worst": "0.7", "low": "0.66", "high": "0.74"}
    rows = [
        {**keys, "method": method, "budget": budget, "share": "0.08", "down": down, "clean": "0.8", "images": "500"}
        for method, budget in (("auto", "0.08"), ("CDC", ""))
        for down in "0123"
    ]
    write_report([{**row, "commit": "abc", "machine": "here"} for row in rows], [], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tables.md", *(f"net-{down}-down.png" for down in (1, 2, 3))}
    assert "4 comparisons" in (tmp_path / "tables.md").read_text()
    axes = picture([point({**rows[1], "commit": "abc", "machine": "here"})]).axes[0]
    assert axes.get_lines()[-1].get_xdata() == pytest.approx([8.0])
    assert replace(point({**rows[4], "commit": "abc", "machine": "here"}), budget=None).name == "CDC"
