"""The demo's network, as a user would bring one: a trained PyTorch module and the preprocessing it expects.

``robustdice.demo.network:digits_cnn`` is a MODEL for every command. scripts/train_digits.py has trained it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustdice.model.digits import PREPROCESSING

WEIGHTS_FILE = Path(__file__).with_name("digits_cnn.pt")
RECORD_FILE = WEIGHTS_FILE.with_suffix(".json")
"""How the weights were made, and how good they are: written by the training script, checked by a test."""


class DigitsCNN(nn.Module):
    """Three convolutions and two linear layers: float32[batch, 1, 32, 32] -> logits float32[batch, 10]."""

    preprocessing: ClassVar[Mapping[str, Any]] = PREPROCESSING
    """What load_model takes from a module that says it, as it does from a sidecar."""

    def __init__(self) -> None:  # noqa: D107 -- the class says it
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 96),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(96 * 2 * 2, 128),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits for normalised images."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def digits_cnn(random_weights: bool = False) -> DigitsCNN:
    """The network in eval mode, trained unless ``random_weights`` are asked for."""
    network = DigitsCNN()
    if not random_weights:
        network.load_state_dict(torch.load(WEIGHTS_FILE, map_location="cpu", weights_only=True))
    return network.eval()


def _convolution(inputs: int, neurons: int) -> list[nn.Module]:
    # The normalisation that follows has a shift of its own: a bias would do nothing.
    return [nn.Conv2d(inputs, neurons, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(neurons), nn.ReLU()]
