"""Evaluating every failure set of a plan, beside as many plain inference passes over the same images.

    python benchmarks/bench_evaluate.py

A plain pass reads no image and loses no neuron: batches of the evaluator's size, prepared beforehand, through the
network. Both alternate; the ratio is the median of paired runs. It is below 1 where failure sets share layers (what is
computed before the first difference), and much below it where they share answers. Models and images come from ../shared
beside the checkout; what is absent there is left out.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

import robustdice as rd
from robustdice.failure.evaluate import images_at_once
from robustdice.model.network import on_best_device

SHARED = Path(__file__).parents[2] / "shared"
SUBJECTS = {
    "resnet20_cifar10": ("cifar10-test.zip", 1000),
    "vgg16_bn_half_cifar10": ("cifar10-test.zip", 1000),
    "mobilenet_v2_imagenet": ("imagenet-sample.zip", 100),
}
DEVICES = 4
ROUNDS = 3


def main() -> None:
    """Print a line per model and plan."""
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
            ratios = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                with torch.no_grad():
                    for batch in batches:
                        network.run(batch)
                plain = time.perf_counter() - start
                start = time.perf_counter()
                sets = len(rd.evaluate(network, plan, dataset).accuracy)
                ratios.append((time.perf_counter() - start) / (sets * plain))
            print(
                f"{name}, {plan.method}: {sets} failure sets take {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f}-{max(ratios):.2f}) times as long as {sets} plain passes over {samples} images",
                flush=True,
            )


if __name__ == "__main__":
    main()
