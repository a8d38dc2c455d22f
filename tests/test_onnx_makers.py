"""ONNX files as other makers write them: each gives ONNX Runtime's scores for the same file, or says the way out."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nets import random_plan, relative_error
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import ModelError
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.runtime.inprocess import run_bundles
from robustdice.runtime.sessions import open_session

Array = NDArray[Any]
RANDOM = np.random.default_rng(1)
IMAGES = RANDOM.random((4, 3, 8, 8), dtype=np.float32)


def floats(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """Inputs and outputs with spaces between them; ``-`` is an input that is left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(operator, names, outputs.split(), **attributes)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any],
    outputs: Sequence[str] = ("y",),
    opset: int = 13,
    shape: Sequence[Any] = ("N", 3, 8, 8),
    kind: int = TensorProto.FLOAT,
    others: Sequence[onnx.OperatorSetIdProto] = (),
) -> onnx.ModelProto:
    """Nodes from the image ``x`` to ``outputs``."""
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset), *others]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10 if opset > 20 else 8)


HEAD = [
    node("GlobalAveragePool", "features", "pooled"),
    node("Flatten", "pooled", "flat"),
    node("Gemm", "flat head offset", "y", transB=1),
]
CONV = node("Conv", "x w b", "c", pads=[1, 1, 1, 1])
RELU = node("Relu", "c", "features")
WEIGHTS = {"w": floats(6, 3, 3, 3), "b": floats(6), "head": floats(4, 6), "offset": floats(4)}


def scores_of_file(path: Path, images: Array, output: str = "y") -> Array:
    """What ONNX Runtime computes of a file."""
    session = open_session(path, threads=1)
    names = [value.name for value in session.get_outputs()]
    results = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(results[names.index(output)], np.float32)


def load(model: onnx.ModelProto, path: Path, **preprocessing: Any) -> Network:
    onnx.save(model, path)
    return load_model(str(path), preprocessing=preprocessing)


def scores(network: Network, images: Array = IMAGES) -> Array:
    with torch.no_grad():
        return network.run(torch.from_numpy(images)).numpy()


def test_a_constant_that_begins_with_the_batch_size_stays_a_constant(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "plain", pads=[1, 1, 1, 1]),
        node("Reshape", "b to", "b4"),
        node("Add", "plain b4", "c"),
        RELU,
        *HEAD,
    ]
    constants = {**WEIGHTS, "to": np.array([1, 6, 1, 1])}
    model = model_of(nodes, constants, shape=(1, 3, 8, 8))
    model.ir_version = 3  # in which weights are inputs
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    network = load(model, tmp_path / "net.onnx")
    expected = np.concatenate([scores_of_file(tmp_path / "net.onnx", image[None]) for image in IMAGES])
    assert relative_error(scores(network), expected) < 1e-4
    assert [layer.value.name for layer in network.layers][-1] == network.output.name


def computed(name: str, operator: str, inputs: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [node(operator, inputs, name, **attributes), CONV, RELU, *HEAD]


COMPUTED: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "ConstantOfShape": (
        computed("b", "ConstantOfShape", "n", value=numpy_helper.from_array(np.array([0.5], np.float32))),
        {"n": np.array([6])},
    ),
    "Transpose": (computed("w", "Transpose", "wt", perm=[3, 2, 0, 1]), {"wt": floats(3, 3, 3, 6)}),
    "Cast": (computed("w", "Cast", "w16", to=TensorProto.FLOAT), {"w16": floats(6, 3, 3, 3).astype(np.float16)}),
    "Reshape": (computed("w", "Reshape", "flat_w to"), {"flat_w": floats(162), "to": np.array([6, 3, 3, 3])}),
    "Concat": (computed("w", "Concat", "w1 w2", axis=0), {"w1": floats(2, 3, 3, 3), "w2": floats(4, 3, 3, 3)}),
    "Mul": (computed("w", "Mul", "w0 scale"), {"w0": floats(6, 3, 3, 3), "scale": floats(6, 1, 1, 1)}),
    "Unsqueeze": (computed("w", "Unsqueeze", "w3 axes"), {"w3": floats(6, 3, 3), "axes": np.array([3])}),
    "DequantizeLinear": (
        computed("w", "DequantizeLinear", "w8 ws wz", axis=0),
        {
            "w8": RANDOM.integers(-128, 127, (6, 3, 3, 3), dtype=np.int8),
            "ws": np.abs(floats(6)) / 100,
            "wz": np.zeros(6, np.int8),
        },
    ),
    "DequantizeLinear of four bits": (
        computed("w", "DequantizeLinear", "w4 ws", axis=0),
        {
            "w4": helper.make_tensor("w4", TensorProto.INT4, [6, 3, 3, 3], RANDOM.integers(-8, 7, 162)),
            "ws": np.abs(floats(6)),
        },
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed_from_constants_are_constants(name: str, tmp_path: Path) -> None:
    nodes, constants = COMPUTED[name]
    kept = {key: value for key, value in WEIGHTS.items() if key not in nodes[0].output}
    shape = ("N", 3, 8, 8)
    if name == "Unsqueeze":
        nodes = [nodes[0], node("Conv", "x w b", "c", pads=[1, 1, 0, 0]), *nodes[2:]]
    model = model_of(nodes, {**kept, **constants}, opset=21 if "four" in name else 13, shape=shape)
    network = load(model, tmp_path / "net.onnx")
    assert relative_error(scores(network), scores_of_file(tmp_path / "net.onnx", IMAGES)) < 1e-4
    assert [(layer.layer.neurons, layer.fill) for layer in network.layers] == [(6, 0.0), (4, float("-inf"))]


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64)])
def test_other_precisions_are_read_as_float32(kind: int, dtype: Any, tmp_path: Path) -> None:
    constants: dict[str, Any] = {name: value.astype(dtype) for name, value in WEIGHTS.items()}
    network = load(model_of([CONV, RELU, *HEAD], constants, kind=kind), tmp_path / "net.onnx")
    if dtype is np.float16:
        assert relative_error(scores(network), scores_of_file(tmp_path / "net.onnx", IMAGES.astype(dtype))) < 1e-2
    else:  # ONNX Runtime has no convolution of doubles
        onnx.save(model_of([CONV, RELU, *HEAD], WEIGHTS), tmp_path / "single.onnx")
        assert relative_error(scores(network), scores_of_file(tmp_path / "single.onnx", IMAGES)) < 1e-5


def of_uint8(scale: float, zero: int) -> dict[str, Any]:
    return {"scale": np.float32(scale), "zero": np.uint8(zero)}


QDQ = [
    node("DequantizeLinear", "w8 ws wz", "w", axis=0),
    node("QuantizeLinear", "x xs xz", "xq"),
    node("DequantizeLinear", "xq xs xz", "xd"),
    node("Conv", "xd w b", "c", pads=[1, 1, 1, 1]),
    node("QuantizeLinear", "c cs cz", "cq"),  # which is the ReLU too: codes begin at zero
    node("MaxPool", "cq", "mq", kernel_shape=[2, 2], strides=[2, 2]),
    node("DequantizeLinear", "mq cs cz", "features"),
    *HEAD,
]
OPERATORS = [
    node("QuantizeLinear", "x xs xz", "xq"),
    node("QLinearConv", "xq xs xz w8 ws wz cs cz b32", "cq", pads=[1, 1, 1, 1]),
    node("DequantizeLinear", "cq cs cz", "pooling"),
    node("GlobalAveragePool", "pooling", "p4"),
    node("Flatten", "p4", "p"),
    node("QuantizeLinear", "p cs cz", "pq"),
    node("QLinearMatMul", "pq cs cz h8 hs hz ys yz", "yq"),
    node("DequantizeLinear", "yq ys yz", "y"),
]
DYNAMIC = [
    node("DynamicQuantizeLinear", "x", "xq xs xz"),
    node("ConvInteger", "xq w8 xz", "ci", pads=[1, 1, 1, 1]),
    node("Cast", "ci", "cf", to=TensorProto.FLOAT),
    node("Mul", "xs ws1", "both"),
    node("Mul", "cf both", "plain"),
    node("Add", "plain b4", "biased"),
    node("Relu", "biased", "features"),
    node("GlobalAveragePool", "features", "p4"),
    node("Flatten", "p4", "p"),
    node("DynamicQuantizeLinear", "p", "pq ps pz"),
    node("MatMulInteger", "pq h8 pz hz", "mi"),
    node("Cast", "mi", "mf", to=TensorProto.FLOAT),
    node("Mul", "ps hs", "both2"),
    node("Mul", "mf both2", "y"),
]
# Weights of seven bits: without VNNI instructions ONNX Runtime's sums of products of eight bits overflow.
CODES = {
    "w8": RANDOM.integers(-64, 64, (6, 3, 3, 3), dtype=np.int8),
    "ws": np.full(6, 0.02, np.float32),
    "wz": np.zeros(6, np.int8),
    "ws1": np.float32(0.02),
    "b": floats(6),
    "b4": floats(6).reshape(1, 6, 1, 1),
    "b32": RANDOM.integers(-3000, 3000, 6, dtype=np.int32),
    "xs": np.float32(1 / 255),
    "xz": np.uint8(0),
    "cs": np.float32(0.03),
    "cz": np.uint8(0),
    "h8": RANDOM.integers(-64, 64, (6, 4), dtype=np.int8),
    "hs": np.float32(0.04),
    "hz": np.int8(0),
    "ys": np.float32(0.05),
    "yz": np.uint8(128),
    "head": floats(4, 6),
    "offset": floats(4),
}


@pytest.mark.parametrize("nodes", [QDQ, OPERATORS, DYNAMIC], ids=["pairs", "operators", "dynamic"])
def test_quantised_activations_are_real_numbers_within_their_range(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    used = {name for each in nodes for name in each.input}
    computed_here = {name for each in nodes for name in each.output}
    constants = {name: value for name, value in CODES.items() if name in used - computed_here}
    network = load(model_of(nodes, constants), tmp_path / "net.onnx")
    found, expected = scores(network), scores_of_file(tmp_path / "net.onnx", IMAGES)
    assert relative_error(found, expected) < 0.05
    plan = random_plan(network, 3)
    bundles = [load_bundle(directory) for directory in write_bundles(network, plan, tmp_path / "build")]
    assert relative_error(run_bundles(bundles, IMAGES), found) < 1e-4
    assert [layer.layer.neurons for layer in network.layers] == [6, 4]


def test_an_image_of_bytes_is_given_as_pixels(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "x", "xf", to=TensorProto.FLOAT),
        node("Sub", "xf mean", "xc"),
        node("Mul", "xc by", "xn"),
        node("Transpose", "xn", "nchw", perm=[0, 3, 1, 2]),
        node("Conv", "nchw w b", "c", pads=[1, 1, 1, 1]),
        RELU,
        *HEAD,
    ]
    constants = {**WEIGHTS, "mean": np.array([120, 110, 100], np.float32), "by": np.float32(1 / 58)}
    model = model_of(nodes, constants, shape=(1, 8, 8, 3), kind=TensorProto.UINT8)
    network = load(model, tmp_path / "net.onnx")
    pixels = RANDOM.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    expected = np.concatenate([scores_of_file(tmp_path / "net.onnx", image[None]) for image in pixels])
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    assert network.input_shape == (3, 8, 8)
    assert relative_error(scores(network, np.ascontiguousarray(images)), expected) < 1e-4


BACKWARDS = [
    node("Slice", "x s e a d", "bgr"),
    node("Conv", "bgr w b", "c", pads=[1, 1, 1, 1]),
    RELU,
    *HEAD,
]


@pytest.mark.parametrize(("start", "end", "step", "axis"), [(-1, -10, -1, 1), (6, 0, -2, 3), (2, -(2**63), -1, 1)])
def test_slices_may_go_backwards(start: int, end: int, step: int, axis: int, tmp_path: Path) -> None:
    places = {"s": np.array([start]), "e": np.array([end]), "a": np.array([axis]), "d": np.array([step])}
    network = load(model_of(BACKWARDS, {**WEIGHTS, **places}), tmp_path / "net.onnx")
    assert relative_error(scores(network), scores_of_file(tmp_path / "net.onnx", IMAGES)) < 1e-4


OUTPUTS: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "the largest of them": ([node("ArgMax", "y", "label", axis=1)], ["label", "y"]),
    "their probabilities": ([node("Softmax", "y", "p", axis=1)], ["y", "p"]),
    "a map and features": ([], ["features", "flat", "y"]),
    "the best of them": ([node("TopK", "y k", "values places", axis=1)], ["y", "values", "places"]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_of_several_outputs_the_scores_are_found(name: str, tmp_path: Path) -> None:
    more, outputs = OUTPUTS[name]
    constants = {**WEIGHTS, **({"k": np.array([2])} if "best" in name else {})}
    network = load(model_of([CONV, RELU, *HEAD, *more], constants, outputs), tmp_path / "net.onnx")
    assert relative_error(scores(network), scores_of_file(tmp_path / "net.onnx", IMAGES)) < 1e-4
    assert network.layers[-1].fill == float("-inf")


def test_a_batch_of_minus_one_is_any_and_inputs_that_nothing_reads_are_none(tmp_path: Path) -> None:
    model = model_of([CONV, RELU, *HEAD], WEIGHTS, shape=(-1, 3, 8, 8))
    onnx.save(model, tmp_path / "same.onnx")
    model.graph.input.append(helper.make_tensor_value_info("im_info", TensorProto.FLOAT, (1, 3)))
    network = load(model, tmp_path / "net.onnx")
    assert network.input_shape == (3, 8, 8)
    assert relative_error(scores(network), scores_of_file(tmp_path / "same.onnx", IMAGES)) < 1e-4


def test_two_sets_of_scores_are_refused_with_lines_that_choose_one(tmp_path: Path) -> None:
    other = node("Gemm", "flat head2 offset", "z", transB=1)
    model = model_of([CONV, RELU, *HEAD, other], {**WEIGHTS, "head2": floats(4, 6) * 2}, ["z", "y"])
    with pytest.raises(ModelError, match=r"2 outputs \(z, y\).*one score per class") as error:
        load(model, tmp_path / "net.onnx")
    line = next(part for part in str(error.value).split(": ") if part.startswith("onnx.utils")).split(" keeps")[0]
    line = line.replace("FILE.onnx", str(tmp_path / "net.onnx")).replace("scores.onnx", str(tmp_path / "scores.onnx"))
    for value in model.graph.output:  # which the extraction wants to know
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, ("N", 4)))
    onnx.save(model, tmp_path / "net.onnx")
    exec(line, {"onnx": onnx})  # noqa: S102 -- that the advice works is what is tested
    network = load_model(str(tmp_path / "scores.onnx"))
    assert relative_error(scores(network), scores_of_file(tmp_path / "net.onnx", IMAGES, "z")) < 1e-4


def test_operators_of_early_opsets_are_brought_up_to_date(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "plain", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        node("Add", "plain b", "c", broadcast=1, axis=1),
        node("BatchNormalization", "c s t m v", "n", is_test=1),
        node("Dropout", "n", "features", is_test=1),
        node("GlobalAveragePool", "features", "pooled"),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat head offset", "y", transB=1, broadcast=1),
    ]
    norm = {"s": floats(6), "t": floats(6), "m": floats(6), "v": np.abs(floats(6)) + 1}
    model = model_of(nodes, {**WEIGHTS, **norm}, opset=6, shape=(1, 3, 8, 8))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4)))
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = 3
    network = load(model, tmp_path / "net.onnx")
    images, weights = torch.from_numpy(IMAGES), {k: torch.from_numpy(v) for k, v in {**WEIGHTS, **norm}.items()}
    x = torch.nn.functional.conv2d(images, weights["w"], weights["b"], padding=1)
    x = torch.nn.functional.batch_norm(x, weights["m"], weights["v"], weights["s"], weights["t"])
    expected = torch.nn.functional.linear(x.mean((2, 3)), weights["head"], weights["offset"]).numpy()
    assert relative_error(scores(network), expected) < 1e-4


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        ({"names": "{0: 'cat', 1: 'dog', 2: \"o'hare\", 3: 'fox'}"}, ["cat", "dog", "o'hare", "fox"]),
        ({"classes": json.dumps(["cat", "dog", "hare", "fox"])}, ["cat", "dog", "hare", "fox"]),
        ({"labels": "cat\ndog\nhare\nfox\n"}, ["cat", "dog", "hare", "fox"]),
        ({"class_names": "crane,dog,crane,fox"}, ["crane (0)", "dog", "crane (2)", "fox"]),
        ({"names": "{0: 'cat'}"}, None),
        ({"names": "__import__('os').abort()"}, None),
        ({"names": "{" * 10_000}, None),
    ],
)
def test_names_in_the_metadata_are_the_classes(
    texts: dict[str, str], classes: list[str] | None, tmp_path: Path
) -> None:
    model = model_of([CONV, RELU, *HEAD], WEIGHTS)
    helper.set_model_props(model, texts)
    assert load(model, tmp_path / "net.onnx").preprocessing.get("classes") == classes


def test_size_and_normalisation_in_the_metadata_are_taken_and_may_be_overridden(tmp_path: Path) -> None:
    model = model_of([CONV, RELU, *HEAD], WEIGHTS, shape=("N", 3, "H", "W"))
    texts = {"imgsz": "[12, 10]", "mean": "[123.675, 116.28, 103.53]", "std": "[58.395, 57.12, 57.375]"}
    helper.set_model_props(model, texts)
    network = load(model, tmp_path / "net.onnx")
    assert network.input_shape == (3, 12, 10)
    np.testing.assert_allclose(network.preprocessing["mean"], [0.485, 0.456, 0.406], rtol=1e-3)
    np.testing.assert_allclose(network.preprocessing["std"], [0.229, 0.224, 0.225], rtol=1e-3)
    other = load(model, tmp_path / "net.onnx", input_size=[3, 9, 9], mean=[0, 0, 0])
    assert (other.input_shape, other.preprocessing["mean"]) == ((3, 9, 9), [0.0, 0.0, 0.0])


SHAPED: dict[str, tuple[Callable[[], onnx.NodeProto], str]] = {
    "softmax over channels": (lambda: node("Softmax", "map", "y", axis=1), "softmax"),
    "sigmoid": (lambda: node("Sigmoid", "map", "y"), "sigmoid"),
    "nothing": (lambda: node("Identity", "map", "y"), "softmax"),
}


@pytest.mark.parametrize("name", SHAPED)
def test_a_map_of_one_pixel_is_scores(name: str, tmp_path: Path) -> None:
    end, activation = SHAPED[name]
    nodes = [CONV, node("Conv", "c head4", "all"), node("GlobalAveragePool", "all", "map"), end()]
    constants = {"w": WEIGHTS["w"], "b": WEIGHTS["b"], "head4": floats(4, 6).reshape(4, 6, 1, 1)}
    network = load(model_of(nodes, constants), tmp_path / "net.onnx")
    expected = torch.from_numpy(scores_of_file(tmp_path / "net.onnx", IMAGES).reshape(4, 4))
    found = torch.from_numpy(scores(network))
    shown = {"softmax over channels": found.softmax(1), "sigmoid": found.sigmoid(), "nothing": found}[name]
    torch.testing.assert_close(shown, expected)
    assert (network.outputs, network.activation) == (4, activation)
