"""What a device's log says to programs, and that an open secret key is warned about."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from commands import COMMAND
from robustdice.runtime.client import Client
from robustdice.runtime.journal import FIELDS, JsonLines
from robustdice.runtime.wire.founding import write_cluster


def build(directory: Path, devices: int) -> None:
    plan = make_plan(devices, 2)
    write_bundles(directory, plan, Network())
    write_cluster(directory, devices, plan.digest)


def test_a_device_logs_what_happens_as_fields(tmp_path: Path) -> None:
    build(tmp_path, 2)
    (tmp_path / "device-0" / "secret.key").chmod(0o644)
    devices = [
        subprocess.Popen([*COMMAND, "device", f"{tmp_path}/device-{k}", "--json"], stderr=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    try:
        with Client(tmp_path / "cluster.toml", timeout_seconds=20.0) as client:
            while set(client.status(5.0).get(0, {"up": ()})["up"]) != {0, 1}:
                pass
            assert client.infer(np.zeros(INPUT_SHAPE, np.float32)).outputs is not None
            devices[1].kill()
        assert devices[0].stderr is not None
        records = []
        for line in devices[0].stderr:
            records.append(json.loads(line))
            if records[-1]["event"] == "suspect":
                devices[0].terminate()
    finally:
        for process in devices:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    assert all({"time", "level", "message", *FIELDS} == set(record) for record in records)
    said = {record["event"]: {key: record[key] for key in FIELDS} for record in records}
    nothing = dict.fromkeys(FIELDS)
    assert said["exposed-key"] == nothing | {"event": "exposed-key", "reason": "mode 644"}
    assert said["started"] == nothing | {"event": "started", "device": 0}
    assert said["admitted"] == nothing | {"event": "admitted", "device": 0, "peer": 1, "frame": 0}
    assert said["suspect"]["peer"] == 1
    assert said["suspect"]["reason"]
    assert records[-1]["event"] == "stopped"


def test_a_record_of_somebody_else_has_the_same_keys() -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "%d frames", (3,), None)
    document = json.loads(JsonLines().format(record))
    assert document["message"] == "3 frames"
    assert {document[key] for key in FIELDS} == {None}


def test_a_client_warns_of_a_key_that_others_can_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path, 2)
    Client(tmp_path / "cluster.toml").close()
    assert not caplog.records
    (tmp_path / "client.key").chmod(0o640)
    Client(tmp_path / "cluster.toml").close()
    (record,) = caplog.records
    assert f"chmod 600 {tmp_path / 'client.key'}" in record.getMessage()
