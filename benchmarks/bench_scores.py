"""Scores: exact s3 beside a naive loop, fisher's ranking beside the exact one, and all three scores of large models.

    python benchmarks/bench_scores.py

The naive loop runs the whole network once for every removed neuron: on all images at once, as somebody would write it
who knows about batches, and image by image. Both sides use the same images and threads and alternate; a ratio is the
median of paired runs. Trained models and images are read from ../shared beside the checkout; what is absent there is
left out, and said to be. The large models have random weights: how long they take does not depend on them. There is
nothing to pair them with, so their times are for the machine that is named.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from paired import paired, record, seconds
from scipy.stats import spearmanr

import robustdice as rd
from robustdice.importance.divergence import jensen_shannon
from robustdice.importance.exact import removal_divergences
from robustdice.importance.gradients import divergences, units_of
from robustdice.model.network import Network, on_best_device

SHARED = Path(__file__).parents[2] / "shared"
DIGITS = "robustdice.demo.network:digits_cnn"
CIFAR = "cifar10-train.zip"
RANKED = {
    "resnet20_cifar10": (CIFAR, 64),
    "alexnet_cifar10": (CIFAR, 64),
    "vgg16_bn_half_cifar10": (CIFAR, 64),
    "convnext_small_cifar10": (CIFAR, 64),
    "mobilenet_v2_imagenet": ("imagenet-sample.zip", 8),
}
"""Models whose rankings are compared, on which images and on how many of them."""
LARGE = ("alexnet", "vgg16_bn")
SAMPLES = 64
ROUNDS = 3


def subject(name: str, data: str, samples: int) -> tuple[Network, torch.Tensor] | None:
    """A model and images for it, or None when it is not on this machine."""
    source = name if ":" in name else str(SHARED / "models" / f"{name}.pt2")
    images = data if data == "digits" else str(SHARED / "data" / data)
    if not all(path in (DIGITS, "digits") or Path(path).is_file() for path in (source, images)):
        print(f"{name}: left out, {source} or {images} is not here", flush=True)
        return None
    network = rd.load_model(source)
    dataset = rd.load_data(images, network.preprocessing, network.outputs, split="train").sample(samples)
    return network, on_best_device(torch.from_numpy(dataset.images()))


def naive(network: Network, images: torch.Tensor, at_once: int) -> list[np.ndarray]:
    """s3 of every neuron by one run of the whole network each, ``at_once`` images at a time."""
    images = torch.empty(images.shape).copy_(images)  # in the layout that PyTorch gives by itself
    everything = [torch.ones(layer.layer.neurons, dtype=torch.bool) for layer in network.layers]
    found = []
    with torch.no_grad():
        parts = torch.split(images, at_once)
        intact = [network.run(part).double().softmax(1) for part in parts]
        for index, layer in enumerate(network.layers):
            scores = np.zeros(layer.layer.neurons)
            for neuron in range(layer.layer.neurons):
                masks = list(everything)
                masks[index] = everything[index].clone()
                masks[index][neuron] = False
                for part, before in zip(parts, intact, strict=True):
                    after = network.run(part, masks).double().softmax(1)
                    scores[neuron] += float(jensen_shannon(before, after).sum())
            found.append(scores / len(images))
    return found


def exact(network: Network, images: torch.Tensor) -> list[np.ndarray]:
    """s3 of every neuron, as it is shipped."""
    return [removal_divergences(network, images, index) for index in range(len(network.layers))]


def compare_with_naive(name: str, network: Network, images: torch.Tensor) -> None:
    """Print how many times faster the exact scores are than the naive loop."""
    difference = max(
        float(np.abs(a - b).max()) for a, b in zip(exact(network, images), naive(network, images, 64), strict=True)
    )
    for at_once in (len(images), 1):
        rounds = ROUNDS if at_once > 1 else 1  # image by image takes minutes
        times = paired(partial(exact, network, images), partial(naive, network, images, at_once), rounds)
        ratios = [theirs / ours for ours, theirs in times]
        print(
            f"{name}: exact s3 in {statistics.median(t for t, _ in times):.2f} s, {statistics.median(ratios):.1f} "
            f"times faster ({min(ratios):.1f}-{max(ratios):.1f}, {rounds} pairs) than a forward pass per neuron with "
            f"{at_once} images at once; largest difference {difference:.0e}",
            flush=True,
        )


def compare_rankings(name: str, network: Network, images: torch.Tensor) -> None:
    """Print the rank correlation of the s3 from backward passes with the exact one."""
    start = time.perf_counter()
    true = exact(network, images)
    exactly = time.perf_counter() - start
    fast = divergences(network, images)
    fisher = time.perf_counter() - start - exactly
    layers = [
        float(spearmanr(a, b).statistic)
        for a, b, layer in zip(true, fast, network.layers, strict=True)
        if units_of(layer) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
    ]
    overall = spearmanr(np.concatenate(true), np.concatenate(fast)).statistic
    print(
        f"{name}: {sum(map(len, true))} neurons, {len(images)} images: fisher {fisher:.1f} s, exact {exactly:.1f} s "
        f"({exactly / fisher:.0f} times); rank correlation {overall:.3f} overall, per layer {np.mean(layers):.3f} "
        f"mean, {min(layers):.3f} least",
        flush=True,
    )


def time_all_scores(name: str) -> None:
    """Print how long s1, s2 and s3 (as ``auto`` chooses) of a large model take."""
    network = rd.load_model(f"torchvision:{name}", random_weights=True)
    images = np.random.default_rng(0).standard_normal((SAMPLES, *network.input_shape), dtype=np.float32)
    times = [seconds(lambda: rd.score(network, images, s3="auto")) for _ in range(ROUNDS)]
    print(
        f"{name}: all three scores from {SAMPLES} images in {statistics.median(times):.1f} s "
        f"({min(times):.1f}-{max(times):.1f}), {torch.get_num_threads()} threads",
        flush=True,
    )


def main() -> None:
    """Print a line per comparison."""
    print(record(), flush=True)
    for name, data in ((DIGITS, "digits"), ("resnet20_cifar10", CIFAR)):
        if found := subject(name, data, SAMPLES):
            compare_with_naive(name, *found)
    for name, (data, samples) in RANKED.items():
        if found := subject(name, data, samples):
            compare_rankings(name, *found)
    for name in LARGE:
        time_all_scores(name)


if __name__ == "__main__":
    main()
