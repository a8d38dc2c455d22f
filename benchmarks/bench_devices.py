"""Two devices on one core each beside the whole model in one process on one core: AlexNet and VGG16-BN.

    python benchmarks/bench_devices.py

Plain slices (LOP), random weights, frames of 224x224 through real sockets. The ceiling is what the machine itself
allows: two processes at once, each with the whole model on a core of its own, over one such process. It is below 2
where the two cores share the memory's bandwidth.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import robustdice as rd
from robustdice.meter.throughput import bench_build, measure_whole
from robustdice.meter.whole import whole_model

MODELS = {"alexnet": 4.0, "vgg16_bn": 10.0}
"""Seconds of each measurement."""
ROUNDS = 5


def main() -> None:
    """Print two lines per model."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("this benchmark needs two cores")
    for name, seconds in MODELS.items():
        network = rd.load_model(f"torchvision:{name}", random_weights=True)
        with tempfile.TemporaryDirectory() as directory:
            build = rd.build(network, rd.partition(network, devices=2, method="lop"), Path(directory) / "build")
            model = Path(directory) / "whole.onnx"
            model.write_bytes(whole_model(network))
            ceilings = []
            for _ in range(ROUNDS):
                (one,) = measure_whole(model, network.input_shape, seconds, cores[:1])
                ceilings.append(sum(measure_whole(model, network.input_shape, seconds, cores)) / one)
            result = bench_build(build, seconds=seconds, rounds=ROUNDS, window=4)
        print(
            f"{name}: 2 devices {result.frames_per_second:.2f} frames/s, one process "
            f"{result.single_frames_per_second:.2f}, ratio {result.ratio:.2f} "
            f"({min(result.ratios):.2f}-{max(result.ratios):.2f})"
        )
        print(f"{name}: ceiling {statistics.median(ceilings):.2f} ({min(ceilings):.2f}-{max(ceilings):.2f})")


if __name__ == "__main__":
    main()
