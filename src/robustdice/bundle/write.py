"""Network and plan -> one directory per device, with only that device's weights."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.manifest import (
    APART_PATTERN,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Exchange,
    FileEntry,
    Manifest,
    Needs,
    Stage,
)
from robustdice.bundle.model import Model, Taken, neurons_of
from robustdice.bundle.models import Models
from robustdice.bundle.neuron_inputs import filter_name, scale_name, shift_name
from robustdice.bundle.onnx_graph import IR_VERSION, OnnxGraph, export_onnx
from robustdice.bundle.parts import Affine, Coarse, Corrected, Filter, Part, Piece
from robustdice.bundle.stages import StageGraph, merged, split_into_stages
from robustdice.errors import OutputError, PlanError
from robustdice.model.execute import attribute
from robustdice.model.fits import check_plan_fits
from robustdice.model.network import Network
from robustdice.plan import Plan
from robustdice.representation import CoarseFilter, Correction, is_scaled, pack
from robustdice.rounding.affine import fold

SPARES = ("standby", "hot")
_BESIDE_BUNDLES = {"plan.json", "cluster.toml", "client.key"}
_IN_BUNDLES = {MANIFEST_NAME, WEIGHTS_NAME, "secret.key"}
PLAN_NAME = "plan.json"
"""The plan that a build was made from, kept beside the bundles for whoever verifies them."""


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
    models = Models(network, plan, graph or export_onnx(network))
    dealt = models.exchanged | models.coarse_everywhere
    stages = merged(split_into_stages(network, dict(sorted(dealt.items()))), models.exchanged)
    locals_ = [models.locals(stage, f"stage-{number:03d}-local") for number, stage in enumerate(stages)]
    names = [f"device-{device}" for device in range(plan.devices)]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
            for device, name in enumerate(names):
                target = Path(temporary) / name
                target.mkdir()
                _Device(models, device, target).write(stages, locals_, spares)
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
    return all(
        file.name in _IN_BUNDLES or file.suffix == ".onnx" or file.match(APART_PATTERN) for file in path.iterdir()
    )


class _Device:
    """Writes the bundle of one device."""

    def __init__(self, models: Models, device: int, target: Path) -> None:
        self.models, self.device, self.target = models, device, target
        self.plan, self.network = models.plan, models.network
        self.calibrated = sorted(
            (failed for failed in self.plan.corrections if device not in failed), key=lambda f: (len(f), sorted(f))
        )
        self.weights = bytearray()
        self.files: dict[str, FileEntry] = {}
        self.weight_bytes = 0
        self._scales_of_sums: dict[tuple[int, str], int] = {}

    def write(self, stages: Sequence[Sequence[StageGraph]], locals_: Sequence[Sequence[Model]], spares: str) -> None:
        """``locals_`` are the models of every stage's local parts."""
        network, plan, exchanged = self.network, self.plan, self.models.exchanged
        order = list(exchanged)
        manifest_stages = []
        for number, (parts, local) in enumerate(zip(stages, locals_, strict=True)):
            layers = [layer for part in parts for layer in part.layers if layer in exchanged]
            manifest_stages.append(
                Stage(
                    local=tuple(
                        self._part(model, f"stage-{number:03d}-local-{k}.onnx") for k, model in enumerate(local)
                    ),
                    exchanges=tuple(order.index(layer) for layer in layers),
                    pieces=tuple(
                        self._piece(shards, kind, f"stage-{number:03d}-piece-{k}.onnx")
                        for k, (shards, kind) in enumerate(_piece_shards(plan, layers, self.device, spares))
                    ),
                    keep=tuple(node.name for node in parts[-1].keep),
                )
            )
        if self.weights:
            self._file(WEIGHTS_NAME, bytes(self.weights), len(self.weights))
        promised = plan.bytes_per_device[self.device]
        if self.weight_bytes != promised:
            raise PlanError(
                f"device {self.device} would hold {self.weight_bytes} bytes of weights, the plan promises {promised}; "
                "please report this model"
            )
        manifest = Manifest(
            device=self.device,
            devices=plan.devices,
            plan_digest=plan.digest,
            spares=spares,
            input=network.input.name,
            input_shape=network.input_shape,
            output=network.output.name,
            outputs=network.outputs,
            classes=tuple(plan.model.preprocessing.get("classes", ())),
            preprocessing={
                key: value for key, value in plan.model.preprocessing.items() if key not in ("classes", "activation")
            },
            exchanges=tuple(_exchange(self.models, index) for index in exchanged),
            stages=tuple(manifest_stages),
            files=self.files,
            weight_bytes=self.weight_bytes,
            calibrated=tuple(tuple(sorted(failed)) for failed in self.calibrated),
            activation=network.activation,
            certificate=plan.certificate,
            needs=Needs(self.models.opset, IR_VERSION),
            model_digest=plan.model.digest,
            layers=plan.layers,
        )
        (self.target / MANIFEST_NAME).write_bytes(manifest.to_json())

    def _file(self, name: str, content: bytes, weight_bytes: int) -> str:
        """The file with this content: a new one, or one that is there already and has no weights of its own. What
        computes other neurons of a layer from filters that it is given is the same model, and in memory once."""
        entry = FileEntry(len(content), hashlib.sha256(content).hexdigest())
        if not weight_bytes and (same := next((file for file, of in self.files.items() if of == entry), None)):
            return same
        (self.target / name).write_bytes(content)
        self.files[name] = entry
        self.weight_bytes += weight_bytes
        return name

    def _part(self, model: Model, file: str) -> Part:
        name = self._file(file, model.content, model.weight_bytes)
        apart = None
        if model.apart is not None:
            apart, content = model.apart
            if apart not in self.files:
                self._file(apart, content, len(content))
        signed = None
        if model.signed:
            signed = self._file(file.replace(".onnx", "-signed.onnx"), model.signed, 0)
        affine = tuple(map(self._affine, model.layers))
        return Part(
            name,
            model.inputs,
            model.outputs,
            affine=affine,
            trial=model.trial,
            apart=apart,
            work=model.work,
            signed=signed,
        )

    def _piece(self, shards: Sequence[tuple[int, int]], kind: str, file: str) -> Piece:
        """``shards`` are (layer, shard) pairs, of one layer unless their representation, ``kind``, is float32; or its
        strips, where it is ``rows``, or what an ``owner`` adds up."""
        apart = Path(file).with_suffix(".bin").name
        if kind == "float32":
            model = self.models.piece(shards, apart)
        elif kind == "rows":
            model = self.models.strips(shards[0][0], [number for _, number in shards])
        elif kind == "owner":
            model = self.models.owner(shards[0][0])
        else:
            index = shards[0][0]
            of_layer = [self.plan.exchanged_shards(index)[number] for _, number in shards]
            neurons = neurons_of(of_layer[:1] if index in self.plan.pairs else of_layer)
            prefix = f"{self.plan.layers[index].name}/"
            if index in self.plan.pairs:
                model = self.models.of_pair(index, neurons, kind, prefix)
            else:
                model = self.models.of_layer(index, neurons, kind, prefix, apart)
        order = list(self.models.exchanged)
        part = self._part(model, file)
        return Piece(shards=tuple((order.index(layer), number) for layer, number in shards), **vars(part))

    def _affine(self, taken: Taken) -> Affine:
        index, neurons = taken.layer, taken.neurons
        layer = self.network.layers[index]
        corrections = tuple(
            None if taken.pair == "scales" else self._corrected(self.plan.corrections[failed][index], neurons)
            for failed in self.calibrated
        )
        coarse = self._coarse(taken) if taken.kind != "float32" or taken.pair else None
        return Affine(scale_name(layer), shift_name(layer), len(neurons), corrections, coarse)

    def _corrected(self, correction: Correction | None, neurons: NDArray[np.int64]) -> Corrected | None:
        if correction is None:
            return None
        scale, shift = map(float, correction.steps)
        return Corrected(self._keep(correction.codes[:, neurons]), (scale, shift))

    def _coarse(self, taken: Taken) -> Coarse | None:
        layer, neurons = self.network.layers[taken.layer], taken.neurons
        kept = self.plan.coarse.get((taken.layer, taken.kind))
        if taken.pair == "scales":
            return self._scales(taken)
        if kept is None:  # the second of a pair
            shift, filters = fold(self.network, layer).shift.numpy(), []
        else:
            shift = kept.shift.astype(np.float32) if taken.pair == "second" else kept.shift
            filters = [] if taken.inside or taken.pair == "second" else [(layer.node, layer.own_filter, kept.filter)]
            filters += [(node, name, kept.tail[name]) for node, name in layer.tail_filter_nodes.items()]
        found = [
            Filter(
                filter_name(node),
                each.representation,
                tuple(attribute(self.network.module, name).shape[1:]),
                each.group,
                self._keep_filters(each, neurons),
            )
            for node, name, each in filters
        ]
        if taken.pair == "first":
            found.append(self._columns(taken))
        coarse = Coarse(
            filters=tuple(found),
            scales=self._keep(kept.filter.scales[neurons]) if kept is not None and taken.inside else None,
            factor=taken.factor,
            rounded=taken.layer in self.plan.activations,
            shift=self._keep(shift[neurons]) if layer.layer.affine_weights else None,
            at_once=taken.at_once,
            axis=layer.axis,
            pair=taken.pair,
        )
        return coarse if found or coarse.scales is not None or coarse.shift is not None else None

    def _columns(self, taken: Taken) -> Filter:
        """The second layer's filters for neurons of the first of a pair."""
        first, index = self.network.layers[taken.layer], self.plan.pairs[taken.layer]
        second, kept = self.network.layers[index], self.plan.coarse[index, taken.kind].filter
        behind = tuple(attribute(self.network.module, second.own_filter).shape[2:])
        codes = kept.codes.reshape(len(kept.codes), first.layer.neurons, -1)[:, taken.neurons].swapaxes(0, 1)
        offset = self._keep_codes(codes.reshape(len(taken.neurons), -1), taken.kind)
        return Filter(filter_name(second.node), taken.kind, (len(kept.codes), first.features, *behind), 0, offset)

    def _scales(self, taken: Taken) -> Coarse | None:
        """What sums are scaled by: kept once, whatever they are of."""
        if not is_scaled(taken.kind):
            return None
        if (key := (taken.layer, taken.kind)) not in self._scales_of_sums:
            self._scales_of_sums[key] = self._keep(self.plan.coarse[key].filter.scales)
        offset, axis = self._scales_of_sums[key], self.network.layers[taken.layer].axis
        return Coarse((), offset, 1.0, False, None, taken.at_once, axis)

    def _keep_filters(self, filters: CoarseFilter, neurons: NDArray[np.int64]) -> int:
        offset = self._keep_codes(filters.codes[neurons], filters.representation)
        self._keep(filters.scales[neurons])
        return offset

    def _keep_codes(self, codes: NDArray[Any], representation: str) -> int:
        whole = representation in ("float16", "int8")  # a number for each weight
        return self._keep(codes if whole else pack(codes, representation))

    def _keep(self, array: NDArray[Any]) -> int:
        """The offset at which the array now stands in the weights."""
        offset = len(self.weights)
        self.weights += array.astype(array.dtype.newbyteorder("<")).tobytes()
        return offset


def _exchange(models: Models, index: int) -> Exchange:
    layer, shards, pairs = models.exchanged[index], models.plan.exchanged_shards(index), models.plan.pairs
    if index in pairs:
        second = models.network.layers[pairs[index]].without_tail
        place = (layer.layer.name, layer.value.name, second.shape, second.axis, 1)
        exchange = Exchange(*place, 0.0, None, shards, models.plan.wires[index], sums=True)
        if index not in models.plan.owned:
            return exchange
        neurons = tuple(each.neurons for each in models.plan.slices(index))
        return replace(exchange, slices=neurons, owners=list(models.exchanged).index(pairs[index]))
    return Exchange(
        layer=layer.layer.name,
        value=layer.value.name,
        shape=layer.shape,
        axis=layer.axis,
        features=layer.features,
        fill=layer.fill,
        mask=models.mask(index),
        shards=shards,
        wire=models.plan.wires[index],
    )


def _piece_shards(
    plan: Plan, layers: Sequence[int], device: int, spares: str
) -> list[tuple[list[tuple[int, int]], str]]:
    """The (layer, shard) pairs that a device holds in a stage; together what the same failures make it publish and is
    kept in float32, or is of one layer and one other representation, which is said beside them; ``rows``: strips;
    ``owner``: slices. Sums of spares stay by themselves even where spares are computed on every frame: each has its own
    circumstances."""
    pieces: dict[tuple[tuple[int, ...], int, str], list[tuple[int, int]]] = {}
    for layer in layers:
        shards = plan.exchanged_shards(layer)
        if plan.owned_first(layer) is not None:
            pieces[(), layer, "owner"] = [(layer, number) for number in range(len(shards))]
            continue
        for number, shard in enumerate(shards):
            if device in shard.devices:
                members = [shards[member].devices for member in shard.parity_of]
                first = shard.devices[: shard.devices.index(device)]
                before = frozenset(first).union(shard.after, *members)  # a parity shard is a spare of all its members
                kind = "rows" if plan.run_of(layer) else shard.representation_on(device)
                apart = tuple(sorted(before)) if spares == "standby" or shard.after else ()
                key = (apart, -1 if kind == "float32" else layer, kind)
                pieces.setdefault(key, []).append((layer, number))
    in_order = sorted(pieces, key=lambda key: (len(key[0]), *key))
    return [(pieces[key], key[2]) for key in in_order]
