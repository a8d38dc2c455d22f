"""The command line as people and programs use it: real commands, on the demo's network and digits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import numpy as np
import psutil
import pytest
from PIL import Image
from typer.models import OptionInfo

from commands import COMMAND, fails, run, run_json
from robustdice.cli.app import app
from robustdice.model.digits import digits
from robustdice.plan import Plan
from robustdice.report.tables import plan_json
from robustdice.runtime.wire.security import UNENCRYPTED

MODEL = "robustdice.demo.network:digits_cnn"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores, a plan and a build, made by the commands."""
    root = tmp_path_factory.mktemp("cli")
    run("score", MODEL, "--data", "digits", "--samples", "10", "-o", root / "scores.npz")
    run("plan", MODEL, "--devices", "3", "--memory", "0.7", "--scores", root / "scores.npz", "-o", root / "plan.json")
    run("build", root / "plan.json", "-o", root / "build")
    return root


@pytest.fixture(scope="module")
def image(work: Path) -> Path:
    path = work / "digit.png"
    pixels, labels = digits("test")
    Image.fromarray(pixels[int(np.flatnonzero(labels == 7)[0]), 0]).save(path)
    return path


@pytest.fixture
def running(work: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "up", str(work / "build")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Ctrl-C" in line:
            break
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def test_no_option_is_left_for_its_metavar_to_name() -> None:
    """Some versions of typer that are allowed call an option --DATA whose metavar is that, unless its name is said."""
    commands = [command.callback for command in app.registered_commands if command.callback is not None]
    hints = [hint for command in commands for hint in get_type_hints(command, include_extras=True).items()]
    found = [
        (name, option.default)  # of an annotation that is where a name stands
        for name, hint in hints
        for option in getattr(hint, "__metadata__", ())
        if isinstance(option, OptionInfo) and option.metavar and option.metavar.lower() == name
    ]
    assert ("data", "--data") in found
    assert all(isinstance(said, str) for _, said in found), found


def test_build_takes_a_host_for_each_device_and_keeps_what_is_there(work: Path, tmp_path: Path) -> None:
    plan, build = work / "plan.json", tmp_path / "build"
    for wrong in (
        ["--transport", "tls"],
        ["--port", "65534"],
        ["--hosts", "a,b"],
        ["--hosts", "a,,c"],
        ["--host", "*"],
        ["--host", "a:5"],
    ):
        fails("build", plan, "-o", build, *wrong)
        assert not build.exists()
    assert "give one of the two" in fails("build", plan, "-o", build, "--host", "a", "--hosts", "a,b,c")
    run("build", plan, "-o", build, "--hosts", "pi-a, 10.0.0.2,fd00::3", "--transport", "plain")
    addresses = ["tcp://pi-a:27200", "tcp://10.0.0.2:27201", "tcp://[fd00::3]:27202"]
    before = (build / "cluster.toml").read_text()
    text = run("build", plan, "-o", build).stdout
    assert "until they are started again" in text
    assert "robustdice device" in text
    assert UNENCRYPTED in text
    assert all(address in text for address in addresses)
    assert (build / "cluster.toml").read_text() == before


def test_inspect_says_layers_and_exchanges() -> None:
    document = run_json("inspect", MODEL)
    assert [layer["neurons"] for layer in document["layers"]] == [32, 64, 96, 128, 10]
    assert document["parameters"] == sum(layer["parameters"] for layer in document["layers"])
    assert document["layers"][0]["exchange_shape"] == [32, 16, 16]
    table = run("inspect", MODEL).stdout
    assert "features.0" in table
    assert "32x16x16" in table


def test_plan_keeps_the_budget(work: Path) -> None:
    document = run_json(
        "plan", MODEL, "--devices", "4", "--memory", "0.6", "--scores", work / "scores.npz", "-o", work / "other.json"
    )
    assert document["method"] == "robustdice"
    assert document["memory_share"] <= 0.6
    assert len(document["bytes_per_device"]) == 4
    assert document["healthy_compute_share"] < 0.5


def test_plan_says_which_layers_are_split_hidden_and_why(tmp_path: Path) -> None:
    said = run(
        "plan", MODEL, "--devices", "2", "--method", "lop", "--split", "hidden", "-o", tmp_path / "plan.json"
    ).stdout
    assert {line.split()[1] for line in said.splitlines() if "hidden │" in line} == {"features.8", "classifier.1"}
    splits = plan_json(Plan.load(tmp_path / "plan.json"))["splits"]
    assert splits == ["neurons", "neurons", "hidden", "hidden", "neurons"]
    why = "Their partial sums are added up. That are 256 of the activations, in 1 exchanges; gathered they were 512"
    assert f"split hidden: 1. {why}, in 2." in " ".join(said.split())


def test_evaluate_has_every_failure_set(work: Path) -> None:
    document = run_json("evaluate", work / "plan.json", "--data", "digits", "--samples", "50")
    assert document["samples"] == 50
    assert set(document["failures"]) == {"0", "1", "2"}
    assert set(document["failures"]["2"]["sets"]) == {"0,1", "0,2", "1,2"}
    assert document["failures"]["0"]["sets"] == {"": document["clean"]}
    for summary in document["failures"].values():
        assert summary["worst"] == min(summary["sets"].values())
        assert summary["best"] == max(summary["sets"].values())
        low, high = summary["worst_interval"]
        assert 0 <= low <= summary["worst"] <= high <= 1
        assert high - low > 0.05


def test_several_plans_stand_side_by_side_with_what_sampling_may_do(work: Path) -> None:
    shutil.copy(work / "plan.json", work / "twin.json")
    text = run("evaluate", work / "plan.json", work / "twin.json", "--data", "digits", "--samples", "50").stdout
    (head,) = [line for line in text.splitlines() if "devices down" in line]
    assert {"plan", "twin"} <= set(head.split())
    assert text.count("\u250c") <= 1  # one table
    assert "each figure may be off by up to" in " ".join(text.split())


def test_evaluate_resumes_draws_and_says_what_to_expect(work: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", work / "plan.json", "--data", "digits", "--samples", "20", "--max-failed")
    plain = run_json(*arguments, "2")
    more = ("--availability", "0.9,0.8,1", "--plot", tmp_path / "a.svg", "--checkpoint", tmp_path / "kept")
    found = run_json(*arguments[:-1], *more)
    assert {key: found[key] for key in plain} == plain
    sets = {failed: accuracy for size in plain["failures"].values() for failed, accuracy in size["sets"].items()}
    expected = sum(p * sets[failed] for failed, p in (("", 0.72), ("0", 0.08), ("1", 0.18), ("0,1", 0.02)))
    assert found["availability"]["expected_accuracy"] == pytest.approx(expected)
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "kept").exists()  # the work is done


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plot", "picture.jpg"), "ends with .png, .svg, .pdf, not 'picture.jpg'"),
        (("--availability", "0.9,0.8"), "2 availabilities for 3 devices; give one for all, or one for each"),
        (("--availability", "2"), "between 0 and 1, not 2.0"),
        (("--availability", "0.9", "--max-failed", "1"), "leave out --max-failed"),
        (("--checkpoint", "precious"), "precious is not a checkpoint of robustdice"),
        (("--scheduler", "tcp://127.0.0.1:9"), "no Dask scheduler answers at 'tcp://127.0.0.1:9'"),
        (("--max-failed", "3"), "of 3 devices 0 to 2 can fail, not 3"),
    ],
)
def test_wrong_options_of_evaluate_are_said_at_once_and_nothing_is_lost(
    options: tuple[str, ...], said: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").write_text("no line break")
    assert said in fails("evaluate", work / "plan.json", "--data", "digits", *options)
    assert (tmp_path / "precious").read_text() == "no line break"


def test_verify_compares_every_failure_set(work: Path) -> None:
    document = run_json("verify", work / "build")
    assert set(document["failure_sets"]) == {"", "0", "1", "2", "0,1", "0,2", "1,2"}
    assert document["max_relative_error"] == max(document["failure_sets"].values()) < 1e-4
    assert document["agrees"]
    assert document["version"] == 1


def test_infer_answers_through_a_killed_device(work: Path, image: Path, running: subprocess.Popen[str]) -> None:
    answer = run_json("infer", work / "build", image)
    assert answer["class_name"] == "7"
    assert answer["coverage"] == 1
    assert answer["down"] == []
    (work / "bad.png").write_bytes(image.read_bytes()[:50])
    partly = run("infer", work / "build", work / "bad.png", image, work / "none.png", "--json", status=1)
    lines = [json.loads(line) for line in partly.stdout.splitlines()]
    assert sorted(Path(line["path"]).name for line in lines if "error" in line) == ["bad.png", "none.png"]
    assert [line["class_name"] for line in lines if "error" not in line] == ["7"]
    assert "cannot read the image" in partly.stderr
    assert "there is no image" in partly.stderr
    folder = work / "photos"
    (folder / "deeper").mkdir(parents=True)
    (folder / "notes.txt").write_text("no image")
    for name in ("a.png", "deeper/b.png"):
        shutil.copy(image, folder / name)
    of_folder = run("infer", work / "build", folder, image)
    assert of_folder.stdout.count("\u2502 7 ") == 3
    assert "notes.txt" in of_folder.stderr
    devices = psutil.Process(running.pid).children()
    assert len(devices) == 3
    devices[0].kill()
    lines = run("infer", work / "build", image, image, "--json").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["path"] for a in answers] == [str(image)] * 2
    assert all(len(a["down"]) == 1 and 0 < a["coverage"] <= 1 for a in answers)
    assert answers[0]["from_spares"] > 0
    found = run_json("status", work / "build")["devices"]
    assert sum(document is not None for document in found.values()) == 2
    assert "silent" in run("status", work / "build").stdout


def test_up_ends_with_all_its_devices_on_ctrl_c(work: Path) -> None:
    process = subprocess.Popen([*COMMAND, "up", str(work / "build")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "Ctrl-C" in line:
            break
    devices = psutil.Process(process.pid).children(recursive=True)
    assert len(devices) == 3
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "All devices are stopped." in output
    assert not psutil.wait_procs(devices, timeout=10)[1]


def test_device_refuses_a_port_in_use_and_a_flipped_byte(work: Path, tmp_path: Path) -> None:
    broken = tmp_path / "build"
    shutil.copytree(work / "build", broken)
    file = sorted((broken / "device-1").glob("*.onnx"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert file.name in fails("device", broken / "device-1")
    first = subprocess.Popen([*COMMAND, "device", str(broken / "device-0")], stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr is not None
        assert "listens on" in first.stderr.readline()
        assert "tcp://127.0.0.1" in fails("device", broken / "device-0")
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=30)
    assert first.returncode == 0


def test_bundle_of_another_plan_is_refused(work: Path, tmp_path: Path) -> None:
    run("plan", MODEL, "--devices", "3", "--method", "lop", "-o", tmp_path / "lop.json")
    run("build", tmp_path / "lop.json", "-o", tmp_path / "lop")
    mixed = tmp_path / "mixed"
    shutil.copytree(work / "build", mixed)
    shutil.rmtree(mixed / "device-2")
    shutil.copytree(tmp_path / "lop" / "device-2", mixed / "device-2")
    assert "plan" in fails("device", mixed / "device-2")
    assert "another plan" in fails("verify", mixed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "missing.pt2"], "there is no model file missing.pt2"),
        (["inspect", "resnet18"], "expected torchvision:NAME"),
        (["inspect", "torchvision:nothing"], "no classification model"),
        (["inspect", "robustdice.nowhere:factory"], "cannot import"),
        (["inspect", MODEL, "--size", "1,4,4"], "does not export"),
        (["inspect", MODEL, "--size", "big"], "--size takes numbers"),
        (["inspect", MODEL, "--classes", "missing.txt"], "cannot read missing.txt"),
        (["plan", MODEL, "--devices", "17", "--method", "lop", "-o", "p.json"], "2 to 16 devices"),
        (["plan", MODEL, "--devices", "4", "--method", "magic", "-o", "p.json"], "unknown method"),
        (["plan", MODEL, "--devices", "4", "--split", "sideways", "-o", "p.json"], "unknown split"),
        (["plan", MODEL, "--devices", "4", "--method", "cdc", "--split", "hidden", "-o", "p.json"], "split neurons"),
        (
            ["plan", MODEL, "--devices", "4", "--for", "latency", "-o", "p.json"],
            "take split rows or auto",
        ),
        (["plan", MODEL, "--devices", "4", "--method", "auto", "--for", "fun", "-o", "p.json"], "known: throughput"),
        (
            ["plan", MODEL, "--devices", "4", "--for", "memory", "--split", "rows", "-o", "p.json"],
            "unknown goal 'memory'",
        ),
        (["plan", MODEL, "--devices", "4", "-o", "p.json"], "--scores FILE"),
        (
            ["plan", MODEL, "--devices", "4", "--method", "lop", "--scores", "s.npz", "-o", "p.json"],
            "looks at no scores",
        ),
        (["plan", MODEL, "--devices", "4", "--method", "lop", "-o", "missing/p.json"], "cannot write"),
        (["plan", MODEL, "--devices", "4", "--scores", "missing.npz", "-o", "p.json"], "missing.npz"),
        (["score", MODEL, "--data", "missing.zip", "-o", "s.npz"], "missing.zip"),
        (["score", MODEL, "--data", "digits", "--use", "s9", "-o", "s.npz"], "unknown score 's9'"),
        (["score", MODEL, "--data", "digits", "-o", "."], ". is a directory; name a file with -o"),
        (["score", MODEL, "--data", "digits", "-o", "s.npz", "--plot", "s.txt"], "not 's.txt'"),
        (["score", MODEL, "--data", "digits", "-o", "s.npz", "--s3", "guess"], "auto, exact, fisher, not 'guess'"),
        (["evaluate", "missing.json", "--data", "digits"], "missing.json"),
        (["build", "missing.json", "-o", "out"], "missing.json"),
        (["verify", "missing"], "missing"),
        (["infer", "missing", "image.png"], "missing"),
        (["up", "missing"], "missing"),
        (["device", "missing/device-0"], "missing"),
        (["status", "missing"], "missing"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in fails(*arguments)
    assert not list(tmp_path.iterdir())


def test_wrong_images_are_refused(work: Path, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "eleven"
    folder.mkdir(parents=True)
    shutil.copy(image, folder / "a.png")
    assert "no class of the model" in fails("evaluate", work / "plan.json", "--data", tmp_path / "data")
    folder.rename(folder.with_name("1"))
    Image.new("L", (20, 20)).save(tmp_path / "data" / "1" / "a.png")
    assert "20x20" in run("evaluate", work / "plan.json", "--data", tmp_path / "data", status=1).stderr


def test_bad_images_are_skipped_on_request_and_everything_is_said(work: Path, image: Path, tmp_path: Path) -> None:
    for digit in ("2", "3", "7"):
        (tmp_path / "data" / digit).mkdir(parents=True)
        shutil.copy(image, tmp_path / "data" / digit)
    (tmp_path / "data" / "3" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "data" / "notes.txt").touch()
    result = run(
        "evaluate", work / "plan.json", "--data", tmp_path / "data", "--skip-bad", "--max-failed", "0", "--json"
    )
    document = json.loads(result.stdout)
    assert document["samples"] == 3
    assert [left["kind"] for left in document["notes"]["left_out"]] == ["of the kind .txt"]
    assert "cut.jpg" in document["notes"]["skipped"][0]
    assert document["notes"]["doubt"] in result.stderr  # a 7 in three folders
    for said in ("not read: 1 of the kind .txt (notes.txt)", "went on without 1 bad images", "chance 10.0%"):
        assert said in result.stderr
    scored = run_json("score", MODEL, "--data", image, "--use", "s1", "-o", tmp_path / "scores.npz")
    assert scored["settings"]["samples"] == 1


def test_nobody_to_ask(work: Path, image: Path) -> None:
    assert "robustdice up" in fails("infer", work / "build", image)
    result = run("status", work / "build", "--json", status=1)
    assert set(json.loads(result.stdout)["devices"].values()) == {None}
    assert "none of 3 devices can be reached" in result.stderr


@pytest.mark.slow
def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "slow_net.py").write_text(
        """
from torch import nn

def net():
    layers = [nn.Conv2d(1, 64, 3, padding=1), *(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    module.preprocessing = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}
    return module
"""
    )
    command = [*COMMAND, "score", "slow_net:net", "--data", "digits", "--s3", "exact", "-o", "scores.npz"]
    kept = tmp_path / "scores.npz.partial"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (kept.exists() and kept.read_bytes().count(b"\n") > 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "scores.npz.partial: the same command goes on from there" in " ".join(stderr.split())
    assert "Traceback" not in stderr
    lines = kept.read_bytes().splitlines()
    assert len(lines) > 1
    assert not (tmp_path / "scores.npz").exists()
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=110, check=True)
    assert (tmp_path / "scores.npz").exists()
    assert not kept.exists()


RANDOM = {"inspect", "score", "plan", "evaluate", "verify", "reproduce", "bench", "demo"}
"""Commands in which something is: weights, images, frames."""


@pytest.mark.parametrize("command", [*sorted(RANDOM), "build", "device", "up", "infer", "status"])
def test_every_command_has_help_with_an_example_and_a_seed_where_something_is_random(
    command: str,
) -> None:
    words = run(command, "--help").stdout.split()
    assert f"Example: robustdice {command}" in " ".join(words)
    assert "--json" in words
    assert ("--seed" in words) == (command in RANDOM)
    assert command in run("--help").stdout


@pytest.mark.slow
def test_bench_measures_both(work: Path) -> None:
    document = run_json("bench", work / "build", "--seconds", "0.5", "--rounds", "1")
    assert document["ratio"] == pytest.approx(document["frames_per_second"] / document["single_frames_per_second"])
    assert len(document["devices"]) == 3
    assert all(d["peak_rss_bytes"] > d["weights_bytes"] > 0 for d in document["devices"])
    assert 0 < document["latency_ms"]["p50"] <= document["latency_ms"]["p99"]


@pytest.mark.slow
def test_demo_tells_the_truth() -> None:
    document = run_json("demo", "--frames", "120")
    assert [phase["down"] for phase in document["phases"]] == [[], [0], [0, 2], [0, 2, 3], [], [1], []]
    for phase in document["phases"]:
        assert phase["settled"] == 120
        assert phase["answered"] == phase["frames"] == 120 + phase["in_transition"]
        assert phase["accuracy"] == pytest.approx(phase["predicted_accuracy"], abs=0.02), phase
        assert (phase["transition_accuracy"] is None) == (phase["in_transition"] == 0)
    assert document["methods"]["robustdice"]["worst"]["1"] > document["methods"]["lop"]["worst"]["1"]
    assert document["methods"]["full"]["memory_share"] == 1
    assert document["memory_share"] <= 0.6


@pytest.mark.slow
def test_demo_leaves_nothing_behind_on_ctrl_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "demo"], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    try:
        deadline = time.monotonic() + 120
        while len(devices := psutil.Process(process.pid).children(recursive=True)) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert not psutil.wait_procs(devices, timeout=10)[1]
    assert not list(tmp_path.glob("robustdice*"))  # libraries have caches of their own there


def test_up_says_what_a_device_that_ends_said_last(work: Path) -> None:
    process = subprocess.Popen([*COMMAND, "up", str(work / "build"), "--json"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        pids = {}
        while (said := json.loads(process.stdout.readline()))["event"] != "ready":
            pids[said["device"]] = said["process"]
        os.kill(pids[1], signal.SIGKILL)
        ended = json.loads(process.stdout.readline())
        assert (ended["event"], ended["device"]) == ("ended", 1)
        assert "device-1" in ended["last"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
