"""Small networks that say in a few lines what architectures are made of, and how to make a Network of them."""

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from robustdice.bundle.onnx_graph import OnnxGraph, export_onnx
from robustdice.entropy_code import CODED
from robustdice.model.layers import NetworkLayer
from robustdice.model.network import Network, build_network
from robustdice.model.tracing import quiet
from robustdice.plan import Holder, Plan, Shard, failure_sets
from robustdice.representation import (
    BITS,
    REPRESENTATIONS,
    CoarseFilter,
    CoarseLayer,
    Correction,
    code_range,
)
from robustdice.rounding.affine import can_shift
from robustdice.rounding.coded import scales_and_levels
from robustdice.rounding.layer import of_levels

Floats = NDArray[np.float32]


class Residual(nn.Module):
    """A residual block, a depthwise convolution in a tail, a grouped convolution: [3, 8, 8] -> 5 classes.

    ``tails`` says for every layer of the network which module ends its tail.
    """

    tails = ("pool", "act2", "depthwise", "grouped_act", "head")

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.act1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.act2 = nn.ReLU()
        self.expand = nn.Conv2d(6, 8, 1)
        self.expand_act = nn.ReLU6()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.grouped_act = nn.SiLU()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act1(self.norm1(self.conv1(x))))
        x = x + self.act2(self.conv2(x))
        x = self.depthwise(self.expand_act(self.expand(x)))
        x = self.grouped_act(self.grouped(x))
        # Two users of the grouped layer's value end its tail before the pooling.
        result: Tensor = self.head((x * 0.5 + x * x).mean((2, 3)))
        return result


class Plain(nn.Module):
    """A convolution, pooling, flattening, two linear layers: [1, 8, 8] -> 4 classes."""

    tails = ("flatten", "act2", "fc2")

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.act1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(6 * 16, 7)
        self.act2 = nn.Tanh()
        self.fc2 = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.pool(self.act1(self.conv(x))))
        result: Tensor = self.fc2(self.act2(self.fc1(x)))
        return result


class Branches(nn.Module):
    """Two branches and a concatenation, channel shuffle, fully convolutional head: [2, 6, 6] -> 3 classes."""

    tails = ("left", "right_act", "mix", "squeeze")

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 1)
        self.right = nn.Conv2d(2, 6, 3, padding=1)
        self.right_act = nn.LeakyReLU(0.1)
        self.shuffle = nn.ChannelShuffle(2)
        self.mix = nn.Conv2d(10, 5, 3)
        self.act = nn.GELU()
        self.head = nn.Conv2d(5, 3, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right_act(self.right(x))], 1)
        x = self.mix(self.shuffle(x))
        x = self.act(x) + x
        result: Tensor = self.squeeze(self.pool(self.head(x)))
        return result


class ChannelsLast(nn.Module):
    """A ConvNeXt block: depthwise convolution as a layer, LayerNorm, linear layers on NHWC, scale: [3, 8, 8] -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.stem_norm = nn.LayerNorm(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6).reshape(6, 1, 1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2) * self.scale
        result: Tensor = self.head((x + y).mean((2, 3)))
        return result


class Chains(nn.Module):
    """Affine chains of every kind: a batch norm without bias or without parameters, products and differences."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, bias=False)
        self.bare = nn.BatchNorm2d(5, affine=False)
        self.second = nn.Conv2d(5, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.factor = nn.Parameter(torch.linspace(0.5, 2, 4).reshape(4, 1, 1))
        self.third = nn.Conv2d(4, 6, 1, bias=False)
        self.offset = nn.Parameter(torch.linspace(-1, 1, 6).reshape(6, 1, 1))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bare(self.first(x)))
        x = torch.tanh(self.norm(self.second(x)) * self.factor)
        x = torch.relu(self.third(x) - self.offset)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def one_answer() -> nn.Module:
    """A yes or no: one score behind a sigmoid, with axes of one entry: [1, 8, 8] -> [1, 1, 1]."""
    first = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 1, 1), nn.Sigmoid())


def labels_last() -> nn.Module:
    """Scores of several labels, [1, 1, labels]: [1, 8, 8] -> 5."""
    layers = [nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Unflatten(1, (1, 1, 5)))


def scores_of(module: nn.Module, images: Floats) -> Floats:
    """The class scores of a module, before the sigmoid that ends it; two of them where it is a yes or no."""
    with torch.no_grad():
        scores = module(torch.from_numpy(images)).flatten(1)
    if any(isinstance(part, nn.Sigmoid) for part in module.modules()):
        scores = scores.logit()
    return (torch.cat([0 * scores, scores], 1) if scores.shape[1] == 1 else scores).numpy()


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module with seeded random weights, batch norm statistics included, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight)  # so that every layer matters to the scores
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                nn.init.normal_(part.running_mean)
                nn.init.uniform_(part.running_var, 0.5, 2)
                if part.affine:
                    nn.init.normal_(part.weight)
                    nn.init.normal_(part.bias)
    return module.eval()


def export(module: nn.Module, *shape: int, batch: int | None = None) -> ExportedProgram:
    """The module exported with a dynamic batch size, or with ``batch`` as the only one."""
    dynamic = None if batch else ({0: Dim("batch")},)
    with quiet():
        return torch.export.export(module, (torch.zeros(batch or 2, *shape),), dynamic_shapes=dynamic)


def save(module: nn.Module, path: Path, *shape: int, sidecar: object = None) -> str:
    """Write a module as a .pt2 file, and what its sidecar is to hold; the file's path."""
    with quiet():
        torch.export.save(export(module, *shape), path)
    if sidecar is not None:
        path.with_suffix(".json").write_text(sidecar if isinstance(sidecar, str) else json.dumps(sidecar))
    return str(path)


def network_of(module: nn.Module, *shape: int) -> Network:
    """The network of a module that takes inputs of ``shape`` (without the batch)."""
    return build_network(export(module, *shape), "test")


@cache
def _shared(make: Hashable, *shape: int) -> Network:
    return network_of(seeded(cast("Callable[[], nn.Module]", make)), *shape)


def shared_network(make: Callable[[], nn.Module], *shape: int) -> Network:
    """The network of ``seeded(make)``, exported once for all tests that look at it: nobody changes a network."""
    return _shared(make, *shape)


@cache
def _shared_graph(make: Hashable, *shape: int) -> OnnxGraph:
    return export_onnx(_shared(make, *shape))


def shared_graph(make: Callable[[], nn.Module], *shape: int) -> OnnxGraph:
    """What ``write_bundles`` makes its files from, exported once: most of the time that it takes."""
    return _shared_graph(make, *shape)


def random_images(count: int, shape: Sequence[int], seed: int = 0) -> Floats:
    """Standard normal images, float32 [count, *shape]."""
    return np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32)


@contextmanager
def without(module: nn.Module, lost: Mapping[str, Sequence[int]], fill: float = 0.0) -> Iterator[None]:
    """In the original module: the entries ``lost`` along axis 1 of what the named submodules return are ``fill``."""

    def losing(entries: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.clone()
            output[:, entries] = fill
            return output

        return hook

    named = dict(module.named_modules())
    handles = [named[name].register_forward_hook(losing(list(entries))) for name, entries in lost.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_plan(network: Network, devices: int, seed: int = 0, everywhere: Sequence[int] = ()) -> Plan:
    """Every unit of every layer on random devices in random order; the layers ``everywhere`` on all of them."""
    random = np.random.default_rng(seed)
    shards = []
    for index, layer in enumerate(network.plan_layers):
        holders: dict[tuple[int, ...], list[int]] = {}
        for unit in range(layer.neurons // layer.group):
            copies = devices if index in everywhere else int(random.integers(1, devices + 1))
            order = tuple(int(device) for device in random.permutation(devices)[:copies])
            holders.setdefault(order, []).extend(range(unit * layer.group, (unit + 1) * layer.group))
        shards.append(tuple(Shard(tuple(mine), tuple(map(Holder, order))) for order, mine in holders.items()))
    return Plan(
        devices=devices,
        layers=network.plan_layers,
        shards=tuple(shards),
        shared_weights=network.shared_weights,
        method="random",
        model=network.reference,
        settings={"seed": seed},
    )


def with_pairs(plan: Plan, possible: Mapping[int, int], seed: int = 0) -> Plan:
    """The plan with some of the ``possible`` pairs of layers, chosen at random."""
    random, pairs, shards = np.random.default_rng(seed), dict[int, int](), list(plan.shards)
    for first in map(int, random.permutation(sorted(possible))):
        second = possible[first]
        if {first, second}.isdisjoint({*pairs, *pairs.values()}) and not plan.held_by_all(first):
            pairs[first] = second
            everyone = tuple(map(Holder, range(plan.devices)))
            shards[second] = (Shard(tuple(range(plan.layers[second].neurons)), everyone),)
    owned = [first for first in pairs if plan.devices > 2 and random.random() < 0.5]
    return replace(plan, shards=tuple(shards), pairs=pairs, owned=frozenset(owned))


def random_coarse(layer: NetworkLayer, kind: str, seed: int = 0, grouped: bool = True) -> CoarseLayer:
    """Codes and scales of the right shapes and sizes for one layer; what they are worth is nobody's weights. Unless
    they are ``grouped``, a neuron has one scale."""
    random = np.random.default_rng([seed, list(BITS).index(kind)])

    def filters(neurons: int, weights: int, kind: str, group: int) -> CoarseFilter:
        groups = -(-weights // group)
        if kind == "float16":
            values = random.standard_normal((neurons, weights)) * 0.3
            return CoarseFilter(kind, values, np.empty((neurons, 0), np.float16), group)
        if kind in CODED:
            wanted = torch.from_numpy(random.standard_normal((neurons, weights), np.float32) * 0.3)
            return of_levels(*scales_and_levels(wanted, kind), kind, weights)
        low, high = code_range(kind)
        scales = (random.uniform(0.3, 0.6, (neurons, groups)) / high).astype(np.float16)
        return CoarseFilter(kind, random.integers(low, high + 1, (neurons, weights)), scales, group)

    plan_layer = layer.layer
    sizes = [plan_layer.tail_filter_weights // max(plan_layer.tail_filters, 1)] * plan_layer.tail_filters
    group = int(random.integers(1, plan_layer.filter_weights + 1)) if grouped else plan_layer.filter_weights
    shift = (random.standard_normal(plan_layer.neurons, np.float32) * can_shift(layer)).astype(np.float16)
    return CoarseLayer(
        filters(plan_layer.neurons, plan_layer.filter_weights, kind, group),
        shift,
        {name: filters(plan_layer.neurons, k, "int8", k) for name, k in zip(layer.tail_filters, sizes, strict=True)},
    )


def coarsened(network: Network, plan: Plan, seed: int = 0) -> Plan:
    """The plan with a random representation for every holder, and random corrections for some failure sets."""
    random = np.random.default_rng(seed)
    shards = tuple(
        tuple(
            replace(shard, holders=tuple(Holder(d, str(random.choice(kinds))) for d in shard.devices))
            for shard in of_layer
        )
        for index, of_layer in enumerate(plan.shards)
        for offered in [[kind for kind in REPRESENTATIONS if index not in plan.pairs or kind not in CODED]]
        # Copies that all devices compute are all the same.
        for kinds in [[random.choice(offered)] if plan.held_by_all(index) else offered]
    )
    used = {(i, h.representation) for i, of in enumerate(shards) for shard in of for h in shard.holders}
    used |= {(second, kind) for first, second in plan.pairs.items() for i, kind in used if i == first}
    coarse = {
        (i, kind): random_coarse(network.layers[i], kind, seed, grouped=i not in plan.pairs.values())
        for i, kind in used
        if kind != "float32"
    }
    corrections = {
        failed: tuple(
            None
            if random.random() < 0.3
            else Correction.of(
                random.uniform(0.5, 1.5, layer.neurons).astype(np.float16),
                random.standard_normal(layer.neurons).astype(np.float16),
            )
            for layer in plan.layers
        )
        for size in range(1, plan.devices)
        for failed in failure_sets(plan.devices, size)
        if random.random() < 0.5
    }
    return replace(plan, shards=shards, coarse=coarse, corrections=corrections)


def relative_error(found: Floats, expected: Floats) -> float:
    """Largest difference over the largest expected score; infinite when other scores are missing."""
    present = np.isfinite(expected)
    if not np.array_equal(present, np.isfinite(found)) or not np.array_equal(found[~present], expected[~present]):
        return float("inf")
    if not present.any():
        return 0.0
    return float(np.abs(found[present] - expected[present]).max() / max(np.abs(expected[present]).max(), 1e-12))
