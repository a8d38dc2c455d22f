"""A tiny real network as bundles, written with ``onnx`` by hand: independent of the workshop's exporter.

conv 1->8 + relu + pool | conv 8->12 + relu + flatten | (every device: times two) linear 192->10 = class scores
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from robustdice.bundle.manifest import Exchange, FileEntry, Manifest, Stage
from robustdice.bundle.parts import Part, Piece
from robustdice.bundle.read import Bundle, load_bundle
from robustdice.plan import Holder, Layer, ModelReference, Plan, Shard, Strips

Floats = NDArray[np.float32]
NEURONS = (8, 12, 10)
INPUT_SHAPE = (1, 8, 8)


def make_plan(
    devices: int,
    holders: int = 2,
    interleaved: bool = False,
    parity: bool = False,
    wire: str = "float32",
    pair: bool = False,
    owned: bool = False,
    rows: bool = False,
    whole: bool = False,
) -> Plan:
    """Every neuron on ``holders`` devices; a shard per primary, with neighbouring or interleaved neurons.

    With ``parity`` the last device holds the sums of the others' shards, which have one holder each. As a ``pair``,
    conv1 and conv2 hand over sums; of conv1, neurons have 1 to ``holders`` holders, in all kinds of orders;
    if they are ``owned``, to owners of slices. With ``rows`` conv1 is computed in strips, of up to 4 devices; with
    ``whole`` every device computes all of conv2. Of those two there are manifests only, no models.
    """
    if rows or whole:
        plan = make_plan(devices, holders, interleaved, wire=wire)
        everyone = tuple(map(Holder, range(devices)))
        shards = [
            (Shard(tuple(range(layer.neurons)), everyone),) if chosen else dealt
            for layer, dealt, chosen in zip(plan.layers, plan.shards, (rows, whole, False), strict=True)
        ]
        bounds = tuple(4 * d // devices for d in range(devices + 1))
        strips = Strips((0,), bounds, (8,), ((8 // devices,) * devices,), 8 * 16)
        return replace(plan, shards=tuple(shards), strips=(strips,) if rows else ())
    if pair:
        plan = make_plan(devices, holders)
        conv1, conv2, fc = plan.layers
        every = list(permutations(range(devices), holders))
        orders = [every[n * len(every) // conv1.neurons][: 1 + n % holders] for n in range(conv1.neurons)]
        first = tuple(Shard((n,), tuple(map(Holder, order))) for n, order in enumerate(orders))
        everywhere = (Shard(tuple(range(conv2.neurons)), tuple(map(Holder, range(devices)))),)
        layers = (conv1, replace(conv2, filter_weights=72), fc)
        return replace(
            plan,
            layers=layers,
            shards=(first, everywhere, plan.shards[2]),
            pairs={0: 1},
            owned=frozenset({0} if owned else ()),
            wire=wire,
        )
    layers = (
        Layer("conv1", 8, 1, 10, 640, 16),
        Layer("conv2", 12, 1, 73, 1152, 16),
        Layer("fc", 10, 1, 193, 192, 1, gives_scores=True),
    )
    return Plan(
        devices=devices,
        layers=layers,
        shards=tuple(
            _with_parity(_shards(layer.neurons, devices - 1, 1, interleaved), devices - 1)
            if parity
            else _shards(layer.neurons, devices, holders, interleaved)
            for layer in layers
        ),
        shared_weights=0,
        method="test",
        model=ModelReference("test", "0" * 64),
        wire=wire,
    )


def _with_parity(shards: tuple[Shard, ...], device: int) -> tuple[Shard, ...]:
    return (*shards, Shard((), (Holder(device),), parity_of=tuple(range(len(shards)))))


def _shards(neurons: int, devices: int, holders: int, interleaved: bool) -> tuple[Shard, ...]:
    numbers = np.arange(neurons)
    dealt = [numbers[d::devices] if interleaved else np.array_split(numbers, devices)[d] for d in range(devices)]
    return tuple(
        Shard(
            tuple(int(n) for n in mine),
            tuple(Holder((device + k) % devices) for k in range(holders)),
        )
        for device, mine in enumerate(dealt)
        if len(mine)
    )


def make_manifest(plan: Plan, device: int, spares: str = "standby") -> Manifest:
    """The manifest of ``device``, without files."""
    values = ("a", "b", "scores")
    shapes = ((8, 4, 4), (12 * 16,), (10,))
    features = (1, 16, 1)
    of_layers = [plan.exchanged_shards(index) for index in range(len(plan.layers))]
    exchanges = tuple(
        Exchange(layer.name, value, shape, 1, width, -np.inf if value == "scores" else 0.0, None, shards, wire)
        for layer, value, shape, width, shards, wire in zip(
            plan.layers, values, shapes, features, of_layers, plan.wires, strict=True
        )
    )
    if plan.pairs:  # what would be conv2's exchange has sums, one for each piece, and there is none of conv1
        sums = replace(exchanges[1], shards=of_layers[0], sums=True, features=1, wire=exchanges[0].wire)
        exchanges = (sums, exchanges[2])
    if plan.owned:
        shards, slices = plan.exchanged_shards(0), tuple(each.neurons for each in plan.slices(0))
        handed = replace(exchanges[0], value="sums", shape=(12, 4, 4), shards=shards, slices=slices, owners=1)
        owners = Exchange("conv2", "b", shapes[1], 1, 16, 0.0, None, plan.slices(0), plan.wires[1])
        exchanges = (handed, owners, exchanges[1])
    if plan.strips:
        exchanges = (replace(exchanges[0], axis=2), *exchanges[1:])
    if not plan.pairs and len(plan.shards[1]) == 1:
        exchanges = (exchanges[0], exchanges[2])
    inputs = (("x",), ("sums",) if plan.owned else ("a",), ("b2",))
    stages = [
        Stage(
            local=(Part("local.onnx", ("b",), ("b2",)),) if number == 2 else (),
            exchanges=(number,),
            pieces=tuple(
                Piece(f"stage{number}-piece{k}.onnx", inputs[number], (f"y{number}",), tuple((number, s) for s in mine))
                for k, mine in enumerate(
                    [[*range(len(exchange.shards))]]
                    if plan.owned and number == 1
                    else _pieces(exchange.shards, device, spares, max(1, len(exchange.slices)))
                )
            ),
            keep=(),
        )
        for number, exchange in enumerate(exchanges)
    ]
    return Manifest(
        device=device,
        devices=plan.devices,
        plan_digest=plan.digest,
        spares=spares,
        input="x",
        input_shape=INPUT_SHAPE,
        output="scores",
        outputs=10,
        classes=tuple(f"class{k}" for k in range(10)),
        preprocessing={"mean": [0.0]},
        exchanges=exchanges,
        stages=(*stages, Stage((), (), (), ())),
        files={},
        weight_bytes=plan.bytes_per_device[device],
        certificate=plan.certificate,
    )


def make_whole_manifest(plan_digest: str, device: int, devices: int, spares: str = "standby") -> Manifest:
    """A manifest without any exchange: each device holds the whole network (frame-parallel)."""
    stage = Stage((Part("whole.onnx", ("x",), ("scores",)),), (), (), ())
    return Manifest(device, devices, plan_digest, spares, "x", INPUT_SHAPE, "scores", 10, (), {}, (), (stage,), {}, 0)


def _pieces(shards: Sequence[Shard], device: int, spares: str, slices: int) -> list[list[int]]:
    held = [number for number, shard in enumerate(shards) if device in shard.devices]
    if any(shard.after for shard in shards) or slices > 1:
        return [held[n : n + slices] for n in range(0, len(held), slices)]
    if spares == "hot":
        return [held] if held else []
    primary = [number for number in held if shards[number].devices[0] == device]
    return [piece for piece in (primary, *([n] for n in held if n not in primary)) if piece]


class Network:
    """The weights, and what they compute: the reference that bundles are held against."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)

        def draw(*shape: int) -> Floats:
            return np.asarray(random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])), np.float32)

        self.weights = (draw(8, 1, 3, 3), draw(12, 8, 3, 3), draw(10, 192))
        self.biases = tuple(random.standard_normal(n).astype(np.float32) * 0.1 for n in NEURONS)

    def run(self, frames: Floats, present: Sequence[NDArray[np.bool_]] | None = None) -> Floats:
        """Class scores [N, 10]; ``present`` says per layer which neurons are there."""
        a, b, c = present or [np.ones(n, bool) for n in NEURONS]
        x = np.maximum(_convolve(frames, self.weights[0], self.biases[0]), 0)
        x = x.reshape(len(x), 8, 4, 2, 4, 2).max((3, 5)) * a[None, :, None, None]
        x = np.maximum(_convolve(x, self.weights[1], self.biases[1]), 0) * b[None, :, None, None]
        scores = 2 * x.reshape(len(x), -1) @ self.weights[2].T + self.biases[2]
        return np.where(c, scores, -np.inf).astype(np.float32)

    def part(self, layer: int, neurons: Sequence[int]) -> bytes:
        """The ONNX model that computes some neurons of one layer."""
        rows = list(neurons)
        weight, bias = self.weights[layer][rows], self.biases[layer][rows]
        source, result = ("x", "a", "b2")[layer], f"y{layer}"
        tensors = {"w": weight, "c": bias}
        if layer == 2:
            nodes = [helper.make_node("Gemm", [source, "w", "c"], [result], transB=1)]
            return _model(nodes, tensors, {source: (192,)}, {result: (len(rows),)})
        nodes = [
            helper.make_node("Conv", [source, "w", "c"], ["z"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["z"], ["r" if layer else "q"]),
        ]
        if layer == 0:
            nodes.append(helper.make_node("MaxPool", ["q"], [result], kernel_shape=[2, 2], strides=[2, 2]))
            return _model(nodes, tensors, {source: INPUT_SHAPE}, {result: (len(rows), 4, 4)})
        nodes.append(helper.make_node("Flatten", ["r"], [result]))
        return _model(nodes, tensors, {source: (8, 4, 4)}, {result: (len(rows) * 16,)})

    def local(self) -> bytes:
        """The part that every device computes: b2 = 2 b."""
        nodes = [helper.make_node("Mul", ["b", "two"], ["b2"])]
        return _model(nodes, {"two": np.array([2], np.float32)}, {"b": (192,)}, {"b2": (192,)})

    def whole(self) -> bytes:
        """The unpartitioned network."""
        tensors = {f"w{k}": w for k, w in enumerate(self.weights)} | {f"c{k}": c for k, c in enumerate(self.biases)}
        nodes = [
            helper.make_node("Conv", ["x", "w0", "c0"], ["z0"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["z0"], ["r0"]),
            helper.make_node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Conv", ["p0", "w1", "c1"], ["z1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["z1"], ["r1"]),
            helper.make_node("Flatten", ["r1"], ["f1"]),
            helper.make_node("Mul", ["f1", "two"], ["f2"]),
            helper.make_node("Gemm", ["f2", "w2", "c2"], ["scores"], transB=1),
        ]
        tensors["two"] = np.array([2], np.float32)
        return _model(nodes, tensors, {"x": INPUT_SHAPE}, {"scores": (10,)})


def write_bundles(directory: Path, plan: Plan, network: Network, spares: str = "standby") -> list[Bundle]:
    """Write DIR/device-K for every device of ``plan`` and read them back."""
    for device in range(plan.devices):
        manifest = make_manifest(plan, device, spares)
        contents = {"local.onnx": network.local()}
        for number, stage in enumerate(manifest.stages):
            for piece in stage.pieces:
                neurons = [n for e, s in piece.shards for n in manifest.exchanges[e].shards[s].neurons]
                contents[piece.file] = network.part(number, neurons)
        _write(directory / f"device-{device}", manifest, contents)
    return [load_bundle(directory / f"device-{device}") for device in range(plan.devices)]


def write_whole_bundles(directory: Path, network: Network, devices: int, spares: str = "standby") -> list[Bundle]:
    """Bundles of a plan without any exchange."""
    for device in range(devices):
        manifest = make_whole_manifest("f" * 64, device, devices, spares)
        _write(directory / f"device-{device}", manifest, {"whole.onnx": network.whole()})
    return [load_bundle(directory / f"device-{device}") for device in range(devices)]


def _write(directory: Path, manifest: Manifest, contents: dict[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
    document = Manifest(**{**vars(manifest), "files": files}).to_json()
    for name, data in {**contents, "manifest.json": document}.items():
        (directory / name).write_bytes(data)


def _convolve(x: Floats, weight: Floats, bias: Floats) -> Floats:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    result: Floats = np.einsum("ncyxij,ocij->noyx", windows, weight, dtype=np.float32) + bias[None, :, None, None]
    return result


def _model(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Floats],
    inputs: dict[str, tuple[int, ...]],
    outputs: dict[str, tuple[int, ...]],
) -> bytes:
    def info(named: dict[str, tuple[int, ...]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]) for name, shape in named.items()]

    constants = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "part", info(inputs), info(outputs), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
