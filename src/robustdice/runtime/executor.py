"""Computing a stage: named arrays in, shards and named arrays out, with ONNX Runtime."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from robustdice.bundle.manifest import WEIGHTS_NAME, Exchange
from robustdice.bundle.parts import Part, Piece
from robustdice.bundle.read import Bundle
from robustdice.bundle.trial import ROUNDED_TOLERANCE, TOLERANCE, deviation, stand_in, summary
from robustdice.errors import BundleError, first_line
from robustdice.runtime.memory import give_back
from robustdice.runtime.weights import Weights

Array = NDArray[Any]
Values = dict[str, Array]
ShardId = tuple[int, int]
"""A shard of a bundle: (position in ``Manifest.exchanges``, position in that exchange's ``shards``)."""


class Executor:
    """The models of one bundle, loaded. Not thread-safe; holds no state of any frame.

    ``threads`` are used inside one computation; BundleError when a model cannot be loaded.
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        """Load every model of the bundle."""
        self.manifest = manifest = bundle.manifest
        self._weights = Weights(bundle.content(WEIGHTS_NAME) if WEIGHTS_NAME in manifest.files else b"")
        self._bundle, self._threads = bundle, threads
        self._sessions = {
            part.file: _session(bundle, part, threads) for part in manifest.parts if not self._stands_by(part)
        }
        give_back()
        self._forms = [[e.form(shard) for shard in range(len(e.shards))] for e in manifest.exchanges]
        self._places = [
            [_place(shard.neurons, exchange.features) for shard in exchange.shards if shard.neurons]
            for exchange in bundle.manifest.exchanges
        ]

    def _stands_by(self, part: Part) -> bool:
        """Whether a part computes nothing but other devices' strips: it is loaded when it is first needed."""
        if part.apart is None or not isinstance(part, Piece):
            return False
        shards = (self.manifest.exchanges[exchange].shards[shard] for exchange, shard in part.shards)
        return all(shard.devices[0] != self.manifest.device for shard in shards)

    def _session(self, part: Part) -> Any:
        if part.file not in self._sessions:
            self._sessions[part.file] = _session(self._bundle, part, self._threads)
            give_back()
        return self._sessions[part.file]

    def run_local(self, stage: int, values: Mapping[str, Array], down: Iterable[int] = ()) -> Values:
        """``values`` together with what the stage's local parts make of them while the devices ``down`` are."""
        found = dict(values)
        for part in self.manifest.stages[stage].local:
            found.update(self._run(part, found, down))
        return found

    def run_piece(
        self, stage: int, piece: int, values: Mapping[str, Array], down: Iterable[int] = ()
    ) -> dict[ShardId, Array]:
        """The piece's shards as they travel, [batch, ...] each, while the devices ``down`` are."""
        part = self.manifest.stages[stage].pieces[piece]
        outputs = self._run(part, values, down)
        shards: dict[ShardId, Array] = {}
        for position, name in zip(dict.fromkeys(exchange for exchange, _ in part.shards), part.outputs, strict=True):
            exchange = self.manifest.exchanges[position]
            mine = [shard for other, shard in part.shards if other == position]
            widths = [exchange.entries(shard) for shard in mine]
            arrays = np.split(outputs[name], np.cumsum(widths)[:-1], axis=exchange.axis)
            forms = [self._forms[position][shard] for shard in mine]
            narrowed = (form.narrow(array) for form, array in zip(forms, arrays, strict=True))
            shards.update({(position, shard): array for shard, array in zip(mine, narrowed, strict=True)})
        return shards

    def assemble(self, exchange: int, shards: Mapping[int, Array], batch: int = 1) -> Values:
        """The exchange's value, float32 [batch, *shape], from ``shards`` (by number, as they travel), and its mask if
        it has one.

        A single missing shard follows from the parity shard; ``fill`` stands for what is missing otherwise. Sums are
        added up in the order of the shards, so that all devices have the same.
        """
        spec = self.manifest.exchanges[exchange]
        if spec.sums:
            total = np.zeros((batch, *spec.shape), np.float32)
            for number in sorted(shards):
                total += self._forms[exchange][number].widen(shards[number])
            return {spec.value: total}
        places = self._places[exchange]
        forms = self._forms[exchange]
        there = _repair(spec, {number: forms[number].widen(array) for number, array in shards.items()})
        if len(places) == 1 and len(there) == 1:
            value = there[0]
        else:
            value = np.empty((batch, *spec.shape), np.float32)
            for number, place in enumerate(places):
                value[(slice(None),) * spec.axis + (place,)] = there.get(number, spec.fill)
        if spec.mask is None:
            return {spec.value: value}
        mask = np.zeros(spec.shape[spec.axis - 1] // spec.features, np.bool_)
        for number in there:
            mask[list(spec.shards[number].neurons)] = True
        return {spec.value: value, spec.mask: mask}

    def try_out(self) -> None:
        """Run every part on made-up values; BundleError when one does not compute what the workshop said it would."""
        manifest = self.manifest
        values: Values = {manifest.input: stand_in(manifest.input, manifest.input_shape)}
        depths: dict[str, int] = {}
        for number, stage in enumerate(manifest.stages):
            for part in stage.local:
                values.update(self._try_part(part, values, depths))
            for piece in stage.pieces:
                self._try_part(piece, values, depths)
            values = self.keep(number, values)
            for exchange in (manifest.exchanges[position] for position in stage.exchanges):
                values[exchange.value] = stand_in(exchange.value, exchange.shape)
                depths.pop(exchange.value, None)
                if exchange.mask is not None:
                    values[exchange.mask] = np.ones(sum(len(shard.neurons) for shard in exchange.shards), np.bool_)

    def _try_part(self, part: Part, values: Values, depths: dict[str, int]) -> Values:
        """``depths`` says of values how many layers in a row read rounded inputs before them, where any did."""
        found = self._run(part, values, ())
        if self._stands_by(part):
            del self._sessions[part.file]
        depth = max((depths.get(name, 0) for name in part.inputs), default=0) + sum(c.rounded for c in part.coarse)
        depths.update(dict.fromkeys(part.outputs, depth))
        allowed = ROUNDED_TOLERANCE * depth if depth else TOLERANCE
        for output, expected in zip(part.outputs, part.trial, strict=False):  # a bundle without trials has none
            if (wrong := deviation(summary(found[output]), expected)) > allowed:
                raise BundleError(
                    f"{part.file} computes something else here than where it was built: {output} deviates by "
                    f"{wrong:.2g}, at most {allowed:g} is rounding. ONNX Runtime {onnxruntime.__version__} has a "
                    f"wrong kernel for this processor ({platform.machine()}); install another version of it"
                )
        return found

    def keep(self, stage: int, values: Mapping[str, Array]) -> Values:
        """Those of ``values`` that the stages after ``stage`` still need."""
        return {name: values[name] for name in self.manifest.stages[stage].keep if name in values}

    def _run(self, part: Part, values: Mapping[str, Array], down: Iterable[int]) -> Values:
        calibrated = self.manifest.calibrated_for(down)
        session, affine = self._session(part), self._weights.affine(part, calibrated)
        inputs = {**{name: values[name] for name in part.inputs}, **affine}
        if not any(layer.coarse and layer.coarse.at_once < layer.neurons for layer in part.affine):
            outputs = session.run(list(part.outputs), {**inputs, **self._weights.filters(part)})
            return dict(zip(part.outputs, outputs, strict=True))
        (output,), (layer,), (coarse,) = part.outputs, part.affine, part.coarse
        axis, found = coarse.axis, []
        for start in range(0, layer.neurons, coarse.at_once):
            of_rows = {name: array[start : start + coarse.at_once] for name, array in affine.items()}
            (some,) = session.run([output], {**inputs, **of_rows, **self._weights.filters(part, start)})
            found.append(some)
        return {output: np.concatenate(found, axis)}


def _repair(exchange: Exchange, shards: Mapping[int, Array]) -> dict[int, Array]:
    """The shards with neurons: those that are there, and the one missing if the parity shard gives it."""
    last = len(exchange.shards) - 1
    members = exchange.shards[last].parity_of
    there = {number: array for number, array in shards.items() if not exchange.shards[number].parity_of}
    missing = [number for number in members if number not in there]
    if last not in shards or len(missing) != 1:
        return there
    rest = shards[last].copy()
    for array in there.values():
        rest[(slice(None),) * exchange.axis + (slice(array.shape[exchange.axis]),)] -= array
    there[missing[0]] = rest[(slice(None),) * exchange.axis + (slice(exchange.entries(missing[0])),)]
    return there


def open_session(model: Path | bytes, threads: int, shares_arena: bool = False) -> Any:
    """An ONNX Runtime session on the CPU for a model file (or its content); idle threads sleep instead of spinning.

    From a file where memory counts: a session that is made from bytes keeps a second copy of the weights.
    ``shares_arena``: what it computes with is in the same memory as that of all others that share, which pays where
    there are many of them, without weights.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # 8-bit products whose pairs may not saturate, where the processor has instructions for pairs only.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    if shares_arena:
        _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )


@cache
def _register_arena() -> None:
    """For the whole process; it grows by what is asked for, not by doubling."""
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, 1, -1, -1))


def _session(bundle: Bundle, part: Part, threads: int) -> Any:
    path = bundle.path(part.file)
    if part.apart is not None:
        bundle.path(part.apart)
    try:
        return open_session(path, threads, shares_arena=bool(part.coarse or part.apart))
    except Exception as error:  # ONNX Runtime's exceptions have no common root below Exception
        raise BundleError(
            f"{path} cannot be loaded: {first_line(error)}; build the bundle again for this ONNX Runtime"
        ) from None


def _place(neurons: tuple[int, ...], features: int) -> slice | NDArray[np.intp]:
    """Where a shard's entries lie along the axis: a slice when its neurons are neighbours."""
    if neurons == tuple(range(neurons[0], neurons[0] + len(neurons))):
        return slice(neurons[0] * features, (neurons[0] + len(neurons)) * features)
    entries: NDArray[np.intp] = (np.array(neurons)[:, None] * features + np.arange(features)).ravel()
    return entries
