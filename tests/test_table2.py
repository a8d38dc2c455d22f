"""Table II: what running devices give, by method, and what is made of it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from commands import COMMAND, fails, run_json
from nets import Plain, network_of, save, seeded
from robustdice.errors import ClusterError, OutputError
from robustdice.meter.apart import on_loopback, running
from robustdice.meter.netns import permitted
from robustdice.model.data import random_images
from robustdice.model.network import Network
from robustdice.report import paper, table2
from robustdice.report.comparison import Choices, Subject
from robustdice.report.table2 import reproduce_table2
from robustdice.report.table2_page import render
from robustdice.report.table2_rows import Row, Table2, with_ratios
from robustdice.workshop import build, partition

MODEL = "robustdice.demo.network:digits_cnn"
FIGURE = "<svg></svg>"


@pytest.fixture(scope="module")
def network() -> Network:
    return network_of(seeded(Plain), 1, 8, 8)


def subject(network: Network) -> Subject:
    images = random_images(network.input_shape)
    return Subject("plain", network, images, images)


def row(method: str, devices: int = 4, spares: str = "hot", **figures: Any) -> Row:
    return {
        "model": "alexnet",
        "source": "torchvision:alexnet",
        "devices": devices,
        "method": method,
        "spares": spares,
        "trained": False,
        "samples": 10,
        "frames_per_second": 8.0,
        "latency_p50_ms": 100.0,
        "latency_p99_ms": 200.0,
        "coverage": 1.0,
        "unanswered": 0,
        "weights_bytes": 244_000_000,
        "rss_bytes": 300_000_000,
        "peak_rss_bytes": 310_000_000,
        "joules_per_image": None,
        "energy": "this machine measures no energy",
        "processors_busy_elsewhere": 0.25,
        "date": "2026-11-26 18:00 UTC",
        "commit": "0123456789ab",
        **figures,
    }


def test_what_is_shown_are_ratios_over_full_replication_on_as_many_devices_with_the_same_spares() -> None:
    rows = [
        row("full", frames_per_second=10.0, joules_per_image=2.0),
        row("full", spares="standby", frames_per_second=40.0),
        row("robustdice", frames_per_second=5.0, peak_rss_bytes=155_000_000, joules_per_image=1.0),
        row("robustdice", spares="standby", frames_per_second=5.0),
        row("cdc", 3),
    ]
    full, _, hot, standby, alone = with_ratios(rows)
    assert full["frames_per_second_ratio"] == full["joules_per_image_ratio"] == 1
    assert [hot[f"{key}_ratio"] for key in ("frames_per_second", "peak_rss_bytes", "joules_per_image")] == [0.5] * 3
    assert (standby["frames_per_second_ratio"], standby["joules_per_image_ratio"]) == (0.125, None)
    assert alone["frames_per_second_ratio"] is None  # nothing to compare with was measured
    assert [each["paper_memory_ratio"] for each in (full, hot, alone)] == [
        None,
        paper.MEMORY[rows[0]["source"]][4],
        None,
    ]


def test_the_page_says_what_is_not_known_not_measured_and_not_as_wished() -> None:
    rows = with_ratios([row("full"), row("cdc", unanswered=3), row("robustdice", peak_rss_bytes=124_000_000)])
    failed = {"alexnet, 2 devices, full, hot spares": "device 1 has ended: no memory"}
    page = render(Table2("loopback", "namespaces are not permitted", rows, failed), FIGURE, {"Commit": "0123"})
    for text in (
        "not behind a switch: namespaces are not permitted",
        "not measured: alexnet, 2 devices, full, hot spares: device 1 has ended: no memory",
        "alexnet, 4 devices, cdc, hot spares: 3 of 10 frames were not answered",
        "alexnet has random weights",
        "No energy: this machine measures no energy.",
        "other programs kept 0.2 to 0.2 processors busy",
        "Measured at 0123456789ab",
        "<td>48.2 % of full</td><td>0.2</td>",
        "124.0<small>40.0 % of full</small>",
    ):
        assert text in page
    assert page.count("not in our notes") == 1  # of CDC
    assert "J/image" not in page
    assert "J/image" in render(Table2("x", None, with_ratios([row("full", joules_per_image=1.5)]), {}), FIGURE, {})


def test_figures_are_what_running_devices_say(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table2, "permitted", lambda: "they are forbidden here")
    monkeypatch.setattr(table2, "SPARES", ("hot",))
    choices = Choices(("full",), (2,), memory=0.7)
    found = reproduce_table2([subject(network)], tmp_path, choices, samples=30)
    assert not found.failed
    (only,) = found.rows
    assert only["samples"] == 30
    assert only["frames_per_second"] > 0
    assert only["latency_p99_ms"] >= only["latency_p50_ms"] > 0
    assert (only["unanswered"], only["coverage"]) == (0, 1)
    assert only["weights_bytes"] == max(partition(network, devices=2, method="full").bytes_per_device)
    assert only["peak_rss_bytes"] >= only["rss_bytes"] > 20_000_000  # of a process, libraries and all
    assert only["joules_per_image"] is None or only["energy"]
    assert found.no_switch == "they are forbidden here"
    assert "not behind a switch: they are forbidden here" in (tmp_path / "table2.html").read_text()
    assert json.loads((tmp_path / "table2-measured.json").read_text())["rows"] == found.rows
    with (tmp_path / "table2-measured.csv").open() as file:
        assert [line["frames_per_second"] for line in csv.DictReader(file)] == [str(only["frames_per_second"])]
    assert not (tmp_path / "work-table2" / "plain" / "build").exists()

    def again(*_: object) -> None:
        raise AssertionError("what is measured is kept")

    monkeypatch.setattr(table2, "running", again)
    assert reproduce_table2([subject(network)], tmp_path, choices, samples=30).rows == found.rows
    with pytest.raises(OutputError, match=r"holds results of other settings \(another number of frames: --samples\)"):
        reproduce_table2([subject(network)], tmp_path, choices, samples=31)


def test_a_device_that_cannot_run_is_named_and_nothing_is_measured(network: Network, tmp_path: Path) -> None:
    made = build(network, partition(network, devices=2, method="full"), tmp_path / "build")
    (made / "device-1" / "manifest.json").write_text("{}")
    with running(made, on_loopback(2)) as devices, pytest.raises(ClusterError, match=r"device 1 has ended: error: "):
        devices.measure(samples=1)
    assert [process.poll() is None for process in devices.processes] == [False, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", MODEL, "--data", "digits", "--link", "1Gbit"), "add --table2, or leave it out"),
        (("--table2", "--models", MODEL, "--link", "fast"), "link 'fast' is not a rate"),
        (("--table2", "--models", MODEL, "--methods", "lop,cdc"), "add full to the methods"),
        (("--table2", "--models", MODEL, "--memory", "0.1"), "say --memory 0.2"),
        (("--table2", "--models", MODEL, "--data", "absent"), "there is no image folder or zip file absent"),
        (("--table2", "--models", MODEL, "--scoring-data", "digits"), "measures no accuracy"),
        (("--table2", "--imagenet", "here", "--data", "digits"), "either --imagenet DIR"),
        (("--table2", "--models", "absent.pt2"), "absent.pt2"),
        (("--table2", "--models", MODEL, "--devices", "1"), "2 to 16 devices, not 1"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert message in fails("reproduce", *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_measures_every_method_with_spares_of_both_kinds_behind_a_switch(tmp_path: Path) -> None:
    if reason := permitted():
        pytest.skip(reason)
    model = save(seeded(Plain), tmp_path / "plain.pt2", 1, 8, 8)
    words = ("--table2", "--models", model, "--devices", "3,2", "--memory", "0.8", "--samples", "20", "-o", tmp_path)
    document = run_json("reproduce", *words)
    assert document["network"] == "a switch whose port for each device carries 1000 Mbit/s either way"
    assert document["failed"] == {}
    rows = {(row["devices"], row["method"], row["spares"]): row for row in document["rows"]}
    assert set(rows) == {(d, m, s) for d in (3, 2) for m in ("full", "cdc", "robustdice") for s in ("standby", "hot")}
    for found in rows.values():
        assert (found["samples"], found["unanswered"], found["coverage"]) == (20, 0, 1)
        assert found["frames_per_second"] > 0
    assert rows[3, "robustdice", "hot"]["weights_bytes_ratio"] < 0.8


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running_and_what_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "--table2",
        "--models",
        MODEL,
        "--devices",
        "2",
        "--memory",
        "0.7",
        "--samples",
        "100000",
        "--methods",
        "full",
    ]
    process = subprocess.Popen([*COMMAND, "reproduce", *words, "-o", str(out)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(children := psutil.Process(process.pid).children(recursive=True)) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "the same command goes on from there" in said
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not list(Path("/run/netns").glob(f"robustdice-{process.pid}-*"))
    assert not (out / "work-table2" / "digits_cnn" / "build").exists()
