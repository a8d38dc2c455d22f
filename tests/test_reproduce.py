"""The paper's evaluation as a command and as a function: what it writes, resumes and says."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commands import fails, run, run_json
from robustdice.cli.reproduce import amounts
from robustdice.errors import ModelError, OutputError, PlanError
from robustdice.failure.evaluate import Evaluation
from robustdice.importance.values import Importance
from robustdice.model.data import load_data
from robustdice.model.digits import digits
from robustdice.model.load import load_model
from robustdice.plan import ModelReference, failure_sets
from robustdice.plan.certificate import wilson
from robustdice.report import kept, paper
from robustdice.report.comparison import Choices, Subject
from robustdice.report.paper import ACCURACY, MEMORY
from robustdice.report.reproduce import reproduce
from robustdice.report.results import ModelResults, figure2_rows, trends

MODEL = "robustdice.demo.network:digits_cnn"


def subject(name: str = "digits_cnn", samples: int = 40) -> Subject:
    network = load_model(MODEL)
    scoring, dataset = (
        load_data("digits", network.preprocessing, network.outputs, split=split).sample(samples)
        for split in ("train", "test")
    )
    return Subject(name, network, scoring, dataset)


@pytest.mark.slow
def test_what_is_as_in_the_paper_gets_its_memory_and_stands_beside_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MEMORY, MODEL, {4: 0.457, 3: 0.55, 2: 0.7})
    monkeypatch.setitem(ACCURACY, (MODEL, 4, 1, "robustdice"), 0.1234)
    monkeypatch.setattr(paper, "MODELS", (MODEL,))
    for name, as_in_paper, shares in (("paper", True, ["0.457", "0.55", "0.7"]), ("other", False, ["", "", ""])):
        out = tmp_path / name
        (found,) = reproduce(
            [replace(subject(samples=10), as_in_paper=as_in_paper)],
            out,
            Choices(("robustdice", "lop"), memory=None if as_in_paper else 0.6),
        )
        table2 = [row for row in rows(out / "table2.csv") if row["method"] == "robustdice"]
        assert [row["paper"] for row in table2] == shares
        assert (float(table2[0]["memory_share"]) <= 0.457) == as_in_paper
        page = (out / "report.html").read_text()
        for text in (
            "12.3 %",
            "45.0 %",
            "not at hand",
            "RobustDiCE at 32% of the parameters",
            "28 to 32 %",
            "150.9 MB",
        ):
            assert (text in page) == as_in_paper, text
        # Two budgets, on four devices: the paper's share of a process's memory, and what it leaves of the parameters.
        assert [len(of_size) for of_size in found.figure2.values()] == ([3, 2, 2] if as_in_paper else [2, 2, 2])
        assert found.figure2[4][-1].memory_share <= (0.32 if as_in_paper else 1)


def test_nothing_is_claimed_of_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random_net.py").write_text(
        """
from torch import nn

def net():
    module = nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10))
    module.preprocessing = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}
    return module

def random_net(random_weights=False):
    return net()
"""
    )
    monkeypatch.chdir(tmp_path)
    network = load_model("random_net:random_net", random_weights=True)
    dataset = load_data("digits", network.preprocessing, network.outputs).sample(10)
    found = reproduce([Subject("net", network, dataset, dataset)], tmp_path / "out")
    assert trends(found) == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert "with random weights, whose accuracy says nothing" in page
    assert "nothing to claim" in page


def test_a_network_near_chance_is_warned_about_and_so_is_a_reader_of_its_page(tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join("1234567890"))  # the first output is the digit 0
    folder = tmp_path / "digits"
    pixels, labels = digits("test")
    for index in range(60):
        (folder / str(labels[index])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index, 0]).save(folder / str(labels[index]) / f"{index}.png")
    arguments = (
        "reproduce",
        "--models",
        MODEL,
        "--data",
        folder,
        "--methods",
        "lop",
        "--devices",
        "2",
        "--s3",
        "fisher",
    )
    said = run(*arguments, "--classes", classes, "-o", tmp_path / "wrong", "--json")
    (warning,) = (line for line in said.stderr.splitlines() if line.startswith("warning: "))
    assert "digits_cnn: the unpartitioned network answers" in warning
    assert "classes are in another order" in warning
    (doubt,) = json.loads(said.stdout)["notes"]["doubts"].values()
    assert doubt in warning
    assert "Warning, digits_cnn: the unpartitioned network answers" in (tmp_path / "wrong" / "report.html").read_text()


def test_what_was_said_wrong_does_not_stand_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="s3 is computed as auto, exact, fisher, not 'nonsense'"):
        reproduce([subject(samples=10)], tmp_path, Choices(s3="nonsense"))
    with pytest.raises(PlanError, match=r"25\.\d% of digits_cnn .* say --memory 0\.2\d or more, not 0\.1"):
        reproduce([subject(samples=10)], tmp_path, Choices(memory=0.1))
    (tmp_path / "work" / "digits_cnn").mkdir(parents=True)
    (tmp_path / "work" / "digits_cnn" / "settings.json").write_text('{"of": "a run that was stopped at once"}')
    (found,) = reproduce([subject(samples=10)], tmp_path)
    found.scores.save(tmp_path / "work" / "digits_cnn" / "scores.partial")  # as if stopped before it was removed
    (again,) = reproduce([subject(samples=10)], tmp_path)
    assert figure2_rows([again]) == figure2_rows([found])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_command_writes_tables_pictures_and_a_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--models", MODEL, "--data", "digits", "--memory", "0.5", "-o", str(out), "--samples")
    document = run_json("reproduce", *arguments, "60")
    figure2 = rows(out / "figure2.csv")
    assert list(figure2[0]) == [
        *("model", "devices", "failed", "method", "worst", "mean", "best", "clean", "memory_share"),
        *("samples", "worst_low", "worst_high"),
    ]
    assert {(row["devices"], row["failed"]) for row in figure2} == {
        *(("4", "1"), ("4", "2"), ("4", "3"), ("3", "1"), ("3", "2"), ("2", "1")),
    }
    assert {row["method"] for row in figure2} == {"robustdice", "lop", "cdc", "full"}
    for row in figure2:
        assert 0 <= float(row["worst"]) <= float(row["mean"]) <= float(row["best"]) <= 1
        if row["method"] == "full" or (row["method"] == "cdc" and row["failed"] == "1"):
            assert row["worst"] == row["clean"]
    table1 = rows(out / "table1.csv")
    assert list(table1[0]) == ["model", "scores", "same", "worst", "mean", "memory_share", "devices", "samples"]
    assert [row["scores"] for row in table1[::2]] == ["s1", "s2", "s3", "s1+s2", "s1+s3", "s2+s3", "s1+s2+s3"]
    robust = next(float(row["memory_share"]) for row in figure2 if row["method"] == "robustdice")
    for row in table1:
        share = float(row["memory_share"])
        assert share <= robust + 1e-9 if row["same"] == "memory" else share > 0
    assert [row["devices"] for row in rows(out / "table2.csv")] == [d for d in "432" for _ in range(4)]
    for name in ("figure2.png", "figure2.svg"):
        assert (out / name).stat().st_size > 10_000
    page = (out / "report.html").read_text()
    for text in (
        "60 images of digits",
        "scored with 64 images of digits (train), without labels",
        "RobustDiCE is not below LOP",
        "A, 4 devices, 1 down",
        "Full replication",
        "<dt>Processor</dt>",
        "<dt>Date</dt>",
        "<dt>Commit</dt>",
        "thread",
        "torch 2.",
        'class="best"',
        "<svg",
        "s3 exact",
        "Table II",
    ):
        assert text in page
    assert str(tmp_path) not in page
    assert "not at hand" not in page  # of what is not in the paper nothing is missing
    low, high = wilson(float(figure2[0]["worst"]), 60)
    assert f"{100 * float(figure2[0]['worst']):.1f} % [{100 * low:.1f} to {100 * high:.1f}]" in page
    assert all(cell.strip() for cell in re.findall(r"<td>(.*?)</td>", page))
    assert {verdict["model"] for verdict in document["trends"]} == {"digits_cnn"}
    assert document["notes"]["doubts"] == {}
    assert "holds results of other settings" in fails("reproduce", *arguments, "50")


def test_methods_devices_memory_and_scoring_data_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import robustdice as rd\n"
        "def everywhere(request):\n"
        "    assert request.importance is not None and request.memory < 1 and request.network is not None\n"
        "    holders = [tuple(range(request.devices))]\n"
        "    return [rd.to_shards(holders * (layer.neurons // layer.group), layer.group) for layer in request.layers]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    chosen = Choices(("mine:everywhere", "robustdice"), (2, 5), memory={5: 0.4, 2: "0.7"})
    (found,) = reproduce([replace(subject(samples=10), scored_apart=True)], tmp_path / "out", chosen)
    methods = ["mine:everywhere", "robustdice"]
    assert {d: [e.method for e in of_size] for d, of_size in found.figure2.items()} == {5: methods, 2: methods}
    assert list(found.figure2) == [5, 2]
    for devices, most in ((5, 0.4), (2, 0.7)):
        own, ours = found.figure2[devices]
        assert own.memory_share == 1
        assert own.by_size[1].worst == own.clean
        assert most - 0.1 < ours.memory_share <= most
    assert {evaluation.devices for evaluation in found.table1.values()} == {5}
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (
        "<th>mine:everywhere</th>",
        "5 devices, 4 down",
        "C, 2 devices, 1 down",
        "Table I: which scores (5 dev",
    ):
        assert text in page
    assert "may be among those" not in page
    (alone,) = reproduce([subject(samples=10)], tmp_path / "lop", Choices(("lop",), (2,)))
    assert alone.table1 == {}
    assert not (tmp_path / "lop" / "table1.csv").exists()
    page = (tmp_path / "lop" / "report.html").read_text()
    assert "Table I:" not in page
    assert "which may be among those that it is evaluated on" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("lop", "lop")}, "name one or more different methods, not 'lop, lop'"),
        ({"methods": ("best",)}, "unknown method 'best'; known: robustdice, lop, cdc, full, and package.module"),
        ({"methods": ("absent:f",)}, "cannot import the method 'absent:f'"),
        ({"devices": ()}, "name one or more different numbers of devices"),
        ({"devices": (1,)}, "2 to 16 devices, not 1"),
        ({"memory": {4: 0.5}}, "memory is given for 4 devices, but 2, 3, 4 are compared"),
    ],
)
def test_choices_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Choices(**arguments)


def test_memory_for_each_number_of_devices_is_said_in_one_word() -> None:
    assert amounts("0.5") == "0.5"
    assert amounts("4=0.48, 3=80MB") == {4: "0.48", 3: "80MB"}
    for wrong in ("4=", "four=0.5", "4=0.5,0.6"):
        with pytest.raises(PlanError, match="one for each number of devices"):
            amounts(wrong)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reproduce([subject()], tmp_path / "whole")

    class InterruptedRunError(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        reproduce([subject()], tmp_path / "parts", on_progress=interrupt)
    assert not (tmp_path / "parts" / "figure2.csv").exists()
    work = tmp_path / "parts" / "work" / "digits_cnn"
    before = {path: path.read_bytes() for path in work.glob("*-devices.partial")}
    assert before

    def again(*_arguments: object, **_keywords: object) -> None:
        raise AssertionError("the scores were kept")

    monkeypatch.setattr(kept, "score", again)
    parts = reproduce([subject()], tmp_path / "parts")
    assert all(path.read_bytes().startswith(content) for path, content in before.items())
    assert figure2_rows(parts) == figure2_rows(whole)
    for name in ("figure2.csv", "table1.csv", "table2.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_work_of_other_settings_is_not_mixed(tmp_path: Path) -> None:
    reproduce([subject(samples=10)], tmp_path)
    with pytest.raises(OutputError, match=r"holds results of other settings \(another --memory\); give the settings"):
        reproduce([subject(samples=10)], tmp_path, Choices(memory=0.6))
    with pytest.raises(OutputError, match=r"other settings \(from other images: --data, --imagenet, --samples"):
        reproduce([subject(samples=20)], tmp_path)
    (tmp_path / "work" / "digits_cnn" / "settings.json").write_text('{"robustdice": "0.0.9", "gone": 1}')
    with pytest.raises(OutputError, match="made by another version of robustdice; another --memory"):
        reproduce([subject(samples=10)], tmp_path)
    with pytest.raises(ModelError, match="two models are called 'digits_cnn'"):
        reproduce([subject(), subject()], tmp_path)


def evaluation(devices: int, method: str, by_size: tuple[float, ...]) -> Evaluation:
    """One accuracy for all failure sets of a size."""
    accuracy = {failed: by_size[size] for size in range(devices) for failed in failure_sets(devices, size)}
    return Evaluation(0.9, 10, "test", method, devices, 0.5, accuracy)


def results(levels: Mapping[str, tuple[float, ...]], singles: float) -> ModelResults:
    table = {
        (name, "memory"): evaluation(4, "robustdice", (0.9, level, 0, 0))
        for name, level in {"s1": singles, "s2": singles, "s3": singles, "s1+s2+s3": 0.7}.items()
    }
    figure2 = {d: [evaluation(d, method, level) for method, level in levels.items()] for d in (4, 3, 2)}
    scores = Importance((), (), ("s1",), ModelReference("test", "0" * 64))
    return ModelResults("net", "test", False, "images", scores, figure2, table)


def test_trends_say_what_holds_and_where_not() -> None:
    lop, full = (0.9, 0.4, 0.2, 0.1), (0.9,) * 4
    levels = {"robustdice": (0.9, 0.7, 0.5, 0.3), "lop": lop, "cdc": (0.9, 0.9, 0.2, 0.1), "full": full}
    assert [verdict["holds"] for verdict in trends([results(levels, 0.6)])] == [True] * 5
    levels |= {"robustdice": (0.9, 0.3, 0.1, 0.1), "cdc": (0.9, 0.8, 0.2, 0.2)}
    bad = trends([results(levels, 0.8)])
    assert [verdict["holds"] for verdict in bad] == [False] * 5
    assert bad[0]["fails"] == [
        *("4 devices, 1 down", "4 devices, 2 down", "3 devices, 1 down", "3 devices, 2 down", "2 devices, 1 down"),
    ]
    assert bad[2]["fails"] == ["4 devices", "3 devices", "2 devices"]
    assert bad[3]["fails"] == ["4 devices, 2 down", "4 devices, 3 down", "3 devices, 2 down"]
    assert bad[4]["fails"] == ["s1 alone", "s2 alone", "s3 alone"]


def test_missing_weights_and_images_are_named(tmp_path: Path) -> None:
    offline = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    result = run("reproduce", "--imagenet", tmp_path / "missing", "-o", tmp_path / "out", status=1, environment=offline)
    assert "Traceback" not in result.stderr
    for name in ("alexnet", "vgg16_bn", "convnext_tiny"):
        assert f"weights of torchvision:{name} are not on this machine" in result.stderr
    assert f"there is no image folder or zip file {tmp_path / 'missing'}" in result.stderr
    assert not (tmp_path / "out").exists()
    assert "give either --imagenet DIR, or --models" in fails("reproduce", "-o", tmp_path / "out")
