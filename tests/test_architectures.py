"""Bundles of real architectures: with nobody down the model's scores, with each device down the evaluator's.

The page docs/architectures.md says how many more were tried, by the script whose functions these tests call. Weights
are random here, scaled so that every layer matters to the scores; the files of ../shared/models are trained, and their
tests are skipped where they are absent.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import architectures
from nets import random_images, relative_error
from robustdice.bundle.onnx_graph import export_onnx
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.model.pairs import possible_pairs
from robustdice.workshop import partition

BY_NAME = {  # and how many layers there are: convolutions and linear layers, less the depthwise ones in tails
    "torchvision:resnet18": 21,
    "torchvision:mobilenet_v3_small": 43,
    "torchvision:squeezenet1_1": 26,
    "torchvision:shufflenet_v2_x1_0": 41,
    "torchvision:googlenet": 58,
    "timm:ghostnet_050": 96,
    "timm:starnet_s1": 66,
}
SHARED_MODELS = Path(__file__).parents[2] / "shared" / "models"
FILES = {
    "resnet20_cifar10": 20,
    "mobilenet_v2_imagenet": 36,
    "alexnet_cifar10": 8,
    "vgg16_bn_half_cifar10": 16,
    "convnext_small_cifar10": 35,
}
TOLERANCE = 1e-4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def check(network: Network, layers: int, directory: Path) -> None:
    assert len(network.layers) == layers
    images = random_images(2, network.input_shape)[:, None]
    with torch.no_grad():
        one, other = (network.run(torch.from_numpy(image)).numpy() for image in images)
    assert relative_error(one, other) > 0.01  # the scores depend on the image
    graph = export_onnx(network)
    plans = [*architectures.plans(network), partition(network, devices=2, method="full")]
    if possible_pairs(network):
        plans.append(partition(network, devices=2, method="lop", split="hidden"))
    for plan in plans:
        errors = architectures.errors_of(network, plan, graph, directory / plan.method)
        assert max(errors.values()) < TOLERANCE, plan.method
    gc.collect()


@pytest.mark.parametrize("name", BY_NAME)
def test_bundles_of_random_weights_give_the_models_scores(name: str, tmp_path: Path) -> None:
    network = load_model(name, random_weights=True)
    architectures.settle(network)
    check(network, BY_NAME[name], tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_bundles_of_trained_weights_give_the_models_scores(name: str, tmp_path: Path) -> None:
    path = SHARED_MODELS / f"{name}.pt2"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in ../shared/models")
    check(load_model(str(path)), FILES[name], tmp_path)


def test_a_model_that_does_not_work_has_its_reason_in_the_table() -> None:
    rows: dict[str, dict[str, Any]] = {
        "torchvision:good": {"parameters": 5e6, "layers": 7, "exchanged": 2e6, "intact": 1e-6, "one down": 2e-6},
        "timm:bad": {"reason": "timm has no model 'bad' | or so"},
    }
    page = architectures.table(rows)
    assert "1 of 2 work." in page
    assert "| good | 5.0 M | 7 | 2.00 M | 1e-06 | 2e-06 |" in page
    assert "| bad | does not work: timm has no model 'bad' / or so | | | | |" in page
