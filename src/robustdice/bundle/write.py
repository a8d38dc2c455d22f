"""Network and plan -> one directory per device, with only that device's weights."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robustdice.bundle.manifest import (
    MANIFEST_NAME,
    Exchange,
    FileEntry,
    Local,
    Manifest,
    Piece,
    Stage,
)
from robustdice.bundle.onnx_graph import (
    Cut,
    OnnxGraph,
    cut,
    cut_layer,
    cut_parity,
    export_onnx,
    make_model,
    mask_name,
    with_mask,
)
from robustdice.bundle.stages import StageGraph, split_into_stages
from robustdice.errors import OutputError, PlanError
from robustdice.model.canonical import arguments
from robustdice.model.network import Network, NetworkLayer, check_plan_fits
from robustdice.plan import Plan, Shard

SPARES = ("standby", "hot")
_BESIDE_BUNDLES = {"plan.json", "cluster.toml", "client.key"}
_IN_BUNDLES = {MANIFEST_NAME, "secret.key"}
PLAN_NAME = "plan.json"
"""The plan that a build was made from, kept beside the bundles for whoever verifies them."""


@dataclass(frozen=True)
class _Model:
    """An ONNX file to be written, and the bytes of the network's parameters in it."""

    content: bytes
    weight_bytes: int


def write_bundles(
    network: Network,
    plan: Plan,
    directory: Path,
    spares: str = "standby",
    graph: OnnxGraph | None = None,
    add: Callable[[Path], object] = lambda _: None,
) -> list[Path]:
    """Write ``directory/device-0 ...``; returns the bundles' directories.

    ``graph`` is the network's :func:`export_onnx`, for whoever builds several plans of it. ``add`` is given
    the directory where the bundles wait to take their places, and adds to them what else they need (the keys). A build
    that is there already is replaced once the new one is complete. PlanError when the plan is not of this network;
    OutputError when the directory holds something else, or cannot be written.
    """
    if spares not in SPARES:
        raise PlanError(f"spares are {' or '.join(SPARES)}, not {spares!r}")
    check_plan_fits(network, plan)
    check_replaceable(directory)
    exchanged = {
        index: layer.without_tail if plan.exchanged_before_tail(index) else layer
        for index, layer in enumerate(network.layers)
        if not plan.held_by_all(index)
    }
    stages = split_into_stages(network, exchanged)
    graph = graph or export_onnx(network)
    masked = [layer for index, layer in enumerate(network.layers) if _mask(network, exchanged, index)]
    for layer in masked:
        graph = with_mask(graph, layer)
    locals_ = [_local_model(graph, stage, number, masked) for number, stage in enumerate(stages)]
    names = [f"device-{device}" for device in range(plan.devices)]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
            for device, name in enumerate(names):
                target = Path(temporary) / name
                target.mkdir()
                _write_device(network, plan, graph, stages, locals_, exchanged, device, spares, target)
            add(Path(temporary))
            directory.mkdir(exist_ok=True)
            for old in directory.glob("device-*"):
                shutil.rmtree(old)
            plan.save(directory / PLAN_NAME)
            for name in names:
                shutil.move(Path(temporary) / name, directory / name)
    except OSError as error:
        raise OutputError(
            f"cannot write the bundles to {directory}: {error.strerror}; choose another place with -o"
        ) from None
    return [directory / name for name in names]


def check_replaceable(directory: Path) -> None:
    """OutputError unless a build may be written to ``directory``: it is absent, empty, or a build."""
    try:
        if not directory.exists():
            return
        if not directory.is_dir():
            raise OutputError(f"{directory} is a file; choose a directory with -o")
        foreign = sorted(path.name for path in directory.iterdir() if not _is_of_a_build(path))
    except OSError as error:
        raise OutputError(f"cannot read {directory}: {error.strerror}; choose another place with -o") from None
    if foreign:
        raise OutputError(f"{directory} holds other things ({foreign[0]}); choose an empty directory with -o")


def _is_of_a_build(path: Path) -> bool:
    if not re.fullmatch(r"device-\d+", path.name):
        return path.name in _BESIDE_BUNDLES and path.is_file()
    if path.is_symlink() or not path.is_dir():
        return False
    return all(file.name in _IN_BUNDLES or file.suffix == ".onnx" for file in path.iterdir())


def _mask(network: Network, exchanged: Mapping[int, NetworkLayer], index: int) -> str | None:
    """The name of an exchange's mask: it needs one when a tail follows it."""
    layer = network.layers[index]
    return mask_name(layer) if index in exchanged and exchanged[index].value is not layer.value else None


def _local_model(
    graph: OnnxGraph, stage: StageGraph, number: int, masked: Sequence[NetworkLayer]
) -> tuple[Local, _Model] | None:
    if not stage.local_outputs:
        return None
    outputs = tuple(node.name for node in stage.local_outputs)
    masks = [mask_name(layer) for layer in masked if layer.node in stage.local_inputs]
    inputs = (*(node.name for node in stage.local_inputs), *masks)
    part = cut(graph, inputs, outputs)
    content = make_model([part], inputs, outputs, graph.opset, graph.types)
    return Local(f"stage-{number:03d}-local.onnx", inputs, outputs), _Model(content, part.weight_bytes)


def _write_device(
    network: Network,
    plan: Plan,
    graph: OnnxGraph,
    stages: Sequence[StageGraph],
    locals_: Sequence[tuple[Local, _Model] | None],
    exchanged: Mapping[int, NetworkLayer],
    device: int,
    spares: str,
    target: Path,
) -> None:
    files: dict[str, FileEntry] = {}
    weight_bytes = 0

    def write(name: str, model: _Model) -> None:
        nonlocal weight_bytes
        (target / name).write_bytes(model.content)
        files[name] = FileEntry(len(model.content), hashlib.sha256(model.content).hexdigest())
        weight_bytes += model.weight_bytes

    manifest_stages = []
    for number, (stage, local) in enumerate(zip(stages, locals_, strict=True)):
        if local is not None:
            write(local[0].file, local[1])
        pieces = []
        for count, shards in enumerate(_piece_shards(plan, stage.layers, device, spares)):
            piece, model = _piece(plan, graph, exchanged, shards, f"stage-{number:03d}-piece-{count}.onnx")
            write(piece.file, model)
            pieces.append(piece)
        manifest_stages.append(
            Stage(
                local=None if local is None else local[0],
                exchanges=tuple(list(exchanged).index(layer) for layer in stage.layers),
                pieces=tuple(pieces),
                keep=tuple(node.name for node in stage.keep),
            )
        )
    promised = plan.bytes_per_device[device]
    if weight_bytes != promised:
        raise PlanError(
            f"device {device} would hold {weight_bytes} bytes of weights, the plan promises {promised}; "
            "please report this model"
        )
    manifest = Manifest(
        device=device,
        devices=plan.devices,
        plan_digest=plan.digest,
        spares=spares,
        input=network.input.name,
        input_shape=network.input_shape,
        output=network.output.name,
        outputs=network.outputs,
        classes=tuple(plan.model.preprocessing.get("classes", ())),
        preprocessing={key: value for key, value in plan.model.preprocessing.items() if key != "classes"},
        exchanges=tuple(
            _exchange(layer, _mask(network, exchanged, index), plan.shards[index]) for index, layer in exchanged.items()
        ),
        stages=tuple(manifest_stages),
        files=files,
        weight_bytes=weight_bytes,
    )
    (target / MANIFEST_NAME).write_bytes(manifest.to_json())


def _exchange(layer: NetworkLayer, mask: str | None, shards: tuple[Shard, ...]) -> Exchange:
    return Exchange(
        layer=layer.layer.name,
        value=layer.value.name,
        shape=layer.shape,
        axis=layer.axis,
        features=layer.features,
        fill=layer.fill,
        mask=mask,
        shards=shards,
    )


def _piece_shards(plan: Plan, layers: Sequence[int], device: int, spares: str) -> list[list[tuple[int, int]]]:
    """The (layer, shard) pairs that a device holds in a stage; together what the same failures make it publish."""
    pieces: dict[frozenset[int], list[tuple[int, int]]] = {}
    for layer in layers:
        for number, shard in enumerate(plan.shards[layer]):
            if device in shard.devices:
                members = [plan.shards[layer][member].devices for member in shard.parity_of]
                first = shard.devices[: shard.devices.index(device)]
                before = frozenset(first).union(*members)  # a parity shard is a spare of all its members
                pieces.setdefault(before if spares == "standby" else frozenset(), []).append((layer, number))
    return [pieces[before] for before in sorted(pieces, key=lambda before: (len(before), sorted(before)))]


def _piece(
    plan: Plan,
    graph: OnnxGraph,
    exchanged: Mapping[int, NetworkLayer],
    shards: Sequence[tuple[int, int]],
    file: str,
) -> tuple[Piece, _Model]:
    cuts: list[Cut] = []
    outputs: list[str] = []
    inputs: dict[str, None] = {}
    for index in sorted({layer for layer, _ in shards}):
        layer, of_layer = exchanged[index], plan.shards[index]
        mine = [of_layer[number] for which, number in shards if which == index]
        prefix = f"{layer.layer.name}/"
        if mine[0].parity_of:  # then it is the only one of this layer here
            part = cut_parity(graph, layer, [np.array(of_layer[m].neurons) for m in mine[0].parity_of], prefix)
        else:
            part = cut_layer(graph, layer, np.array([n for shard in mine for n in shard.neurons]), prefix)
        cuts.append(part)
        outputs.append(prefix + layer.value.name)
        inputs[arguments(layer.node)[0].name] = None
    content = make_model(cuts, list(inputs), outputs, graph.opset, graph.types)
    piece = Piece(
        file=file,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        shards=tuple((list(exchanged).index(layer), number) for layer, number in shards),
    )
    return piece, _Model(content, sum(part.weight_bytes for part in cuts))
