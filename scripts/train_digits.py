"""Train the demo's network and write its weights and their record into src/robustdice/demo.

Run it with ``.venv/bin/python scripts/train_digits.py``; it takes a minute or two on two cores. The same seed gives
the same network on the same machine and PyTorch, and a network as good elsewhere.
"""

from __future__ import annotations

import argparse
import io
import json
import math

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from robustdice.demo.network import RECORD_FILE, WEIGHTS_FILE, DigitsCNN
from robustdice.files import write_atomically
from robustdice.images import normalise_pixels
from robustdice.model.digits import Split, digits

BATCH = 50
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2


def main() -> None:
    """Parse the command line, train, measure, write."""
    parser = argparse.ArgumentParser(description="Train the demo's network on scikit-learn's digits.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()

    network = train(arguments.seed, arguments.epochs)
    images, classes = load("test")
    accuracy = measure(network, images, classes)
    record = {
        "test_accuracy": accuracy,
        "test_images": len(classes),
        "train_images": len(load("train")[1]),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "seed": arguments.seed,
        "epochs": arguments.epochs,
    }
    weights = io.BytesIO()
    torch.save(network.state_dict(), weights)
    write_atomically(WEIGHTS_FILE, weights.getvalue())
    write_atomically(RECORD_FILE, json.dumps(record, indent=1).encode() + b"\n")
    print(json.dumps(record))


def load(split: Split) -> tuple[Tensor, Tensor]:
    """Normalised images, float32[images, 1, 32, 32], and their classes."""
    images, classes = digits(split)
    pixels = images.astype(np.float32) / np.float32(255)
    return torch.from_numpy(normalise_pixels(pixels, DigitsCNN.preprocessing)), torch.from_numpy(classes)


def train(seed: int, epochs: int) -> DigitsCNN:
    """A network trained from scratch on the training images only, in eval mode."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    images, classes = load("train")
    network = DigitsCNN().train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in track(range(epochs), description="Training"):
        for batch in torch.split(torch.randperm(len(images)), BATCH):
            loss = functional.cross_entropy(network(augment(images[batch])), classes[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return network.eval()


def augment(images: Tensor) -> Tensor:
    """Each image rotated by up to 12 degrees, resized by up to 10 % and shifted by up to 3 pixels."""

    def uniform(largest: float) -> Tensor:
        return (2 * torch.rand(len(images)) - 1) * largest

    angle, scale = uniform(math.radians(12)), 1 + uniform(0.1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # affine_grid measures shifts in half image widths.
    shift_x, shift_y = uniform(3 / 16), uniform(3 / 16)
    rows = [torch.stack([cos, -sin, shift_x], dim=1), torch.stack([sin, cos, shift_y], dim=1)]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def measure(network: DigitsCNN, images: Tensor, classes: Tensor) -> float:
    """Top-1 accuracy, between 0 and 1."""
    with torch.inference_mode():
        return int((network(images).argmax(dim=1) == classes).sum()) / len(classes)


if __name__ == "__main__":
    main()
