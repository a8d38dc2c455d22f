"""The same work as a user would do it with torch.distributed: tensor-parallel slices over Gloo, two processes.

    python benchmarks/bench_gloo.py [--models alexnet vgg16_bn] [--rounds N] [--seconds S] [--builds DIR] [--out FILE]

Each process, on a core of its own with one thread, has half of every layer's neurons and computes what follows each of
them channel by channel; all are gathered after each layer. PyTorch computes, one frame after the other: whoever wants
several in flight, or an answer after a failure, has to write that. Beside it PyTorch with the whole model in one
process on one core, and the same with ONNX Runtime. Random weights, frames of 224x224, nothing encrypted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from builds import Builds
from paired import Results, spread
from torch import distributed, multiprocessing, nn

from robustdice.meter.throughput import measure_whole
from robustdice.model.builders import import_torchvision

SHAPE = (3, 224, 224)
PROCESSES = 2


def steps(model: Any) -> Iterator[nn.Module]:
    """The modules of AlexNet or a VGG, one after the other."""
    yield from model.features
    yield model.avgpool
    yield nn.Flatten()
    yield from model.classifier


def sliced(model: nn.Module, rank: int) -> list[tuple[nn.Module, bool]]:
    """The modules with one process's part of every layer and what follows it, and whether all is gathered behind."""
    found: list[tuple[nn.Module, bool]] = []
    for module in steps(model):
        if isinstance(module, nn.Conv2d | nn.Linear):
            found.append((_part(module, rank), True))
            continue
        if isinstance(module, nn.BatchNorm2d | nn.ReLU | nn.MaxPool2d) and found and found[-1][1]:
            found[-1] = found[-1][0], False  # it is gathered behind this one instead
            found.append((_part(module, rank) if isinstance(module, nn.BatchNorm2d) else module, True))
        elif not isinstance(module, nn.Dropout):
            found.append((module, False))
    return found


def _part(module: nn.Module, rank: int) -> nn.Module:
    """A layer, or a batch norm, with a half of its neurons."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dim():
            half = tensor.detach().chunk(PROCESSES)[rank].clone()
            setattr(module, name, nn.Parameter(half, requires_grad=False) if name in module._parameters else half)
    return module


def gathered(part: torch.Tensor) -> torch.Tensor:
    """All processes' parts [1, neurons, ...] beside each other."""
    parts = [torch.empty_like(part) for _ in range(PROCESSES)]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts, 1)


def serve(rank: int, name: str, core: int, meeting: str, pipe: Connection, whole: bool) -> None:
    """One process: streams frames for as long as it is told, and says how many per second. The first one decides."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = import_torchvision().models.get_model(name).eval()
    frame = torch.randn(1, *SHAPE)
    with torch.inference_mode():
        expected = model(frame)
        run: Callable[[], torch.Tensor] = lambda: model(frame)  # noqa: E731
        if not whole:
            distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=PROCESSES)
            modules = sliced(model, rank)

            def run() -> torch.Tensor:
                x = frame
                for module, gathers in modules:
                    x = gathered(module(x)) if gathers else module(x)
                return x

            error = float((run() - expected).abs().max() / expected.abs().max())
            assert error < 1e-4, error
        while (seconds := pipe.recv()) is not None:
            pipe.send(_rate(run, seconds, whole))


def _rate(run: Callable[[], torch.Tensor], seconds: float, whole: bool) -> float:
    frames, start, goes_on = 0, time.perf_counter(), torch.ones(1)
    while goes_on.item():
        run()
        frames += 1
        goes_on[0] = float(time.perf_counter() - start < seconds)
        if not whole:
            distributed.broadcast(goes_on, 0)
    return frames / (time.perf_counter() - start)


class Processes:
    """Some processes that compute together."""

    def __init__(self, name: str, cores: list[int], meeting: str, whole: bool) -> None:
        """``cores``: one for each."""
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank, core in enumerate(cores):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, name, core, meeting, theirs, whole), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def rate(self, seconds: float) -> float:
        """Frames per second."""
        for pipe in self._pipes:
            pipe.send(seconds)
        return min(float(pipe.recv()) for pipe in self._pipes)

    def end(self) -> None:
        """End them."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["alexnet", "vgg16_bn"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--builds", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:PROCESSES]
    if len(cores) < PROCESSES:
        raise SystemExit("this benchmark needs two cores")
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        builds = Builds(options.builds or Path(temporary))
        for name in options.models:
            whole = builds.whole(name)
            both = Processes(name, cores, f"{temporary}/{name}", whole=False)
            one = Processes(name, cores[:1], "", whole=True)
            for each in (both, one):
                each.rate(min(options.seconds, 1.0))
            found: list[tuple[float, float, float]] = []
            for number in range(options.rounds):
                order = [both, one]
                rates = {each: each.rate(options.seconds) for each in (order if number % 2 else reversed(order))}
                (onnx,) = measure_whole(whole, SHAPE, options.seconds, cores[:1])
                found.append((rates[both], rates[one], onnx))
            for each in (both, one):
                each.end()
            together, alone, onnx = (statistics.median(each) for each in zip(*found, strict=True))
            results.say(
                f"{name}: 2 processes with Gloo {together:.2f} frames/s, PyTorch alone {alone:.2f}, ratio "
                f"{spread([a / b for a, b, _ in found])}; ONNX Runtime alone {onnx:.2f}, Gloo over that "
                f"{spread([a / c for a, _, c in found])}"
            )


if __name__ == "__main__":
    main()
