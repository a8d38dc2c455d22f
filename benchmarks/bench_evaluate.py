"""Evaluating every failure set of a plan, beside as many plain inference passes over the same images.

    python benchmarks/bench_evaluate.py

A plain pass reads no image and loses no neuron: batches of the evaluator's size, prepared beforehand, through the
network. Both alternate; the ratio is the median of paired runs. It is below 1 where failure sets share layers (what is
computed before the first difference), and much below it where they share answers. Models and images come from ../shared
beside the checkout; what is absent there is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from paired import paired, record

import robustdice as rd
from robustdice.failure.evaluate import choose_failure_sets
from robustdice.model.network import Network, images_at_once, on_best_device

SHARED = Path(__file__).parents[2] / "shared"
SUBJECTS = {
    "resnet20_cifar10": ("cifar10-test.zip", 1000),
    "vgg16_bn_half_cifar10": ("cifar10-test.zip", 1000),
    "mobilenet_v2_imagenet": ("imagenet-sample.zip", 100),
}
DEVICES = 4
ROUNDS = 3


def pass_over(network: Network, batches: Sequence[torch.Tensor]) -> None:
    """Every image through the network once."""
    with torch.no_grad():
        for batch in batches:
            network.run(batch)


def main() -> None:
    """Print a line per model and plan."""
    print(record(), flush=True)
    for name, (data, samples) in SUBJECTS.items():
        model, images = SHARED / "models" / f"{name}.pt2", SHARED / "data" / data
        if not model.is_file() or not images.is_file():
            print(f"{name}: left out, {model} or {images} is not here")
            continue
        network = rd.load_model(str(model))
        dataset = rd.load_data(str(images), network.preprocessing, network.outputs).sample(samples)
        scores = rd.score(network, dataset.sample(16).images(), columns=("s1", "s2"))
        plans = [
            rd.partition(network, scores, devices=DEVICES, memory=0.5),
            *(rd.partition(network, devices=DEVICES, method=method) for method in ("lop", "cdc", "full")),
        ]
        size = images_at_once(network)
        batches = torch.split(on_best_device(torch.from_numpy(dataset.images())), size)
        for plan in plans:
            sets = len(choose_failure_sets(plan.devices))
            times = paired(partial(pass_over, network, batches), partial(rd.evaluate, network, plan, dataset), ROUNDS)
            ratios = [all_sets / (sets * plain) for plain, all_sets in times]
            print(
                f"{name}, {plan.method}: {sets} failure sets take {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f}-{max(ratios):.2f}) times as long as {sets} plain passes over {samples} images",
                flush=True,
            )


if __name__ == "__main__":
    main()
