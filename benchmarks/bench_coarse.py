"""What coarse copies cost a device in time and resident memory, beside the same in float32.

    python benchmarks/bench_coarse.py [--models DIR] [NAME ...]

Layers alone, and whole models (``DIR/NAME.pt2``, by default the shared ones; what is absent is left out), or those of
these names. Codes are random: neither time nor memory depends on them (entropy codes are of normally distributed
weights). Times are processor time of one thread, in pairs, which holds on a
machine that does other things too; memory is what the bundle adds to an empty process after ten frames of batch 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from paired import record
from torch import nn

import robustdice as rd
from robustdice.bundle.onnx_graph import export_onnx
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.entropy_code import CODED
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network, build_network
from robustdice.plan import Holder, Plan
from robustdice.representation import REPRESENTATIONS, CoarseFilter, CoarseLayer, code_range
from robustdice.rounding.coded import scales_and_levels
from robustdice.rounding.layer import of_levels
from robustdice.runtime.executor import Executor

ROUNDS = 15
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 1024 -> 1024": (lambda: nn.Linear(1024, 1024), (1024,)),
    "linear 4096 -> 1024": (lambda: nn.Linear(4096, 1024), (4096,)),
    "linear 9216 -> 4096": (lambda: nn.Linear(9216, 4096), (9216,)),
    "pointwise 384 -> 1536, 14x14": (lambda: pooled(nn.Conv2d(384, 1536, 1)), (384, 14, 14)),
    "3x3 64 -> 64, 32x32": (lambda: pooled(nn.Conv2d(64, 64, 3, padding=1)), (64, 32, 32)),
    "3x3 256 -> 256, 8x8": (lambda: pooled(nn.Conv2d(256, 256, 3, padding=1)), (256, 8, 8)),
    "3x3 512 -> 512, 14x14": (lambda: pooled(nn.Conv2d(512, 512, 3, padding=1)), (512, 14, 14)),
}
MODELS = (
    "resnet20_cifar10",
    "mobilenet_v2_imagenet",
    "alexnet_cifar10",
    "vgg16_bn_half_cifar10",
    "convnext_small_cifar10",
)


def pooled(convolution: nn.Module) -> nn.Module:
    """A convolution as a model: its channels' means are class scores."""
    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def random_copies(layer: NetworkLayer, kind: str) -> CoarseLayer:
    """Copies of a layer in which every weight is drawn anew; a scale for each neuron."""
    random, of = np.random.default_rng(0), layer.layer

    def filters(weights: int, kind: str) -> CoarseFilter:
        if kind in CODED:
            wanted = torch.randn(of.neurons, weights, generator=torch.Generator().manual_seed(0)) / weights**0.5
            return of_levels(*scales_and_levels(wanted, kind), kind, weights)
        low, high = code_range("int8" if kind == "float16" else kind)
        codes = random.integers(low, high + 1, (of.neurons, weights))
        scales = np.full((of.neurons, int(kind != "float16")), 1 / (high * weights**0.5), np.float16)
        return CoarseFilter(kind, codes / 1000 if kind == "float16" else codes, scales, weights)

    size = of.tail_filter_weights // max(of.tail_filters, 1)
    tail = {name: filters(size, "int8") for name in layer.tail_filters}
    return CoarseLayer(filters(of.filter_weights, kind), np.zeros(of.neurons, np.float16), tail)


def whole(network: Network, kind: str) -> Plan:
    """Everything on two devices in one representation; first and last layer of a deep network not below 8 bits."""
    plan = rd.partition(network, devices=2, method="full")
    ends = {0, len(network.layers) - 1} if len(network.layers) > 1 else set()
    kinds = [
        "int8" if number in ends and kind not in ("float32", "float16") else kind
        for number in range(len(network.layers))
    ]
    shards = tuple(
        tuple(replace(shard, holders=tuple(Holder(device, kind) for device in shard.devices)) for shard in of_layer)
        for kind, of_layer in zip(kinds, plan.shards, strict=True)
    )
    coarse = {
        (number, kind): random_copies(network.layers[number], kind)
        for number, kind in enumerate(kinds)
        if kind != "float32"
    }
    return replace(plan, shards=shards, coarse=coarse)


def frame_of(executor: Executor) -> Callable[[], object]:
    """One frame through a bundle that needs nobody else."""
    manifest = executor.manifest
    frame = np.random.default_rng(0).standard_normal((1, *manifest.input_shape), dtype=np.float32)
    return lambda: executor.run_local(0, {manifest.input: frame})


def memory_of(bundle: Path) -> int:
    """What a bundle adds to an empty process."""
    code = (
        "import json, sys\n"
        "import numpy as np\n"
        "from robustdice.bundle.read import load_bundle\n"
        "from robustdice.runtime.executor import Executor\n"
        "from robustdice.runtime.memory import rss_bytes\n"
        "before = rss_bytes()\n"
        "executor = Executor(load_bundle(sys.argv[1]))\n"
        "manifest = executor.manifest\n"
        "frame = np.zeros((1, *manifest.input_shape), np.float32)\n"
        "for _ in range(10): executor.run_local(0, {manifest.input: frame})\n"
        "print(json.dumps(rss_bytes() - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)  # noqa: S603
    return int(json.loads(done.stdout))


def compare(name: str, network: Network) -> None:
    """Print a row for each representation."""
    graph = export_onnx(network)
    with tempfile.TemporaryDirectory() as directory:
        bundles = {}
        for kind in REPRESENTATIONS:
            bundles[kind] = write_bundles(network, whole(network, kind), Path(directory) / kind, graph=graph)[0]
        images = np.random.default_rng(0).standard_normal((8, *network.input_shape), dtype=np.float32)
        rounding = rd.round_activations(network, whole(network, "int8"), images)
        bundles["int8, inputs too"] = write_bundles(network, rounding, Path(directory) / "inputs", graph=graph)[0]
        base = frame_of(Executor(load_bundle(bundles["float32"])))
        for kind, bundle in bundles.items():
            executor = Executor(load_bundle(bundle))
            ratios, milliseconds = times(frame_of(executor), base)
            print(
                f"| {name} | {kind} | {executor.manifest.weight_bytes / 1e6:.2f} | {memory_of(bundle) / 1e6:.1f} | "
                f"{milliseconds:.2f} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |",
                flush=True,
            )


def times(work: Callable[[], object], base: Callable[[], object]) -> tuple[list[float], float]:
    """Ratios of processor time of this thread, in pairs, and the median of the first's in milliseconds."""
    found = []
    for number in range(-2, ROUNDS):  # the first two to warm up
        order = (work, base) if number % 2 else (base, work)
        taken = {}
        for each in order:
            start = time.thread_time()
            each()
            taken[each] = time.thread_time() - start
        found.append((taken[work], taken[base]))
    found = found[2:]
    return [a / b for a, b in found], 1e3 * statistics.median(a for a, _ in found)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[2] / "shared" / "models")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()

    def wanted(name: str) -> bool:
        return not options.names or name in options.names

    print(record())
    print("\n| layer or model | representation | weights MB | resident MB | ms | time / float32 |")
    print("|---|---|---|---|---|---|")
    for name, (make, shape) in LAYERS.items():
        if not wanted(name):
            continue
        with torch.no_grad():
            dynamic = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(make().eval(), (torch.zeros(2, *shape),), dynamic_shapes=dynamic)
        compare(name, build_network(program, name))
    for name in MODELS:
        if wanted(name) and (path := options.models / f"{name}.pt2").exists():
            compare(name, rd.load_model(str(path)))


if __name__ == "__main__":
    main()
