"""What a bundle's models take on one thread of the device that holds it: a profile without the workshop.

A bundle has what its device computes, mostly some neurons of each layer. What a layer takes with all its neurons
follows from these by arithmetic; where a model computes several layers, each is given the part of its time that it has
in typical figures. What unpacking weights takes is measured by itself. What handing over takes shows between two
devices only, and is typical too.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import numpy as np

from robustdice.bundle.parts import Part, Work
from robustdice.bundle.read import Bundle
from robustdice.bundle.trial import stand_in, stand_ins
from robustdice.cost.profile import TYPICAL, LayerSeconds, Profile
from robustdice.errors import BundleError
from robustdice.meter.unpacking import measure_unpacking
from robustdice.plan import Layer
from robustdice.progress import Progress, silent
from robustdice.runtime.executor import Executor, Values

FEWEST_ROUNDS, MOST_ROUNDS = 3, 200
ENOUGH_SECONDS = 3.0
"""Of all models together: so long, and not fewer than the fewest rounds, they are run."""
LEAST_ARITHMETIC = 0.1
"""Of what a model takes, when unpacking its weights by themselves took nearly as long or longer."""


def measure_held(bundle: Bundle, on_progress: Progress = silent) -> Profile:
    """Run what the device computes of a frame, model after model, in rounds; of each, the median of the thread's time
    counts. The ``share`` of each layer is what the bundle has; layers of which it has nothing are not in the profile.
    BundleError when the bundle does not say what its models compute, or they cannot be run."""
    manifest, executor = bundle.manifest, Executor(bundle)
    if not (best := _best(executor)):
        raise BundleError(
            f"{bundle.directory} does not say which layers its models compute: it was built by an earlier version; "
            "build it again with 'robustdice build'"
        )
    executor.try_out()
    wanted = {part for part, _ in best.values()} | {part for stage in manifest.stages for part in stage.local}
    runs = [(part, values) for part, values in _inputs(executor) if part in wanted]
    taken: dict[Part, list[float]] = {part: [] for part, _ in runs}
    start, rounds, done = time.perf_counter(), FEWEST_ROUNDS, 0
    while done < rounds:
        for part, values in runs:
            # Of this thread alone, in which ONNX Runtime computes: other jobs of the device do not count.
            before = time.thread_time()
            executor.run_part(part, values)
            taken[part].append(time.thread_time() - before)
        done += 1
        rounds = int(np.clip(ENOUGH_SECONDS * done / (time.perf_counter() - start), FEWEST_ROUNDS, MOST_ROUNDS))
        on_progress(min(done, rounds), rounds)
    seconds = {part: median(each) for part, each in taken.items()}
    known = replace(TYPICAL, unpack_seconds=measure_unpacking())
    layers = {
        manifest.layers[index].name: _layer_seconds(known, manifest.layers, part, work, seconds[part])
        for index, (part, work) in sorted(best.items())
    }
    macs = sum(layer.neurons * layer.neuron_macs for layer in manifest.layers if layer.name in layers)
    local = [part for stage in manifest.stages for part in stage.local]
    return replace(
        known,
        macs_per_second=macs / sum(each.whole for each in layers.values()),
        layers=layers,
        rest_seconds=sum(seconds[part] for part in local if not part.work),
        model_digest=manifest.model_digest,
    )


def _inputs(executor: Executor) -> list[tuple[Part, Values]]:
    """Every model with made-up values to run it on, in the order of a frame."""
    manifest = executor.manifest
    found: list[tuple[Part, Values]] = []
    values: Values = {manifest.input: stand_in(manifest.input, manifest.input_shape)}
    for number, stage in enumerate(manifest.stages):
        for part in stage.local:
            found.append((part, {name: values[name] for name in part.inputs}))
            values.update(executor.run_part(part, values))
        found += [(piece, {name: values[name] for name in piece.inputs}) for piece in stage.pieces]
        values = executor.keep(number, values)
        values.update(stand_ins(manifest.exchanges[position] for position in stage.exchanges))
    return found


def _best(executor: Executor) -> dict[int, tuple[Part, Work]]:
    """For each layer the model with the most of it, in float32 if there is one; strips of others stand by, as a device
    has them in memory only when it needs them."""
    found: dict[int, tuple[Part, Work]] = {}
    for part in executor.manifest.parts:
        for work in part.work if not executor.stands_by(part) else ():
            if work.layer not in found or _merit(work) > _merit(found[work.layer][1]):
                found[work.layer] = part, work
    return found


def _merit(work: Work) -> tuple[bool, float]:
    return work.representation == "float32", work.share


def _layer_seconds(known: Profile, layers: tuple[Layer, ...], part: Part, work: Work, seconds: float) -> LayerSeconds:
    """Of one of the layers that a model computes in so many seconds, if it were in float32, by what is ``known``."""
    every = [(layers[each.layer], each.share, each.representation) for each in part.work]
    unpacking = sum(known.unpacking(*each) or 0.0 for each in every)
    arithmetic = sum(known.seconds(*each) for each in every) - unpacking
    left = max(seconds - unpacking, LEAST_ARITHMETIC * seconds)
    mine = left * known.seconds(layers[work.layer], work.share) / arithmetic
    return LayerSeconds(mine / work.share, mine, work.share)
