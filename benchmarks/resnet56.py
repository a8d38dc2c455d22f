"""The 56-layer ResNet for CIFAR (He et al. 2015, section 4.2) with random weights: ``resnet56:resnet56``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS, CHANNELS = 9, (16, 32, 64)


class Block(nn.Module):
    """Two convolutions and what goes past them, thinned out and padded with zeros where the size changes (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Half the size where there are more ``outputs`` than ``inputs``."""
        super().__init__()
        self.stride, self.more = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.bn2.weight, 0.3)  # the sum of 27 blocks stays of the size of one

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        past = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + nn.functional.pad(past, (0, 0, 0, 0, 0, self.more)))


def resnet56() -> nn.Module:
    """[N, 3, 32, 32] -> [N, 10], in evaluation mode, with the preprocessing of CIFAR's models."""
    widths = [(CHANNELS[max(0, k - (block == 0))], CHANNELS[k]) for k in range(3) for block in range(BLOCKS)]
    stem = (nn.Conv2d(3, CHANNELS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(CHANNELS[0]), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 10))
    model = nn.Sequential(*stem, *(Block(*each) for each in widths), *head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model.preprocessing = {  # type: ignore[assignment]
        "input_size": [3, 32, 32],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    return model.eval()
