"""ONNX files: what exporters write, early and late opsets, other layouts; and everything that is refused.

Loading itself compares with ONNX Runtime, and refuses a file whose scores differ.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from nets import Branches, ChannelsLast, Plain, Residual, network_of, random_images, relative_error, seeded
from robustdice.errors import ModelError
from robustdice.model.load import load_model, reload_model
from robustdice.model.tracing import quiet
from robustdice.runtime.sessions import open_session
from robustdice.workshop import build, partition, verify

NETS = ((Residual, (3, 8, 8)), (Plain, (1, 8, 8)), (Branches, (2, 6, 6)), (ChannelsLast, (3, 8, 8)))


def write_new(module: nn.Module, path: Path, *shape: int) -> None:
    with quiet():
        batch = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(module, (torch.zeros(2, *shape),), path, dynamo=True, dynamic_shapes=batch, verbose=False)


def write_old(module: nn.Module, path: Path, *shape: int) -> None:
    with quiet():
        images, axes = (torch.zeros(1, *shape),), {"image": {0: "batch"}}
        torch.onnx.export(
            module, images, str(path), dynamo=False, opset_version=13, input_names=["image"], dynamic_axes=axes
        )


def write_fixed(module: nn.Module, path: Path, *shape: int) -> None:
    with quiet():
        torch.onnx.export(module, (torch.zeros(1, *shape),), str(path), dynamo=False, opset_version=11)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape", "write"),
    [
        (*net, write)
        for net in NETS
        for write in (write_new, write_old, write_fixed)
        if write is write_new or net[0] is not Branches  # torch's old exporter knows no channel shuffle
    ],
)
def test_what_torch_writes_gives_the_modules_scores(
    make: type[nn.Module], shape: tuple[int, ...], write: Callable[..., None], tmp_path: Path
) -> None:
    module, images = seeded(make), random_images(3, shape)
    write(module, tmp_path / "net.onnx", *shape)
    network = load_model(str(tmp_path / "net.onnx"))
    with torch.no_grad():
        found, expected = (run(torch.from_numpy(images)).numpy() for run in (network.run, module))
    assert relative_error(found, expected) < 1e-5
    assert [layer.neurons for layer in network.plan_layers] == [
        layer.neurons for layer in network_of(module, *shape).plan_layers
    ]
    plan = partition(network, devices=3, method="lop")
    assert verify(build(network, plan, tmp_path / "build")).max_relative_error < 1e-5
    assert reload_model(network.reference).reference == network.reference


def test_layers_are_named_as_the_weights_are(tmp_path: Path) -> None:
    write_new(seeded(Plain), tmp_path / "net.onnx", 1, 8, 8)
    assert [layer.name for layer in load_model(str(tmp_path / "net.onnx")).plan_layers] == ["conv", "fc1", "fc2"]


def model_of(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, Any], opset: int = 13, shape: Sequence[Any] = ("N", 3, 8, 8)
) -> onnx.ModelProto:
    """Nodes from ``x`` to ``features``, behind them global average pooling and a linear layer to ``y``."""
    head = [
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head", "offset"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(
        [*nodes, *head],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, 7 if opset < 13 else 9)
    return model


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def check(model: onnx.ModelProto, path: Path, batch: int | None = None) -> None:
    """The file loads, any batch is computed, and ONNX Runtime gives the same scores."""
    onnx.save(model, path)
    network = load_model(str(path))
    images = random_images(4, network.input_shape)
    given = (
        images.transpose(0, 2, 3, 1) if model.graph.input[0].type.tensor_type.shape.dim[3].dim_value == 3 else images
    )
    session = open_session(path, threads=1)
    parts = [given] if batch is None else np.split(given, 4 // batch)
    expected = np.concatenate([session.run(None, {"x": np.ascontiguousarray(part)})[0] for part in parts])
    with torch.no_grad():
        assert relative_error(network.run(torch.from_numpy(images)).numpy(), expected) < 1e-4


CONV = helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1])
WEIGHTS = {"w": floats(6, 3, 3, 3), "b": floats(6), "head": floats(6, 4), "offset": floats(4)}


def after(operator: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, ["c", *inputs], ["features"], **attributes)


CASES: dict[str, tuple[int, list[onnx.NodeProto], dict[str, Any]]] = {
    "LRN": (13, [after("LRN", size=5, alpha=0.1)], {}),
    "PRelu by channel": (13, [after("PRelu", "slope")], {"slope": floats(6, 1, 1)}),
    "PRelu of one": (13, [after("PRelu", "slope")], {"slope": floats(1)}),
    "Clip by attributes": (7, [after("Clip", min=-0.5, max=0.5)], {}),
    "Clip by inputs": (13, [after("Clip", "low", "high")], {"low": np.float32(-0.5), "high": np.float32(0.25)}),
    "Clip from below": (13, [after("Clip", "low")], {"low": np.float32(0)}),
    "HardSigmoid of its own": (13, [after("HardSigmoid", alpha=0.2, beta=0.4)], {}),
    "LeakyRelu": (13, [after("LeakyRelu", alpha=0.2)], {}),
    "Elu": (13, [after("Elu", alpha=0.7)], {}),
    "Selu": (13, [after("Selu")], {}),
    "Softplus": (13, [after("Softplus")], {}),
    "Erf": (13, [after("Erf")], {}),
    "Pow": (13, [after("Pow", "two")], {"two": np.float32(2)}),
    "InstanceNormalization": (13, [after("InstanceNormalization", "s", "t")], {"s": floats(6), "t": floats(6)}),
    "BatchNormalization": (
        9,
        [after("BatchNormalization", "s", "t", "m", "v")],
        {"s": floats(6), "t": floats(6), "m": floats(6), "v": np.abs(floats(6)) + 1},
    ),
    "Dropout": (7, [after("Dropout", ratio=0.5)], {}),
    "SAME_UPPER": (13, [after("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")], {}),
    "SAME_LOWER": (13, [after("MaxPool", kernel_shape=[2, 2], strides=[1, 1], auto_pad="SAME_LOWER")], {}),
    "pooling on one side": (13, [after("MaxPool", kernel_shape=[3, 3], pads=[0, 0, 1, 2], strides=[2, 2])], {}),
    "dilated pooling": (13, [after("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])], {}),
    "rounded up": (13, [after("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}),
    "average": (13, [after("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}),
    "average with padding": (13, [after("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)], {}),
    "average on one side": (13, [after("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1])], {}),
    "ConvTranspose": (13, [after("ConvTranspose", "u", strides=[2, 2])], {"u": floats(6, 6, 2, 2)}),
    "grouped, on one side": (13, [after("Conv", "u", group=2, pads=[0, 0, 1, 1])], {"u": floats(6, 3, 2, 2)}),
    "global maximum": (
        13,
        [helper.make_node("GlobalMaxPool", ["c"], ["g"]), helper.make_node("Mul", ["c", "g"], ["features"])],
        {},
    ),
    "Upsample": (9, [after("Upsample", "scales", mode="nearest")], {"scales": np.array([1, 1, 2, 2], np.float32)}),
    "Resize of opset 10": (
        10,
        [after("Resize", "scales", mode="nearest")],
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "Resize": (
        11,
        [after("Resize", "region", "scales", mode="linear")],
        {"region": np.array([], np.float32), "scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "Pad by attributes": (7, [after("Pad", pads=[0, 0, 1, 0, 0, 0, 0, 2], value=1.5)], {}),
    "Pad by inputs": (
        13,
        [after("Pad", "pads", "v")],
        {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "v": np.float32(1)},
    ),
    "Pad by reflection": (13, [after("Pad", "pads", mode="reflect")], {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "Slice by attributes": (9, [after("Slice", axes=[2, 3], starts=[1, -5], ends=[7, 100])], {}),
    "Slice with steps": (
        13,
        [after("Slice", "s", "e", "a", "d")],
        {"s": np.array([0]), "e": np.array([8]), "a": np.array([3]), "d": np.array([2])},
    ),
    "Split and Concat": (
        11,
        [
            helper.make_node("Split", ["c"], ["one", "two"], axis=1, split=[2, 4]),
            helper.make_node("Concat", ["two", "one"], ["features"], axis=1),
        ],
        {},
    ),
    "Split in two": (
        13,
        [
            helper.make_node("Split", ["c"], ["one", "two"], axis=1),
            helper.make_node("Mul", ["two", "one"], ["half"]),
            helper.make_node("Concat", ["half", "one"], ["features"], axis=1),
        ],
        {},
    ),
    "squeeze and excite": (
        11,
        [
            helper.make_node("ReduceMean", ["c"], ["m"], axes=[2, 3], keepdims=0),
            helper.make_node("MatMul", ["m", "squeeze"], ["s"]),
            helper.make_node("Sigmoid", ["s"], ["g"]),
            helper.make_node("Unsqueeze", ["g"], ["g4"], axes=[2, 3]),
            helper.make_node("Mul", ["c", "g4"], ["features"]),
        ],
        {"squeeze": floats(6, 6)},
    ),
    "shapes are computed": (
        13,
        [
            helper.make_node("Shape", ["c"], ["shape"]),
            helper.make_node("Gather", ["shape", "first"], ["n"]),
            helper.make_node("Unsqueeze", ["n", "zero"], ["n1"]),
            helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
            helper.make_node("Reshape", ["c", "target"], ["r"]),
            helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3, 4]),
            helper.make_node("Reshape", ["t", "back"], ["features"]),
        ],
        {
            "first": np.int64(0),
            "zero": np.array([0]),
            "rest": np.array([2, 3, 8, 8]),
            "back": np.array([0, -1, 8, 8]),
        },
    ),
    "Gather of channels": (13, [after("Gather", "order", axis=1)], {"order": np.array([5, 0, 1, -2, 3, 2])}),
    "DepthToSpace and back": (
        13,
        [
            helper.make_node("SpaceToDepth", ["c"], ["d"], blocksize=2),
            helper.make_node("DepthToSpace", ["d"], ["e"], blocksize=2),
            helper.make_node("Add", ["c", "e"], ["features"]),
        ],
        {},
    ),
    "Where": (
        13,
        [
            helper.make_node("Greater", ["c", "zero"], ["positive"]),
            helper.make_node("Where", ["positive", "c", "zero"], ["features"]),
        ],
        {"zero": np.float32(0)},
    ),
    "Max and Sum of several": (
        13,
        [
            helper.make_node("Max", ["c", "half", "c"], ["m"]),
            helper.make_node("Sum", ["m", "c", "m"], ["features"]),
        ],
        {"half": np.array([0.5], np.float32)},
    ),
    "Softmax over the rest": (11, [after("Softmax", axis=1)], {}),
    "Softmax over an axis": (13, [after("Softmax", axis=1)], {}),
    "constants of nodes": (
        13,
        [
            helper.make_node("Constant", [], ["k"], value_float=0.5),
            helper.make_node("Mul", ["c", "k"], ["features"]),
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_do_what_they_do_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    opset, nodes, constants = CASES[name]
    check(model_of([CONV, *nodes], {**WEIGHTS, **constants}, opset), tmp_path / "net.onnx")


def test_a_fixed_batch_and_channels_last(tmp_path: Path) -> None:
    first = helper.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2])
    conv = helper.make_node("Conv", ["nchw", "w", "b"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2])
    reshape = helper.make_node("Reshape", ["c", "target"], ["features"])
    constants = {**WEIGHTS, "target": np.array([1, 6, 8, 2])}
    check(model_of([first, conv, reshape], constants, shape=(1, 8, 8, 3)), tmp_path / "net.onnx", batch=1)
    assert load_model(str(tmp_path / "net.onnx")).input_shape == (3, 8, 8)


def test_a_fixed_batch_in_sizes(tmp_path: Path) -> None:
    resize = after("Resize", "", "", "sizes", mode="linear", coordinate_transformation_mode="align_corners")
    model = model_of([CONV, resize], {**WEIGHTS, "sizes": np.array([2, 6, 12, 12])}, shape=(2, 3, 8, 8))
    check(model, tmp_path / "net.onnx", batch=2)


def test_an_open_size_is_asked_for(tmp_path: Path) -> None:
    model = model_of([CONV, after("Relu")], WEIGHTS, shape=("N", 3, "H", "W"))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="leaves the size of its images open; say it with --size"):
        load_model(str(tmp_path / "net.onnx"))
    network = load_model(str(tmp_path / "net.onnx"), preprocessing={"input_size": [3, 9, 7]})
    assert network.input_shape == (3, 9, 7)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of([CONV, after("NonMaxSuppression")], WEIGHTS), r"\(NonMaxSuppression\) is an operator that is not"),
        (
            model_of([helper.make_node("FancyConv", ["x", "w"], ["features"], domain="com.acme")], WEIGHTS),
            r"ONNX node .* \(com\.acme\.FancyConv\) is an operator that is not supported; export .* \.pt2 file",
        ),
    ],
)  # fmt: skip
def test_unsupported_operators_are_named(model: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "net.onnx"))


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    model = model_of([CONV, after("Add", "more")], WEIGHTS)
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ("N", 6, 8, 8)))
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"2 inputs \(x, more\); robustdice runs models of one image tensor"):
        load_model(str(path))
    model = model_of([CONV, after("Relu")], WEIGHTS)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    onnx.save(model, path)
    with pytest.raises(ModelError, match="takes INT32 inputs; robustdice gives it pixels as float32 or uint8"):
        load_model(str(path))


def odd(change: Callable[[onnx.ModelProto], None], constants: dict[str, Any] | None = None) -> onnx.ModelProto:
    model = model_of([CONV, after("Relu")], {**WEIGHTS, **(constants or {})})
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (odd(lambda m: m.graph.node[1].input.__setitem__(0, "nothing")), "reads 'nothing' before|Runtime cannot"),
        (odd(lambda m: m.graph.output[0].__setattr__("name", "w")), "does not depend on its input"),
        (odd(lambda m: m.graph.node[0].attribute[0].ints.append(3)), r"\(Conv\) cannot be run|Runtime cannot"),
        (odd(lambda _: None, {"w": floats(6, 3, 3, 3) * np.float32("nan")}), "not finite; look for NaN or infinity"),
        (odd(lambda m: m.graph.input[0].type.tensor_type.ClearField("shape")), "leaves the size of its images open"),
        (odd(lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 4)), "Runtime cannot"),
    ],
)  # fmt: skip
def test_odd_files_are_refused_with_a_reason(model: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "net.onnx"))


def test_a_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    onnx.save(model_of([CONV, after("Relu")], WEIGHTS, shape=("N", "C", "H", "W")), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot run .*net\.onnx"):
        load_model(str(tmp_path / "net.onnx"), preprocessing={"input_size": [1, 8, 8]})


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ModelError, match="there is no model file"):
        load_model(str(path))
    onnx.save(
        model_of([CONV, after("Relu")], WEIGHTS), path, save_as_external_data=True, size_threshold=0, location="w"
    )
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"net\.onnx|ONNX"):
            load_model(str(path))
    path.write_bytes(content)
    (tmp_path / "w").unlink()
    with pytest.raises(ModelError, match=r"is not an ONNX model, or not all of one \(a file of weights beside it"):
        load_model(str(path))


def test_onnx_is_not_needed_by_the_device_side() -> None:
    program = "import sys, robustdice as rd; rd.Client; assert 'onnx' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
