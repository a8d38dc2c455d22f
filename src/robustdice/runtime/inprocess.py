"""Running bundles without a cluster: every surviving device in this process, in lockstep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.read import Bundle
from robustdice.errors import BundleError, ClusterError
from robustdice.plan import publishers
from robustdice.runtime.executor import Array, Executor
from robustdice.runtime.wire.messages import Parcel, ShardId


def run_bundles(
    bundles: Sequence[Bundle], frames: NDArray[np.float32], failed: Iterable[int] = (), threads: int = 1
) -> NDArray[np.float32]:
    """The network's output, float32 [N, outputs], for ``frames`` [N, *input_shape] with the devices of ``failed`` down.

    Every surviving device computes the shards that it publishes, and assembles every exchange itself. ClusterError
    when no device is left or the devices do not agree; BundleError when the bundles are not of one plan.
    """
    return InProcess(bundles, threads).run(frames, failed)


class InProcess:
    """All devices of one plan, loaded once, to be run for several failure sets."""

    def __init__(self, bundles: Sequence[Bundle], threads: int = 1) -> None:
        """BundleError when they are not one of each device of one plan."""
        manifests = [bundle.manifest for bundle in bundles]
        if not manifests or sorted(m.device for m in manifests) != list(range(manifests[0].devices)):
            raise BundleError(f"bundles of devices {sorted(m.device for m in manifests)}: one of each device is needed")
        if len({m.plan_digest for m in manifests}) > 1:
            raise BundleError("the bundles are of different plans; build them again with 'robustdice build'")
        self._executors = {bundle.manifest.device: Executor(bundle, threads) for bundle in bundles}
        self._manifest = manifests[0]

    def run(self, frames: NDArray[np.float32], failed: Iterable[int] = ()) -> NDArray[np.float32]:
        """As :func:`run_bundles`."""
        down, manifest = frozenset(failed), self._manifest
        live = {device: executor for device, executor in self._executors.items() if device not in down}
        if not live:
            raise ClusterError(f"all {manifest.devices} devices are down: there is nobody to answer")
        if frames.shape[1:] != manifest.input_shape:
            raise ClusterError(f"frames of shape {frames.shape[1:]}, expected {manifest.input_shape}")
        batch = len(frames)
        values = {device: {manifest.input: np.asarray(frames, np.float32)} for device in live}
        for number, stage in enumerate(manifest.stages):
            parcels: list[Parcel] = []
            for device, executor in live.items():
                values[device] = executor.run_local(number, values[device], down)
                parcels += self._publish(device, number, values[device], down)
            for device, executor in live.items():
                if number + 1 == len(manifest.stages):
                    continue
                kept = executor.keep(number, values[device])
                for exchange in stage.exchanges:
                    given = self._given(device, exchange, parcels, down)
                    kept.update(executor.assemblies[exchange].value(given, batch))
                values[device] = kept
        outputs = [values[device][manifest.output].reshape(batch, -1) for device in live]
        if any(not np.array_equal(outputs[0], other, equal_nan=True) for other in outputs[1:]):
            raise ClusterError(f"devices {sorted(live)} do not agree about the output; build the bundles again")
        return np.asarray(outputs[0], np.float32)

    def _publish(self, device: int, stage: int, values: dict[str, Array], down: frozenset[int]) -> tuple[Parcel, ...]:
        manifest = self._executors[device].manifest
        due: list[ShardId] = []
        for exchange in manifest.stages[stage].exchanges:
            found = publishers(manifest.exchanges[exchange].shards, down)
            due += [(exchange, shard) for shard, publisher in enumerate(found) if publisher == device]
        if not due:
            return ()
        pieces = manifest.stages[stage].pieces
        mine = [number for number, piece in enumerate(pieces) if not set(due).isdisjoint(piece.shards)]
        return self._executors[device].run_pieces(stage, mine, values, down, (tuple(due),), due)[:1]

    def _given(self, device: int, exchange: int, parcels: list[Parcel], down: frozenset[int]) -> list[Parcel]:
        """What a device is handed in an exchange: of sums that owners add up, its own slices."""
        of = self._manifest.exchanges[exchange]
        if of.owners is None:
            return parcels
        owners = publishers(self._manifest.exchanges[of.owners].shards, down)
        held = {s: array for p in parcels for (e, s), array in zip(p.shards, p.arrays, strict=True) if e == exchange}
        mine = [s for s in held if owners[s % len(owners)] == device]
        return [Parcel(tuple((exchange, s) for s in mine), [held[s] for s in mine])]
