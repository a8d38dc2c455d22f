"""Bundles: what is read back, what is refused, and what run_bundles makes of them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles, write_whole_bundles
from robustdice.bundle.read import load_bundle
from robustdice.errors import BundleError, ClusterError
from robustdice.runtime.inprocess import InProcess, run_bundles


def frames(count: int = 5) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(1).standard_normal((count, *INPUT_SHAPE)).astype(np.float32)


@pytest.mark.parametrize("spares", ["standby", "hot"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_failure_set_equals_the_reference(tmp_path: Path, spares: str, interleaved: bool) -> None:
    plan, network = make_plan(3, interleaved=interleaved), Network()
    devices = InProcess(write_bundles(tmp_path, plan, network, spares))
    for size in range(3):
        for failed in itertools.combinations(range(3), size):
            expected = network.run(frames(), plan.surviving_neurons(failed))
            np.testing.assert_allclose(devices.run(frames(), failed), expected, rtol=1e-4, atol=1e-5)


def test_all_down_and_missing_bundles_are_errors(tmp_path: Path) -> None:
    bundles = write_bundles(tmp_path, make_plan(3), Network())
    with pytest.raises(ClusterError, match="nobody to answer"):
        run_bundles(bundles, frames(), {0, 1, 2})
    with pytest.raises(BundleError, match="one of each device"):
        run_bundles(bundles[:2], frames())


def test_a_plan_without_exchange(tmp_path: Path) -> None:
    network = Network()
    found = run_bundles(write_whole_bundles(tmp_path, network, 2), frames(), {0})
    np.testing.assert_allclose(found, network.run(frames()), rtol=1e-4, atol=1e-5)


def test_damaged_bundles_are_refused(tmp_path: Path) -> None:
    write_bundles(tmp_path, make_plan(3), Network())
    good = tmp_path / "device-1"

    def refused(match: str) -> None:
        with pytest.raises(BundleError, match=match) as caught:
            load_bundle(bad)
        assert "build" in str(caught.value)
        shutil.rmtree(bad)
        shutil.copytree(good, bad)

    bad = tmp_path / "copy"
    shutil.copytree(good, bad)
    first = bad / "stage0-piece0.onnx"
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    refused("truncated")
    first.write_bytes(content + b"x")
    refused("more than the expected")
    first.write_bytes(content[:50] + b"?" + content[51:])
    refused("SHA-256")
    first.unlink()
    refused("cannot read")
    shutil.copy(tmp_path / "device-0" / first.name, first)
    refused(r"stage0-piece0\.onnx has")
    (bad / "extra.onnx").write_bytes(b"")
    refused("not part of the bundle")
    (bad / "manifest.json").write_text("{")
    refused("not JSON")
    (bad / "manifest.json").unlink()
    refused("cannot read")
    moved = tmp_path / "device-7"
    shutil.copytree(good, moved)
    with pytest.raises(BundleError, match="of device 1, not 7"):
        load_bundle(moved)
    with pytest.raises(BundleError, match="no bundle there"):
        load_bundle(tmp_path / "nowhere")


def test_a_file_that_changes_after_loading_is_noticed(tmp_path: Path) -> None:
    bundle = write_bundles(tmp_path, make_plan(3), Network())[0]
    (bundle.directory / "local.onnx").write_bytes(b"not what it was")
    with pytest.raises(BundleError, match=r"local\.onnx"):
        bundle.path("local.onnx")
