"""What the bundles of a build give in one process, whichever devices are down: what a cluster's answers are held to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.manifest import Manifest
from robustdice.bundle.read import load_bundle
from robustdice.plan import failure_sets, publishers
from robustdice.runtime.answer import Answer
from robustdice.runtime.inprocess import InProcess

Floats = NDArray[np.float32]
View = tuple[int, ...]
"""The devices that are down, ascending."""
BATCH = 100


@dataclass(frozen=True, eq=False)
class Expected:
    """For ``images`` [n, C, H, W] and every set of devices that may be down: the ``outputs`` [n, outputs], and the
    ``coverage`` that those who are left can give."""

    images: Floats
    outputs: Mapping[View, Floats]
    coverage: Mapping[View, float]

    def judge(self, answer: Answer, image: int) -> bool | None:
        """Whether an answer is what it says that it is. None where that cannot be told: it was computed while the view
        changed, and lacks something. (Copies are taken for exact: a build with coarse ones does not fit here.)"""
        known = answer.expected_accuracy is not None
        view = () if answer.coverage == 1.0 else answer.down if known else None
        if answer.outputs is None or view is None:
            return None
        if known and abs(answer.coverage - self.coverage[answer.down]) > 1e-6:
            return False
        expected = self.outputs[view][image]
        finite = expected[np.isfinite(expected)]
        size = float(np.abs(finite).max(initial=1.0))
        return bool(np.allclose(answer.outputs, expected, rtol=1e-3, atol=1e-4 * size))

    def save(self, path: Path) -> None:
        """For the next run."""
        views = list(self.outputs)
        masks = np.array([[device in view for device in range(len(max(views, key=len)) + 1)] for view in views])
        outputs, coverage = np.stack([*self.outputs.values()]), np.array([*self.coverage.values()])
        np.savez(path, images=self.images, views=masks, outputs=outputs, coverage=coverage)


def load_expected(path: Path) -> Expected:
    """What was saved."""
    with np.load(path) as file:
        views = [tuple(np.flatnonzero(mask).tolist()) for mask in file["views"]]
        outputs, coverage = file["outputs"], file["coverage"].tolist()
        return Expected(file["images"], dict(zip(views, outputs, strict=True)), dict(zip(views, coverage, strict=True)))


def expect(directory: Path, images: Floats) -> Expected:
    """Of the build in ``directory``."""
    found = views(directory)
    outputs = {view: outputs_of(directory, images, view) for view in found}
    return Expected(images, outputs, coverages(directory, found))


def views(directory: Path) -> list[View]:
    """Every set of devices that may be down while one is left."""
    devices = len(list(directory.glob("device-*")))
    return [tuple(sorted(down)) for size in range(devices) for down in failure_sets(devices, size)]


def outputs_of(directory: Path, images: Floats, down: View) -> Floats:
    """What a build gives for images, float32 [n, outputs], while some devices are down."""
    reference = InProcess([load_bundle(path) for path in sorted(directory.glob("device-*"))])
    return np.concatenate([reference.run(images[k : k + BATCH], down) for k in range(0, len(images), BATCH)])


def coverages(directory: Path, found: Iterable[View]) -> dict[View, float]:
    """For every view the coverage that a build's devices can give."""
    manifest = load_bundle(directory / "device-0").manifest
    return {view: _coverage(manifest, view) for view in found}


def _coverage(manifest: Manifest, down: Iterable[int]) -> float:
    """The least share, over the exchanges, of neurons that somebody still has."""
    shares = []
    for exchange in manifest.exchanges:
        found = zip(exchange.shards, publishers(exchange.shards, down), strict=True)
        there = {neuron for shard, device in found if device is not None for neuron in shard.neurons}
        shares.append(len(there) / exchange.neurons)
    return min(shares, default=1.0)
