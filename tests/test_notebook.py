"""What people see and take along in a notebook: short reprs, tables, rows, pictures, a bar."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import robustdice as rd
from commands import run
from robustdice.errors import OutputError
from robustdice.importance.values import Importance
from robustdice.model.network import Network
from robustdice.plan import Plan

MODEL = "robustdice.demo.network:digits_cnn"


@pytest.fixture(scope="module")
def network() -> Network:
    return rd.load_model(MODEL)


@pytest.fixture(scope="module")
def scores(network: Network) -> Importance:
    images = rd.load_data("digits", network.preprocessing, network.outputs, split="train").sample(4)
    return rd.score(network, images, columns=("s1", "s2"))


@pytest.fixture(scope="module")
def plan(network: Network, scores: Importance) -> Plan:
    return rd.partition(network, scores, devices=3, memory=0.6)


@pytest.fixture(scope="module")
def result(network: Network, plan: Plan) -> rd.Evaluation:
    images = rd.load_data("digits", network.preprocessing, network.outputs).sample(20)
    return rd.evaluate(network, plan, images)


def test_reprs_are_one_short_line(network: Network, scores: Importance, plan: Plan, result: rd.Evaluation) -> None:
    for value, said in (
        (network, "digits_cnn: 5 layers, 330 neurons"),
        (scores, "s1, s2 of 330 units in 5 layers"),
        (plan, "robustdice: 5 layers of robustdice.demo.network:digits_cnn on 3 devices, at most"),
        (result, "robustdice on 20 images of digits (test): 0 down"),
    ):
        assert said in repr(value)
        assert len(repr(value)) < 200
        assert "\n" not in repr(value)


def test_notebooks_show_tables(network: Network, scores: Importance, plan: Plan, result: rd.Evaluation) -> None:
    for value, rows in ((network, 5), (scores, 5), (plan, 5), (result, 3)):
        html = value._repr_html_()
        assert html.startswith("<table>")
        assert html.endswith("</table>")
        assert html.count("<tr>") == rows + 1
    counted = [
        int(n)
        for n in plan._repr_html_()
        .split("features.0</td><td>", 1)[1]
        .split("</tr>")[0]
        .replace("</td>", "")
        .split("<td>")
    ]
    assert counted[0] == sum(counted[1:]) == plan.layers[0].neurons


def test_names_are_no_markup_in_tables() -> None:
    scores = Importance(("<b>",), (np.ones((1, 1)),), ("s1",), rd.load_model(MODEL).reference)
    assert "<b>" not in scores._repr_html_()
    assert "&lt;b&gt;" in scores._repr_html_()


def test_an_evaluation_is_a_list_of_dictionaries_and_a_csv_file(result: rd.Evaluation, tmp_path: Path) -> None:
    rows = result.to_rows()
    assert len(rows) == 7
    assert {row["down"]: row["accuracy"] for row in rows} == {
        ",".join(map(str, sorted(failed))): accuracy for failed, accuracy in result.accuracy.items()
    }
    assert [row["failed"] for row in rows] == [0, 1, 1, 1, 2, 2, 2]
    assert {(row["method"], row["devices"], row["samples"], row["data"], row["clean"]) for row in rows} == {
        ("robustdice", 3, 20, "digits (test)", result.clean)
    }
    result.to_csv(tmp_path / "result.csv")
    with (tmp_path / "result.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [
        {key: type(row[key])(text) for key, text in line.items()} for row, line in zip(rows, read, strict=True)
    ] == rows
    with pytest.raises(OutputError, match="cannot write"):
        result.to_csv(tmp_path / "missing" / "result.csv")


def test_evaluate_writes_a_row_for_each_plan_and_failure_set(plan: Plan, network: Network, tmp_path: Path) -> None:
    plan.save(tmp_path / "ours.json")
    rd.partition(network, devices=2, method="lop").save(tmp_path / "lop.json")
    output = tmp_path / "all.csv"
    run("evaluate", tmp_path / "ours.json", tmp_path / "lop.json", "--data", "digits", "--samples", "20", "-o", output)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["plan"]).name, row["down"]) for row in rows] == [
        *(("ours.json", down) for down in ("", "0", "1", "2", "0,1", "0,2", "1,2")),
        *(("lop.json", down) for down in ("", "0", "1")),
    ]


def test_pictures_show_themselves_and_can_be_kept(
    scores: Importance, plan: Plan, result: rd.Evaluation, tmp_path: Path
) -> None:
    pictures: list[Any] = [
        rd.plot_accuracy(result, tmp_path / "accuracy.svg"),
        rd.plot_accuracy([result, result]),
        rd.plot_plan(plan),
        rd.plot_scores(scores, str(tmp_path / "scores.png")),
    ]
    assert all(picture._repr_png_().startswith(b"\x89PNG") for picture in pictures)
    assert (tmp_path / "accuracy.svg").stat().st_size > 1000
    assert (tmp_path / "scores.png").stat().st_size > 1000
    with pytest.raises(OutputError, match=r"ends with .png, .svg, .pdf, not 'plan.gif'"):
        rd.plot_plan(plan, tmp_path / "plan.gif")


def test_progress_draws_a_bar(network: Network, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    images = rd.load_data("digits", network.preprocessing, network.outputs).sample(10)
    told: list[tuple[int, int]] = []
    rd.score(network, images, columns=("s2",), progress=True, on_progress=lambda *done: told.append(done))
    rd.evaluate(network, plan, images, max_failed=0, progress=True)
    said = capsys.readouterr().err
    for what in ("scoring", "evaluating"):
        assert f"\r{what} [{'#' * 40}] 100%" in said
    assert told[-1][0] == told[-1][1]
    rd.score(network, images, columns=("s1",), progress=True)  # nothing that takes time
    assert "] 100%" in capsys.readouterr().err
    rd.evaluate(network, plan, images, max_failed=0)
    assert capsys.readouterr().err == ""
