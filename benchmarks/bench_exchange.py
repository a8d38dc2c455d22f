"""What an exchange costs a device beside its arithmetic: CPU time in all threads, by size of message and devices.

    python benchmarks/bench_exchange.py [--devices 2 4] [--kib 4 16 64] [--frames N]

A chain of small convolutions, dealt out in plain slices (LOP), so that every device sends the same to each of its
peers after each of them; real processes, real sockets, a window of four frames. A device says how much CPU time all of
its threads have taken; the arithmetic is what its models take when they are run one after the other in one process, by
ONNX Runtime alone. The rest, over the exchanges, is the figure, of the median device. It has in it what a frame costs
that is no exchange: its arrival and its answer. It is taken of stretches of ten frames, for the median and the least of
them: where other work is on the processor, caches are cold and the least says more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import robustdice as rd
from robustdice.bundle.read import load_bundle
from robustdice.runtime.sessions import open_session

LAYERS = 20
SIDE = 16
WINDOW = 4
REPEATS = 50
STRETCH = 10


def chain(kib: int, devices: int) -> torch.nn.Module:
    """Convolutions of which every device's part hands over ``kib`` KiB."""
    channels = kib * 1024 * devices // (4 * SIDE * SIDE)
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(3, channels, 1), torch.nn.ReLU()]
    for _ in range(LAYERS - 1):
        layers += [torch.nn.Conv2d(channels, channels, 1), torch.nn.ReLU()]
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(channels, 10)
    )


def arithmetic_ms(build: Path) -> float:
    """CPU time that a device's models take for a frame."""
    bundle = load_bundle(build / "device-0")
    manifest = bundle.manifest
    values = {exchange.value: np.ones((1, *exchange.shape), np.float32) for exchange in manifest.exchanges}
    values[manifest.input] = np.ones((1, *manifest.input_shape), np.float32)
    calls = []
    for part in manifest.parts:
        session, outputs = open_session(bundle.path(part.file), threads=1), list(part.outputs)
        inputs = {name: values[name] for name in part.inputs}
        values.update(zip(outputs, session.run(outputs, inputs), strict=True))
        calls.append((session, outputs, inputs))
    start = time.process_time()
    for _ in range(REPEATS):
        for session, outputs, inputs in calls:
            session.run(outputs, inputs)
    return 1e3 * (time.process_time() - start) / REPEATS


def measure(kib: int, devices: int, frames: int) -> None:
    """Print a line."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        batch = torch.export.Dim("batch")
        images = (torch.zeros(2, 3, SIDE, SIDE),)
        program = torch.export.export(chain(kib, devices).eval(), images, dynamic_shapes=({0: batch},))
        torch.export.save(program, Path(directory) / "chain.pt2")
        network = rd.load_model(Path(directory) / "chain.pt2")
        plan = rd.partition(network, devices=devices, method="lop")
        build = rd.build(network, plan, Path(directory) / "build")
        arithmetic = arithmetic_ms(build)
        with rd.LocalCluster(build, timeout_seconds=30.0, window=WINDOW) as cluster:
            frame = np.random.default_rng(0).standard_normal(network.input_shape, dtype=np.float32)
            for _ in cluster.client.stream([frame] * (frames // 4)):
                pass
            spent = []
            for _ in range(max(1, frames // STRETCH)):
                before = cluster.client.status()
                assert all(answer.coverage == 1.0 for answer in cluster.client.stream([frame] * STRETCH))
                after = cluster.client.status()
                spent.append(statistics.median(after[d]["cpu_seconds"] - before[d]["cpu_seconds"] for d in after))
    exchanges = LAYERS + 1
    part = arithmetic / exchanges
    usual, least = (1e3 * seconds / STRETCH / exchanges - part for seconds in (statistics.median(spent), min(spent)))
    print(
        f"{devices} devices, {kib} KiB to each peer: {usual:.3f} ms (least {least:.3f}) "
        f"beside {part:.3f} of arithmetic",
        flush=True,
    )


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--kib", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--frames", type=int, default=100)
    options = parser.parse_args()
    for devices in options.devices:
        for kib in options.kib:
            measure(kib, devices, options.frames)


if __name__ == "__main__":
    main()
