"""Layers that read 8-bit inputs: devices and evaluator round alike, and whole numbers are multiplied exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from commands import run
from nets import Floats, network_of, random_images, random_plan, relative_error
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import PlanError
from robustdice.failure.activations import steps_for
from robustdice.failure.copies import rounded
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.partitioning.precision import Kinds
from robustdice.plan import Holder, Plan, failure_sets
from robustdice.representation import Steps
from robustdice.runtime.executor import Executor
from robustdice.runtime.inprocess import InProcess
from robustdice.workshop import calibrate, round_activations, with_precision
from test_bundles import made
from test_coarse_bundles import bundles_of, predicted

ROUNDED = 0.02
"""Of the largest score: some number that lies between two steps goes to the other one."""


def in_int8(network: Network, plan: Plan, spare: str = "int8") -> Plan:
    return with_precision(network, plan, [Kinds("int8", spare)] * len(network.layers))


def rounding_all(
    network: Network, plan: Plan, images: Floats, monkeypatch: pytest.MonkeyPatch, smallest: int = 1
) -> Plan:
    monkeypatch.setattr("robustdice.failure.activations.MIN_WEIGHTS", smallest)
    return round_activations(network, plan, images)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    halves=st.lists(st.integers(-300, 300), min_size=1, max_size=5),
    scale=st.floats(2.0**-20, 2.0**10, width=32),
    zero=st.integers(0, 255),
)
def test_the_evaluator_rounds_as_onnx_runtime_does(
    values: list[float], halves: list[int], scale: float, zero: int
) -> None:
    x = np.array([*values, *((half + 0.5) * scale for half in halves), 0.0], np.float32)
    (expected,) = _quantise().run(
        None, {"x": x, "scale": np.array(scale, np.float32), "zero": np.array(zero, np.uint8)}
    )
    found = rounded(torch.from_numpy(x), Steps(scale, zero)).numpy()
    np.testing.assert_array_equal(found, expected)
    assert found[-1] == 0


def _quantise() -> onnxruntime.InferenceSession:
    if not _SESSIONS:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ]
        inputs = [("x", TensorProto.FLOAT, [None]), ("scale", TensorProto.FLOAT, []), ("zero", TensorProto.UINT8, [])]
        graph = helper.make_graph(
            nodes,
            "q",
            [helper.make_tensor_value_info(*each) for each in inputs],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        _SESSIONS.append(onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]))
    return _SESSIONS[0]


_SESSIONS: list[onnxruntime.InferenceSession] = []


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50))
def test_steps_reach_what_they_are_chosen_for(values: list[float]) -> None:
    x = torch.tensor(values)
    steps = steps_for(x)
    span = max(float(x.max()), 0) - min(float(x.min()), 0)
    assert float((rounded(x, steps) - x).square().mean()) ** 0.5 <= span / 255 + 1e-6


@pytest.mark.parametrize(
    "name",
    ["residual", "channels_last", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "branches"))],
)
def test_bundles_equal_the_evaluator_in_every_failure_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network, _ = made(name)
    images = random_images(4, network.input_shape, 3)
    plan = in_int8(network, random_plan(network, 2, 5, [1]))
    plan = rounding_all(network, plan, images, monkeypatch)
    grouped = [index for index, layer in enumerate(network.plan_layers) if layer.reads_group]
    assert sorted({*plan.activations, *grouped}) == list(range(len(plan.layers)))
    plan = calibrate(network, plan, images)
    bundles = bundles_of(network, plan, name, tmp_path)
    for device, bundle in enumerate(bundles):
        assert bundle.manifest.weight_bytes == plan.bytes_per_device[device]
        Executor(bundle).try_out()
    together = InProcess(bundles)
    for failed in (each for size in range(2) for each in failure_sets(2, size)):
        wanted = predicted(network, plan, images, failed)
        assert relative_error(together.run(images, failed), wanted) < ROUNDED, sorted(failed)


def test_whole_numbers_are_multiplied_and_what_is_coarser_reads_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network, _ = made("plain")
    images = random_images(2, network.input_shape)
    plan = rounding_all(network, in_int8(network, random_plan(network, 2, 5)), images, monkeypatch)
    mixed = replace(in_int8(network, random_plan(network, 2, 5), "int3"), activations=plan.activations)
    kinds = {}
    products = []
    for name, each in (("int8", plan), ("mixed", mixed)):
        bundles = bundles_of(network, each, "plain", tmp_path / name)
        nodes = [n for b in bundles for p in b.manifest.parts for n in onnx.load(b.path(p.file)).graph.node]
        kinds[name] = {n.op_type for n in nodes}
        products += [n for n in nodes if n.op_type == "MatMulInteger"]
        assert relative_error(InProcess(bundles).run(images, [0]), predicted(network, each, images, frozenset([0]))) < (
            ROUNDED
        )
    assert "MatMulInteger" in kinds["int8"]
    assert {len(node.input) for node in products} == {4}  # with three, ONNX Runtime 1.23 ends the process
    assert not {"Conv", "Gemm", "DequantizeLinear"} & kinds["int8"]
    assert {"MatMulInteger", "DequantizeLinear"} <= kinds["mixed"]


@pytest.mark.parametrize("convolution", [False, True])
def test_sums_of_the_largest_products_do_not_saturate(convolution: bool, tmp_path: Path) -> None:
    module = nn.Conv2d(8, 6, 3, padding=1, bias=False) if convolution else nn.Linear(128, 6, bias=False)
    with torch.no_grad():
        module.weight.copy_(
            torch.where(torch.arange(6) % 2 == 0, 1.0, -1.0).reshape(6, *[1] * (module.weight.ndim - 1))
        )
    shape = (8, 4, 4) if convolution else (128,)
    network = network_of(nn.Sequential(module, nn.Flatten()) if convolution else module, *shape)
    plan = in_int8(network, random_plan(network, 2, 5, [0]))
    images = np.ones((2, *shape), np.float32)
    plan = round_activations(network, plan, images)
    assert plan.activations[0] == Steps(1 / 255, 0)
    bundles = [load_bundle(directory) for directory in write_bundles(network, plan, tmp_path / "build")]
    with torch.no_grad():
        exact = module(torch.from_numpy(images)).flatten(1).numpy()
    assert relative_error(InProcess(bundles).run(images), exact) < 1e-3  # of the scale, a float16


@pytest.mark.parametrize("weights", [96, 64, 512])
def test_four_bits_of_linear_layers_are_multiplied_packed_and_one_image_gives_what_two_do(
    weights: int, tmp_path: Path
) -> None:
    network = network_of(nn.Sequential(nn.Linear(weights, 7), nn.ReLU(), nn.Linear(7, 3)), weights)
    plan = with_precision(network, random_plan(network, 2, 5, [1]), [Kinds("int4", "int4")] * 2)
    bundles = [load_bundle(directory) for directory in write_bundles(network, plan, tmp_path / "build")]
    operations = {n.op_type for b in bundles for p in b.manifest.parts for n in onnx.load(b.path(p.file)).graph.node}
    assert "MatMulNBits" in operations
    for device, bundle in enumerate(bundles):
        assert bundle.manifest.weight_bytes == plan.bytes_per_device[device]
        Executor(bundle).try_out()
    images = random_images(3, (weights,))
    together = InProcess(bundles)
    for failed in (frozenset[int](), frozenset({0}), frozenset({1})):
        wanted = predicted(network, plan, images, failed)
        assert relative_error(together.run(images, failed), wanted) < 1e-5
        assert relative_error(together.run(images[:1], failed), wanted[:1]) < 1e-5


def test_steps_survive_the_plans_file_and_are_part_of_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network, _ = made("plain")
    plain = in_int8(network, random_plan(network, 2, 5))
    plan = rounding_all(network, plain, random_images(2, network.input_shape), monkeypatch)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.activations == plan.activations
    assert loaded.digest == plan.digest != plain.digest


def test_a_layer_with_fine_copies_or_none_in_int8_reads_no_rounded_input() -> None:
    _, network, _ = made("plain")
    plan = in_int8(network, random_plan(network, 2, 5))
    first, *others = plan.shards[1]
    fine = replace(first, holders=tuple(Holder(device) for device in first.devices))
    with pytest.raises(PlanError, match="no copy can be in float32"):
        replace(plan, shards=(plan.shards[0], (fine, *others), plan.shards[2]), activations={1: Steps(0.1, 0)})
    with pytest.raises(PlanError, match="is not of this plan"):
        replace(plan, activations={7: Steps(0.1, 0)})
    with pytest.raises(PlanError, match="no layer has all its copies in int8"):
        round_activations(network, random_plan(network, 2, 5), random_images(2, network.input_shape))


@pytest.mark.parametrize("steps", [(0.0, 0), (-1.0, 0), (float("nan"), 0), (1.0, 256), (1.0, -1)])
def test_steps_are_positive_and_zero_is_one_of_them(steps: tuple[float, int]) -> None:
    with pytest.raises(ValueError, match="no steps"):
        Steps(*steps)


def test_the_command_asks_for_images_and_knows_what_there_is(tmp_path: Path) -> None:
    arguments = ("plan", "nets:plain", "--devices", "2", "-o", tmp_path / "plan.json", "--precision", "int8")
    assert "give --data DATA" in run(*arguments, "--activations", "int8", status=1).stderr
    other = ("--activations", "int8", "--data", "digits")
    assert "give --precision int8" in run(*arguments[:-1], "int4", *other, status=1).stderr
    assert "no --method auto" in run(*arguments, "--method", "auto", *other, status=1).stderr
    assert "known: float32, int8" in run(*arguments, "--activations", "int4", status=1).stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar10", "vgg16_bn_half_cifar10"])
def test_bundles_of_trained_models_equal_the_evaluator(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "shared" / "models" / f"{name}.pt2"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/models")
    network = load_model(str(path))
    images = random_images(16, network.input_shape)
    plan = round_activations(network, in_int8(network, random_plan(network, 2, 1, range(4, 9))), images)
    bundles = [load_bundle(directory) for directory in write_bundles(network, plan, tmp_path / "build")]
    for bundle in bundles:
        Executor(bundle).try_out()
    together = InProcess(bundles)
    for failed in (frozenset[int](), frozenset({0}), frozenset({1})):
        wanted = predicted(network, plan, images[:2], failed)
        assert relative_error(together.run(images[:2], failed), wanted) < 5e-2
