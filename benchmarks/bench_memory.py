"""The most that a device's process has resident, over its weights and the largest activations of a frame.

    python benchmarks/bench_memory.py [--models NAME|FILE ...] [--split neurons] [--devices N] [--window N] [--frames N]
        [--builds DIR] [--out FILE]

Plain slices, random frames. The largest activations are those of the stage in which the device reads and computes
most: the values that its models read, and those that they give. MB are millions of bytes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
from builds import SPLITS, Builds, name_of, try_build
from paired import Results

from robustdice.bundle.manifest import Manifest
from robustdice.bundle.read import load_bundle
from robustdice.runtime.cluster import LocalCluster

SHARED = Path(__file__).parents[2] / "shared" / "models"
CIFAR = ("alexnet_cifar10", "vgg16_bn_half_cifar10", "resnet20_cifar10", "convnext_small_cifar10")


def largest_activations(manifest: Manifest) -> int:
    """Bytes of what a stage reads and what the device computes in it, of the stage where that is most. What local
    parts make of an exchange is left out."""
    read, largest = math.prod(manifest.input_shape), 0
    for stage in manifest.stages:
        mine = 0
        for piece in stage.pieces[:1]:
            for exchange, shard in piece.shards:
                spec = manifest.exchanges[exchange]
                mine += spec.entries(shard) * math.prod(spec.shape) // spec.shape[spec.axis - 1]
        largest = max(largest, read + mine)
        read = sum(math.prod(manifest.exchanges[exchange].shape) for exchange in stage.exchanges)
    return 4 * largest


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [str(path) for name in CIFAR if (path := SHARED / f"{name}.pt2").exists()]
    models = ["alexnet", "vgg16_bn", "convnext_tiny", "mobilenet_v2", *there]
    parser.add_argument("--models", nargs="+", default=models, metavar="NAME")
    parser.add_argument("--split", default="neurons", choices=SPLITS)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--builds", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        builds = Builds(options.builds or Path(temporary))
        for model in options.models:
            if (build := try_build(builds, model, options.split, options.devices)) is None:
                continue
            manifest = load_bundle(build / "device-0").manifest
            with LocalCluster(build, timeout_seconds=30.0, window=options.window) as cluster:
                loaded = cluster.client.status()[0]["peak_rss_bytes"]
                frame = np.random.default_rng(0).standard_normal(manifest.input_shape, dtype=np.float32)
                for answer in cluster.client.stream([frame] * options.frames):
                    if answer.outputs is None:
                        raise SystemExit(f"frame {answer.number} was not answered")
                said = cluster.client.status()[0]
            needed = manifest.weight_bytes + largest_activations(manifest)
            say = {key: f"{said[key] / 1e6:.1f}" for key in ("empty_rss_bytes", "rss_bytes", "peak_rss_bytes")}
            results.say(
                f"{name_of(model)}, {options.split}, {options.devices} devices, window {options.window}: weights "
                f"{manifest.weight_bytes / 1e6:.1f}, activations {largest_activations(manifest) / 1e6:.1f}, empty "
                f"{say['empty_rss_bytes']}, peak while loading {loaded / 1e6:.1f}, after {options.frames} frames "
                f"{say['rss_bytes']}, peak {say['peak_rss_bytes']} MB: "
                f"{(said['peak_rss_bytes'] - needed) / 1e6:.1f} MB over weights and activations, "
                f"{(said['rss_bytes'] - needed) / 1e6:.1f} in the end"
            )


if __name__ == "__main__":
    main()
