"""What commands write to terminals, files and pipes, and how they answer when they are called wrongly."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

import robustdice as rd
from bundles import Network, make_plan, write_bundles
from commands import COMMAND, fails, run, run_json, without_workshop
from nets import Plain, save, seeded
from robustdice import terminal
from robustdice.failure.evaluate import Evaluation
from robustdice.plan.certificate import wilson
from robustdice.report import cluster_tables, tables
from robustdice.report.sheet import Sheet
from robustdice.runtime.answer import Answer
from robustdice.runtime.wire.founding import write_cluster

NUMBERS = ["1,234,567,890", "0.123456, 0.789", "32x16x16", "98.7 %"]


def printed(sheet: Sheet, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(sheet)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 1000])
def test_no_figure_is_cut_or_broken_however_narrow_the_terminal(width: int) -> None:
    sheet = Sheet("Title", "layer", "a", "b", "c", "d", "why", caption="words " * 40, texts=["why"])
    sheet.add_row("features.0", *NUMBERS, "a [long] reason " * 8)
    lines = printed(sheet, width)
    assert all(len(line) <= width for line in lines)
    for number in NUMBERS:
        assert any(number in line for line in lines), number
    assert " ".join(lines).count("[long]") == 8
    assert "…" not in "".join(lines)


def test_tables_are_whole_in_a_file_or_pipe() -> None:
    text = run("inspect", "torchvision:squeezenet1_1", "--random-weights").stdout
    assert "…" not in text
    assert any("features.12.expand3x3" in line and "147,712" in line for line in text.splitlines())
    assert "activations exchanged per image" in " ".join(text.split())


def test_long_work_says_now_and_then_on_a_pipe_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SPEAK_EVERY_SECONDS", 0.05)
    with terminal.progress("scoring") as advance:
        advance(7, 20)
        time.sleep(0.2)
    with terminal.waiting("loading the model"):
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert not out
    assert "scoring, 35 %, 0 s ..." in err
    assert "loading the model, 0 s ..." in err
    with terminal.progress("scoring"):
        pass
    assert not capsys.readouterr().err


def test_version_and_help_come_without_pytorch(tmp_path: Path) -> None:
    environment = without_workshop(tmp_path / "none")
    assert run("--version", environment=environment).stdout == "robustdice 0.1.0\n"
    assert "inspect" in run("--help", environment=environment).stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["plan", "--help"]])
def test_a_full_disk_behind_standard_output_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, **without_workshop(tmp_path / "none")}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert result.returncode == 1
    assert result.stderr == "error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["plan", "x", "-o", "y", "--devices", "four"], 1, "--devices takes a whole number, not 'four'"),
        (["bench", "x", "--rounds", "0"], 1, "--rounds takes a whole number, 1 or more, not '0'"),
        (["bench", "x", "--seconds", "nan"], 1, "--seconds takes a number, 0.1 or more, not 'nan'"),
        (["infer", "x", "y", "--timeout", "1e9"], 1, "the timeout is more than 0 and at most 3600 seconds, not 1e+09"),
        (["infer", "x", "y", "--timeout", "soon"], 1, "--timeout takes a number, 0.01 or more, not 'soon'"),
        (["score", "x", "--data", "digits", "-o", "s", "--seed", "-1"], 1, "--seed takes a whole number, 0 or more"),
        (["build", "x", "-o", "y", "--seed", "1"], 2, "No such option: --seed"),
        (["plan", "x"], 2, "see 'robustdice plan --help'"),
        (["nonsense"], 2, "see 'robustdice --help'"),
    ],
)
def test_a_wrong_call_is_answered_in_a_line(arguments: list[str], status: int, said: str) -> None:
    result = run(*arguments, status=status)
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("plan --method ", {"robustdice", "lop", "cdc", "full"}),
        ("score --s3 ", {"auto", "exact", "fisher"}),
        ("build --spares h", {"hot"}),
    ],
)
def test_the_shell_completes_what_an_option_takes(
    words: str, values: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_ROBUSTDICE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"robustdice {words}")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert values <= set(run().stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["reproduce", "--imagenet", "x", "-o", "y"],
        ["inspect", "torchvision:resnet18"],
        ["verify", "build"],
    ],
)
def test_on_a_device_the_workshop_is_asked_for_and_no_traceback_comes(arguments: list[str], tmp_path: Path) -> None:
    said = fails(*arguments, environment=without_workshop(tmp_path / "none"))
    assert "is not installed here" in said
    assert "pip install 'robustdice[workshop]'" in said


def test_bench_measures_devices_without_the_workshop(tmp_path: Path) -> None:
    plan = make_plan(2, 2)
    write_bundles(tmp_path, plan, Network())
    write_cluster(tmp_path, 2, plan.digest)
    environment = without_workshop(tmp_path / "none")
    arguments = ("bench", tmp_path, "--seconds", "0.1", "--rounds", "1", "--json")
    document = json.loads(run(*arguments, environment=environment).stdout)
    assert document["frames_per_second"] > 0
    assert document["ratio"] is None
    assert document["single_frames_per_second"] is None
    assert "robustdice[workshop]" in document["not_compared"]
    assert [device["weights_bytes"] for device in document["devices"]] == list(plan.bytes_per_device)
    for device in document["devices"]:  # what 'plan' and 'build' say a process will need is what it needs
        least, most = tables.process_bytes(device["weights_bytes"])
        assert 0.6 * least < device["peak_rss_bytes"] < 1.4 * most


@pytest.mark.slow
def test_bench_finds_the_model_that_has_moved_and_measures_devices_without_it(tmp_path: Path) -> None:
    models = [
        save(seeded(Plain, seed=seed), tmp_path / name, 1, 8, 8) for seed, name in enumerate(("net.pt2", "other.pt2"))
    ]
    network = rd.load_model(models[0])
    build = rd.build(network, rd.partition(network, devices=2, method="full"), tmp_path / "build")
    moved = (tmp_path / "net.pt2").rename(tmp_path / "moved.pt2")
    arguments = ("bench", build, "--seconds", "0.1", "--rounds", "1")
    alone = run_json(*arguments)
    assert alone["ratio"] is None
    assert "net.pt2; say where it is now with --model PATH" in alone["not_compared"]
    assert "other.pt2 is not the model that the plan was made of" in fails(*arguments, "--model", models[1])
    assert run_json(*arguments, "--model", moved)["ratio"] > 0


def answer(index: int | None) -> Answer:
    probabilities = None if index is None else [0.0] * index + [1.0]
    return Answer(0, probabilities, probabilities, index, 1.0, 0.0, (), 0.01, 0, (), None if index else "time is up")  # type: ignore[arg-type]


def test_an_unanswered_frame_claims_nothing_about_devices_and_names_differ() -> None:
    prefix = "/data/some/very/long/folder/name/with/many/photographs/holiday"
    documents = [cluster_tables.answer_json(f"{prefix}_{k}.jpg", answer(3 if k else None), []) for k in range(3)]
    assert documents[0]["down"] is None
    assert documents[0]["reason"] == "time is up"
    assert documents[1]["down"] == []
    lines = printed(cluster_tables.answers_table(documents), 80)
    (unanswered,) = [line for line in lines if "no answer" in line]
    assert "none" not in unanswered
    for k in range(3):
        assert any(f"holiday_{k}.jpg" in line for line in lines)


def test_status_tells_a_fault_in_full() -> None:
    fault = {"device": 1, "seconds_ago": 3.2, "reason": "frame 12 waited 0.512 s for it in stage 3"}
    said = {"up": [0], "in_flight": 0, "frames_per_second": 1.0, "weights_bytes": 10**6, "last_fault": fault}
    said |= {"connections": {"1": "connected"}, "refused": []}
    said["one_way"] = [{"device": 1, "reason": "it is heard, but cannot be reached", "seconds": 2.0}]
    text = " ".join(printed(cluster_tables.status_table(["a", "b"], {0: said}, {}), 80))
    assert "frame 12 waited 0.512 s for it in stage 3" in " ".join(text.split())
    assert "a and b are connected one way only: it is heard, but cannot be reached." in " ".join(text.split())


def test_every_document_carries_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"x": 1})
    assert json.loads(capsys.readouterr().out) == {"version": terminal.JSON_VERSION, "x": 1}


@pytest.mark.parametrize(("accuracy", "samples"), [(0.0, 10), (1.0, 10), (0.5, 100), (0.8, 5000)])
def test_an_interval_holds_the_accuracy_and_narrows_with_samples(accuracy: float, samples: int) -> None:
    low, high = wilson(accuracy, samples)
    assert 0 <= low <= accuracy <= high <= 1
    wider = wilson(accuracy, samples // 2)
    assert 0 < high - low < wider[1] - wider[0]


def test_plans_side_by_side_say_worst_and_mean() -> None:
    results = [
        Evaluation(0.9, 100, "d", method, 2, share, {frozenset(): 0.9, frozenset({0}): low, frozenset({1}): 0.8})
        for method, share, low in (("robustdice", 0.6, 0.7), ("lop", 0.5, 0.1))
    ]
    lines = printed(tables.comparison_table(["mine", "theirs"], results), 80)
    (row,) = [line for line in lines if line.startswith("│ 1 ")]
    assert "70.0 (75.0)" in row
    assert "10.0 (45.0)" in row
