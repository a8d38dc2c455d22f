"""ONNX Runtime's other providers: what they can is computed by them, what they cannot by the CPU, and it is said which.

Azure's is in every package and computes nothing here, so that everything falls back. One that does compute comes in a
package that takes the place of onnxruntime: ``scripts/other_onnxruntime.py`` puts it where these tests find it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from commands import fails
from robustdice.bundle.manifest import MANIFEST_NAME, Manifest, Needs
from robustdice.bundle.read import Bundle, load_bundle
from robustdice.bundle.trial import summary
from robustdice.errors import BundleError, ClusterError
from robustdice.report.cluster_tables import status_table
from robustdice.runtime import sessions
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.executor import Executor
from robustdice.runtime.inprocess import run_bundles
from robustdice.runtime.sessions import open_session, provider_named
from robustdice.runtime.wire.founding import write_cluster

FRAMES = np.random.default_rng(7).standard_normal((4, *INPUT_SHAPE)).astype(np.float32)
PRESENT = {name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()}
OPENVINO = Path(__file__).resolve().parents[1] / "build" / "onnxruntime-openvino"


def with_trials(directory: Path) -> Bundle:
    """Device 0's bundle of the network made by hand, with what its parts compute here as what they must."""
    bundle = write_bundles(directory, make_plan(2), Network())[0]
    executor, found = Executor(bundle), dict[str, Any]()
    run = executor._sessions.run

    def remember(part: Any, inputs: Any) -> list[Any]:
        outputs = run(part, inputs)
        found[part.file] = tuple(map(summary, outputs))
        return outputs

    executor._sessions.run = remember  # type: ignore[method-assign]
    executor.try_out()
    document = json.loads(bundle.manifest.to_json())
    for stage in document["stages"]:
        for part in (*stage["local"], *stage["pieces"]):
            part["trial"] = found[part["file"]]
    (bundle.directory / MANIFEST_NAME).write_text(json.dumps(document))
    return load_bundle(bundle.directory)


def warnings_of(records: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in records.records if record.levelno == logging.WARNING]


class Faulty:
    """A session that computes something else, or fails."""

    def __init__(self, session: Any, fails: bool) -> None:
        self._session, self._fails = session, fails

    def run(self, outputs: Any, inputs: Any) -> list[Any]:
        if self._fails:
            raise RuntimeError("the processor has gone")
        return [1.01 * array for array in self._session.run(outputs, inputs)]


def test_providers_that_are_not_there_are_refused_with_those_that_are(tmp_path: Path) -> None:
    write_bundles(tmp_path, make_plan(2), Network())
    assert provider_named("CPU") == "cpu"
    others = PRESENT - {"Azure", "CPU"}
    assert provider_named("auto") == (min(others).lower() if others else "cpu")
    missing = "'rocket'" if "CUDA" in PRESENT else "'cuda'"
    for name, match in (("rocket", "no provider 'rocket'"), (missing.strip("'"), f"(no )?provider {missing}")):
        with pytest.raises(ClusterError, match=match):
            provider_named(name)
        said = fails("device", tmp_path / "device-0", "--provider", name)
        assert f"ONNX Runtime {onnxruntime.__version__} here has" in said
        assert "cpu" in said


def test_libraries_of_a_gpu_that_are_not_there_are_nothing_to_talk_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "Failed to load libcudart.so"  # as ONNX Runtime's package for GPUs does where there is none
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(said), raising=False)
    sessions._load_gpu_libraries.__wrapped__()
    assert capsys.readouterr().out == ""


def test_what_a_provider_cannot_is_computed_on_the_cpu_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = with_trials(tmp_path)
    executor = Executor(bundle, provider="azure")
    executor.try_out()
    models = len(bundle.manifest.parts)
    assert executor.providers == {"cpu": models}
    (said,) = warnings_of(caplog)
    assert f"{models} of {models} models are computed on the CPU, not with azure" in said
    executor.try_out()
    assert len(warnings_of(caplog)) == 1


def test_a_provider_with_wrong_kernels_is_not_used_for_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_trials(tmp_path)
    wrong = bundle.manifest.stages[1].pieces[0].file

    def opened(model: Path, threads: int, shares_arena: bool = False, provider: str = "cpu", packs: bool = True) -> Any:
        session = open_session(model, threads, shares_arena, packs=packs)
        return Faulty(session, fails=False) if provider != "cpu" and model.name == wrong else session

    monkeypatch.setattr(sessions, "open_session", opened)
    executor = Executor(bundle, provider="azure")
    executor.try_out()
    assert executor.providers == {"azure": len(bundle.manifest.parts) - 1, "cpu": 1}
    (said,) = warnings_of(caplog)
    assert wrong in said
    assert "a kernel of it is wrong: y1 deviates by 0.01" in said


def test_what_a_provider_fails_at_later_is_computed_on_the_cpu_within_the_same_frame(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_trials(tmp_path)
    expected = Executor(bundle).run_piece(0, 0, {"x": FRAMES[:1]})

    def opened(model: Path, threads: int, shares_arena: bool = False, provider: str = "cpu", packs: bool = True) -> Any:
        session = open_session(model, threads, shares_arena, packs=packs)
        return session if provider == "cpu" else Faulty(session, fails=True)

    monkeypatch.setattr(sessions, "open_session", opened)
    executor = Executor(bundle, provider="azure")
    for _ in range(2):
        np.testing.assert_array_equal(executor.run_piece(0, 0, {"x": FRAMES[:1]}).arrays[0], expected.arrays[0])
    (said,) = warnings_of(caplog)
    assert "the processor has gone" in said
    assert executor.providers["cpu"] == 1


def test_kernels_of_the_cpu_that_are_wrong_are_refused(tmp_path: Path) -> None:
    bundle = with_trials(tmp_path)
    path = bundle.directory / MANIFEST_NAME
    document = json.loads(path.read_text())
    document["stages"][1]["pieces"][0]["trial"][0][1] += 1.0
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"stage1-piece0.onnx computes something else here than where it was built"):
        Executor(load_bundle(bundle.directory)).try_out()


@pytest.mark.skipif(
    "Azure" not in PRESENT, reason="this package of ONNX Runtime has nothing that everything falls back from"
)
def test_devices_say_what_they_compute_with(tmp_path: Path) -> None:
    plan = make_plan(2)
    write_bundles(tmp_path, plan, Network())
    write_cluster(tmp_path, 2, plan.digest)
    with LocalCluster(tmp_path, provider="azure") as cluster:
        found = cluster.client.status()
        assert cluster.infer(FRAMES[0]).coverage == 1.0
        assert "not with azure" in cluster.log(0)
    assert [found[device]["providers"] for device in range(2)] == [{"cpu": 7}] * 2
    rows = status_table(["a", "b"], {0: found[0], 1: {**found[1], "providers": {"cuda": 5, "cpu": 2}}}, {}).rows
    assert [row[-1] for row in rows] == ["cpu", "cuda 5, cpu 2"]


def test_a_bundle_says_what_it_needs_and_a_device_that_has_it_not_says_so(tmp_path: Path) -> None:
    bundle = write_bundles(tmp_path, make_plan(2), Network())[0]
    manifest = replace(bundle.manifest, needs=Needs(opset=99, ir=98))
    assert Manifest.from_json(manifest.to_json()).needs == manifest.needs
    path = bundle.path("stage0-piece0.onnx")
    content = path.read_bytes()
    assert content[:2] == b"\x08\x08"  # version 8 of the files' form
    path.write_bytes(b"\x08\x62" + content[2:])
    files = dict(manifest.files)
    files[path.name] = replace(files[path.name], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(BundleError, match=r"operators of version 99, in files of version 98; this is ONNX Runtime"):
        Executor(replace(bundle, manifest=replace(manifest, files=files)))


ANSWER = """
import json, sys
import numpy as np
import robustdice as rd
frames = np.load(sys.argv[2])
with rd.LocalCluster(sys.argv[1], timeout_seconds=20.0) as cluster:
    outputs = [cluster.infer(frame).outputs.tolist() for frame in frames]
    print(json.dumps({"outputs": outputs, "status": [s["providers"] for s in cluster.client.status().values()],
                      "log": cluster.log(0)}))
"""


@pytest.mark.skipif(not OPENVINO.is_dir(), reason="scripts/other_onnxruntime.py onnxruntime-openvino lets it run")
def test_a_second_provider_answers_like_the_cpu(tmp_path: Path) -> None:
    plan = make_plan(2)
    bundles = write_bundles(tmp_path, plan, Network())
    write_cluster(tmp_path, 2, plan.digest)
    np.save(tmp_path / "frames.npy", FRAMES)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OPENVINO), *sys.path])}
    command = [sys.executable, "-c", ANSWER, str(tmp_path), str(tmp_path / "frames.npy")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(result.stdout)
    assert found["status"] == [{"openvino": len(bundle.manifest.parts)} for bundle in bundles], found["log"]
    np.testing.assert_allclose(found["outputs"], run_bundles(bundles, FRAMES), rtol=1e-4, atol=1e-4)
