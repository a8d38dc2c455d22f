"""What the paper reports: ImageNet-1K top-1, as fractions; worst cases for RobustDiCE, best ones for LOP.

Only what is at hand. Where a table of ours has a place for a number that is not, it says so.
"""

from __future__ import annotations

MODELS = ("torchvision:alexnet", "torchvision:vgg16_bn", "torchvision:convnext_tiny")

MEMORY = {
    "torchvision:alexnet": {4: 0.482, 3: 0.535, 2: 0.658},
    "torchvision:vgg16_bn": {4: 0.623, 3: 0.688, 2: 0.765},
    "torchvision:convnext_tiny": {4: 0.653, 3: 0.733, 2: 0.860},
}
"""The largest device's memory over full replication's, by number of devices (Table II): of running processes."""

PARAMETERS = {4: (0.28, 0.32)}
"""What of the parameters RobustDiCE's largest device holds, by number of devices: our estimate, not the paper's."""

FULL_ALEXNET_MEGABYTES = 150.9
"""Full replication of AlexNet (Table II): too little for its 61 M parameters in float32, so of two bytes each."""

OF_TABLE2 = (
    "Of the paper's Table II our notes have RobustDiCE's memory over full replication's, of running processes; that "
    f"full replication of AlexNet takes {FULL_ALEXNET_MEGABYTES} MB, which is two bytes a parameter and the rest "
    "(here parameters take four); and of frames per second that ConvNeXt-Tiny reaches 29 behind 1 Gbit/s, without the "
    "method or the number of devices. Of CDC's memory, of all other frames per second and of energy they have nothing."
)
"""What is known of it here."""

CLEAN = {"torchvision:alexnet": 0.5655}
"""Of the model alone."""

ACCURACY: dict[tuple[str | None, int, int, str], float] = {
    ("torchvision:alexnet", 4, 1, "robustdice"): 0.5240,
    ("torchvision:alexnet", 4, 2, "robustdice"): 0.4528,
    ("torchvision:alexnet", 4, 3, "robustdice"): 0.2893,
    ("torchvision:alexnet", 4, 1, "lop"): 0.4107,
    ("torchvision:alexnet", 4, 2, "lop"): 0.2350,
    ("torchvision:alexnet", 4, 3, "lop"): 0.0642,
    ("torchvision:vgg16_bn", 4, 1, "robustdice"): 0.7250,
    ("torchvision:convnext_tiny", 4, 1, "robustdice"): 0.7682,
}
"""By model, devices, failed devices and method (Figure 2; Table I for one failure and all three scores)."""

NOT_AT_HAND = (
    "Not at hand of the paper's numbers: 18 of Table I's 21 (every subset of the scores but all three), of Figure 2 "
    "those of three and of two devices, of CDC, and of VGG16-BN and ConvNeXt-Tiny beyond one device down, and of "
    "Table II all megabytes but full AlexNet's."
)
