"""Computing a stage: named arrays in, shards and named arrays out, with ONNX Runtime."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from robustdice.bundle.manifest import WEIGHTS_NAME, Exchange, Stage
from robustdice.bundle.parts import Part, Piece
from robustdice.bundle.read import Bundle
from robustdice.bundle.trial import ROUNDED_TOLERANCE, TOLERANCE, deviation, stand_in, stand_ins, summary
from robustdice.errors import BundleError, RobustdiceError, first_line
from robustdice.runtime.assembly import Assembly
from robustdice.runtime.memory import give_back
from robustdice.runtime.parcels import Layouts, Packed
from robustdice.runtime.sessions import CPU, Sessions
from robustdice.runtime.weights import Weights
from robustdice.runtime.wire.messages import Parcel, ShardId

Array = NDArray[Any]
Values = dict[str, Array]


class Executor:
    """The models of one bundle, loaded. Not thread-safe; holds no state of any frame.

    ``threads`` are used inside one computation; BundleError when a model cannot be loaded.
    """

    def __init__(self, bundle: Bundle, threads: int = 1, provider: str = CPU) -> None:
        """Load every model of the bundle. ``provider``: :func:`robustdice.runtime.sessions.provider_named`."""
        self.manifest = manifest = bundle.manifest
        self._weights = Weights(bundle.content(WEIGHTS_NAME) if WEIGHTS_NAME in manifest.files else b"")
        self._sessions = Sessions(bundle, threads, provider)
        for part in manifest.parts:
            if not self.stands_by(part):
                self._sessions.load(part)
        give_back()
        self.layouts = Layouts(manifest)
        self.assemblies = [Assembly(k, exchange, self.layouts) for k, exchange in enumerate(manifest.exchanges)]
        """Put the value of each exchange together."""
        self._pieces = [[(piece, self.layouts.of(piece.shards)) for piece in stage.pieces] for stage in manifest.stages]
        """What each piece of a stage computes, and how that lies in memory."""
        self._kept = [_kept(stage, manifest.exchanges) for stage in manifest.stages]
        self._read = [{name for piece in stage.pieces for name in piece.inputs} for stage in manifest.stages]
        self._sums_of = manifest.sums_of
        self._calibrated = lru_cache(64)(manifest.calibrated_for)

    def stands_by(self, part: Part) -> bool:
        """Whether a part computes nothing but other devices' strips: it is loaded when it is first needed."""
        if not part.in_strips or not isinstance(part, Piece):
            return False
        shards = (self.manifest.exchanges[exchange].shards[shard] for exchange, shard in part.shards)
        return all(shard.devices[0] != self.manifest.device for shard in shards)

    @property
    def providers(self) -> dict[str, int]:
        """How many models each of ONNX Runtime's providers computes."""
        return self._sessions.used

    @property
    def loaded(self) -> int:
        """How many models are in memory."""
        return len(self._sessions)

    def run_local(self, stage: int, values: Mapping[str, Array], down: Iterable[int] = ()) -> Values:
        """``values`` together with what the stage's local parts make of them while the devices ``down`` are."""
        found = dict(values)
        for part in self.manifest.stages[stage].local:
            found.update(self.run_part(part, found, down))
        return found

    def run_piece(self, stage: int, piece: int, values: Mapping[str, Array], down: Iterable[int] = ()) -> Parcel:
        """The piece's shards, while the devices ``down`` are: one array [batch, ...] for each exchange, as it travels,
        which single ones are cut out of."""
        part, layout = self._pieces[stage][piece]
        blocks = tuple(self._outputs(part, values, down))
        if not layout.plain:
            blocks = tuple(b.form.narrow(array) for b, array in zip(layout.blocks, blocks, strict=True))
        return Parcel(part.shards, Packed(layout, blocks))

    def run_pieces(
        self,
        stage: int,
        pieces: Iterable[int],
        values: Mapping[str, Array],
        down: Iterable[int] = (),
        due: Sequence[tuple[ShardId, ...]] = (),
        owned: Sequence[ShardId] = (),
    ) -> tuple[Parcel, ...]:
        """The shards of some pieces, first a parcel for each of those that are ``due``. Of what owners add up, this
        device has only what is ``owned``."""
        parcels = [*map(self.run_piece, repeat(stage), pieces, repeat(values), repeat(down))]
        if self._sums_of:
            parcels = [some for parcel in parcels if (some := self._owned(parcel, owned)).shards]
        if len(due) == len(parcels) == 1 and due[0] == parcels[0].shards:
            return (parcels[0],)
        return self.layouts.select(due, parcels) if due else tuple(parcels)

    def _owned(self, parcel: Parcel, owned: Sequence[ShardId]) -> Parcel:
        if parcel.shards[0][0] not in self._sums_of:
            return parcel
        some = {shard: array for shard, array in zip(parcel.shards, parcel.arrays, strict=True) if shard in owned}
        return self.layouts.packed(tuple(some), list(some.values())) if some else Parcel((), ())

    def read_by_pieces(self, stage: int, values: Mapping[str, Array]) -> Values:
        """Those of ``values`` that a stage's pieces read."""
        return {name: values[name] for name in self._read[stage]}

    def try_out(self) -> None:
        """Run every part on made-up values. What another provider computes wrongly is computed on the CPU from then on;
        BundleError when that does not compute what the workshop said it would, either, or cannot."""
        try:
            self._try_parts()
        except MemoryError:
            raise BundleError(
                "what the bundle's manifest says of its values takes more memory than there is; build the bundle again"
            ) from None
        self._sessions.say_what_moved()

    def _try_parts(self) -> None:
        manifest = self.manifest
        values: Values = {manifest.input: stand_in(manifest.input, manifest.input_shape)}
        depths: dict[str, int] = {}
        for number, stage in enumerate(manifest.stages):
            for part in stage.local:
                values.update(self._try_part(part, values, depths))
            for piece in stage.pieces:
                self._try_part(piece, values, depths)
            assembled = stand_ins(manifest.exchanges[position] for position in stage.exchanges)
            values = {**self.keep(number, values), **assembled}
            for name in assembled:
                depths.pop(name, None)

    def _try_part(self, part: Part, values: Values, depths: dict[str, int]) -> Values:
        """``depths`` says of values how many layers in a row read rounded inputs before them, where any did."""
        depth = max((depths.get(name, 0) for name in part.inputs), default=0) + sum(c.rounded for c in part.coarse)
        depths.update(dict.fromkeys(part.outputs, depth))
        allowed = ROUNDED_TOLERANCE * depth if depth else TOLERANCE
        found, wrong = self._judge(part, values, allowed)
        if wrong and self._sessions.move_to_cpu(part, f"a kernel of it is wrong: {wrong}"):
            found, wrong = self._judge(part, values, allowed)
        if wrong:
            raise BundleError(
                f"{self._sessions.file_of(part)} computes something else here than where it was built: {wrong}. ONNX "
                f"Runtime {onnxruntime.__version__} has a wrong kernel for this processor ({platform.machine()}); "
                "install another version of it"
            )
        if self.stands_by(part):
            self._sessions.drop(part)
        return found

    def _judge(self, part: Part, values: Values, allowed: float) -> tuple[Values, str | None]:
        """What a part computes, and what is wrong with it; BundleError when it cannot be computed at all."""
        try:
            found = self.run_part(part, values)
            return found, _wrong(part, found, allowed)
        except RobustdiceError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common root below Exception
            raise BundleError(
                f"{self._sessions.file_of(part)} cannot be computed: {first_line(error)}; build the bundle again, with "
                "this version"
            ) from None

    def keep(self, stage: int, values: Mapping[str, Array]) -> Values:
        """Those of ``values`` that the stages after ``stage`` still need."""
        names = self._kept[stage]
        return {name: values[name] for name in names if name in values} if names else {}

    def run_part(self, part: Part, values: Mapping[str, Array], down: Iterable[int] = ()) -> Values:
        """A part's outputs from ``values``, while the devices ``down`` are."""
        return dict(zip(part.outputs, self._outputs(part, values, down), strict=True))

    def _outputs(self, part: Part, values: Mapping[str, Array], down: Iterable[int]) -> list[Array]:
        inputs = {name: values[name] for name in part.inputs}
        if not part.affine:
            return self._sessions.run(part, inputs)
        affine = self._weights.affine(part, self._calibrated(frozenset(down)))
        layer = next((each for each in part.affine if each.coarse and each.coarse.at_once < each.neurons), None)
        if layer is None or layer.coarse is None:
            return self._sessions.run(part, {**inputs, **affine, **self._weights.filters(part)})
        coarse, found = layer.coarse, list[Array]()
        for start in range(0, layer.neurons, coarse.at_once):
            of_rows = {name: affine[name][start : start + coarse.at_once] for name in (layer.scale, layer.shift)}
            found += self._sessions.run(part, {**inputs, **affine, **of_rows, **self._weights.filters(part, start)})
            if coarse.pair == "first" and start:
                found = [np.add(*found)]
        return [found[0] if coarse.pair == "first" else np.concatenate(found, coarse.axis)]


def _kept(stage: Stage, exchanges: Sequence[Exchange]) -> tuple[str, ...]:
    """What the stages after a stage need that is there before its exchanges are assembled."""
    assembled = {name for number in stage.exchanges for name in (exchanges[number].value, exchanges[number].mask)}
    return tuple(name for name in stage.keep if name not in assembled)


def _wrong(part: Part, found: Values, allowed: float) -> str | None:
    """Which output of a trial is not what the workshop said, and by how much."""
    for output, expected in zip(part.outputs, part.trial, strict=False):  # a bundle without trials has none
        if (wrong := deviation(summary(found[output]), expected)) > allowed:
            return f"{output} deviates by {wrong:.2g}, at most {allowed:g} is rounding"
    return None
