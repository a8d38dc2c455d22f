"""What reads 8-bit inputs comes in two forms, with unsigned and with signed codes, that give the same, bit for bit; a
device takes the one that its processor multiplies faster."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from torch import nn

from nets import Floats, network_of, random_images, random_plan, relative_error
from robustdice.bundle.onnx_graph import export_onnx
from robustdice.bundle.read import Bundle, load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import BundleError
from robustdice.model.network import Network
from robustdice.plan import Plan, failure_sets
from robustdice.representation import Steps
from robustdice.runtime.executor import Executor
from robustdice.runtime.inprocess import InProcess
from test_activations import ROUNDED, in_int8, rounding_all
from test_bundles import made
from test_coarse_bundles import bundles_of, exchange_file, predicted


@pytest.fixture
def on_arm(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and what is loaded from then on takes its processor for such a one."""
    return lambda: monkeypatch.setattr("platform.machine", lambda: "aarch64")


def on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_both_forms_of_linear_layers_and_convolutions_give_the_same_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_arm: Callable[[], None]
) -> None:
    padded = nn.Conv2d(6, 5, 3, stride=2, padding=(2, 1), dilation=(1, 2))
    network = network_of(nn.Sequential(nn.Conv2d(3, 6, 3), padded, nn.Flatten(), nn.Linear(60, 4)), 3, 7, 9)
    plain = in_int8(network, random_plan(network, 2, 5), "int3")  # multiplied as they are; and rounded inputs alone
    graph = export_onnx(network)
    for number, steps in enumerate((Steps(0.01, 0), Steps(0.013, 37), Steps(0.01, 255))):
        plan, seen = replace(plain, activations=dict.fromkeys(range(3), steps)), set[tuple[str, str]]()
        for bundle in map(load_bundle, write_bundles(network, plan, tmp_path / f"{number}", graph=graph)):
            manifest = bundle.manifest
            shapes = {manifest.input: manifest.input_shape, **{each.value: each.shape for each in manifest.exchanges}}
            values = {name: 3 * random_images(2, shape) for name, shape in shapes.items()}
            for value in values.values():
                codes = np.clip(np.rint(value / steps.scale) + steps.zero, 0, 255)
                assert (codes.min(), codes.max()) == (0, 255)
            on_x86(monkeypatch)
            unsigned = Executor(bundle)
            on_arm()
            signed = Executor(bundle)
            signed.try_out()
            for part in (part for part in manifest.parts if part.signed):
                found = unsigned.run_part(part, values)
                for name, value in signed.run_part(part, values).items():
                    np.testing.assert_array_equal(value, found[name])
                operations = {node.op_type for node in onnx.load(bundle.path(part.file)).graph.node}
                seen |= {(part.inputs[0], name) for name in operations & {"MatMulInteger", "DequantizeLinear"}}
        assert len(seen) == 6, "every layer in both ways"


def of_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Network, Plan, list[Bundle], Floats]:
    """A network of which all layers multiply codes, but for spares of one; what every device computes included."""
    _, network, _ = made("plain")
    images = random_images(2, network.input_shape)
    plan = rounding_all(network, in_int8(network, random_plan(network, 2, 5, [1])), images, monkeypatch)
    return network, plan, bundles_of(network, plan, "plain", tmp_path), images


def test_weights_are_in_a_bundle_once_for_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan, bundles, _ = of_plain(tmp_path, monkeypatch)
    zeros = {"file": set[int](), "signed": set[int]()}
    for device, bundle in enumerate(bundles):
        assert bundle.manifest.weight_bytes == plan.bytes_per_device[device]
        for part in (part for part in bundle.manifest.parts if part.signed):
            for form, file in (("file", part.file), ("signed", str(part.signed))):
                tensors = onnx.load(bundle.directory / file, load_external_data=False).graph.initializer
                codes = [tensor for tensor in tensors if tensor.name.endswith("@codes")]
                assert {
                    entry.value for tensor in codes for entry in tensor.external_data if entry.key == "location"
                } == {part.apart}
                zeros[form] |= {tensor.data_type for tensor in tensors if tensor.name.endswith("@zero")}
    assert zeros == {"file": {TensorProto.UINT8}, "signed": {TensorProto.INT8}}


@pytest.mark.parametrize("arm", [False, True])
def test_a_device_needs_one_form_alone_and_answers_as_the_evaluator_says(
    arm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_arm: Callable[[], None]
) -> None:
    network, plan, bundles, images = of_plain(tmp_path, monkeypatch)
    (on_arm if arm else lambda: on_x86(monkeypatch))()
    for bundle in bundles:
        for part in (part for part in bundle.manifest.parts if part.signed):
            (bundle.directory / (part.file if arm else str(part.signed))).unlink()  # after it was verified
        Executor(bundle).try_out()
    together = InProcess(bundles)
    for failed in (each for size in range(2) for each in failure_sets(2, size)):
        wanted = predicted(network, plan, images, failed)
        assert relative_error(together.run(images, failed), wanted) < ROUNDED, sorted(failed)


def test_signed_forms_that_are_missing_damaged_or_wrong_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_arm: Callable[[], None]
) -> None:
    *_, bundles, _ = of_plain(tmp_path, monkeypatch)
    directory = bundles[0].directory
    file = next(part.signed for part in bundles[0].manifest.parts if part.signed)
    assert file is not None
    good = (directory / file).read_bytes()
    for content, reason in (
        (good[:-1], f"{file}.* is truncated"),
        (good[:-1] + b"x", f"{file}.* it changed"),
        (None, f"cannot read .*{file}"),
    ):
        (directory / file).unlink()
        if content is not None:
            (directory / file).write_bytes(content)
        with pytest.raises(BundleError, match=f"{reason}.*copy the device's directory again"):
            load_bundle(directory)
        (directory / file).write_bytes(good)
    exchange_file(directory, file, _with_other_steps)
    Executor(load_bundle(directory)).try_out()
    on_arm()
    with pytest.raises(BundleError, match=f"{file} computes something else here"):
        Executor(load_bundle(directory)).try_out()


def _with_other_steps(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    tensor = next(each for each in model.graph.initializer if each.name.endswith("@step"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(2), tensor.name))
    return bytes(model.SerializeToString())
