"""Bundles of real architectures: with nobody down the model's scores, under failures the evaluator's.

torchvision's models have random weights here, scaled so that every layer matters to the scores; the files of
../shared/models are trained, and their tests are skipped where they are absent.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from nets import random_images, relative_error
from robustdice.bundle.onnx_graph import OnnxGraph, export_onnx
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.importance.values import Importance
from robustdice.model.canonical import aten, attribute, execute
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.partitioning import partition
from robustdice.plan import Plan, failure_sets
from robustdice.runtime.inprocess import InProcess

TORCHVISION = {  # and how many layers there are: convolutions and linear layers, less the depthwise ones in tails
    "alexnet": 8,
    "vgg16_bn": 16,
    "convnext_tiny": 59,
    "resnet18": 21,
    "resnet50": 54,
    "mobilenet_v2": 36,
    "mobilenet_v3_small": 43,
    "efficientnet_b0": 66,
    "densenet121": 121,
    "squeezenet1_1": 26,
    "regnet_y_400mf": 86,
    "shufflenet_v2_x1_0": 41,
    "googlenet": 58,
    "mnasnet0_5": 36,
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
LARGE = 110_000_000
"""Bytes from which on each method is tried on one number of devices: writing gigabytes takes its time."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Subject:
    """An architecture, loaded and exported once."""

    name: str
    network: Network
    graph: OnnxGraph
    image: np.ndarray
    scores: np.ndarray


@pytest.fixture(scope="module", params=[*TORCHVISION, *FILES])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    name = request.param
    if name in FILES:
        path = SHARED_MODELS / f"{name}.pt2"
        if not path.is_file():
            pytest.skip(f"{path.name} is not in ../shared/models")
        network = load_model(str(path))
    else:
        network = load_model(f"torchvision:{name}", random_weights=True)
        settle(network)
    assert len(network.layers) == {**TORCHVISION, **FILES}[name]
    image, other = random_images(2, network.input_shape)[:, None]
    with torch.no_grad():
        scores = network.run(torch.from_numpy(image)).numpy()
        assert relative_error(network.run(torch.from_numpy(other)).numpy(), scores) > 0.01  # they depend on the image
    yield Subject(name, network, export_onnx(network), image, scores)
    gc.collect()


def settle(network: Network) -> None:
    """Scale every layer's weights so that its output has deviation 1, and give batch norms the statistics they see."""
    values: dict[fx.Node, object] = {network.input: torch.from_numpy(random_images(2, network.input_shape, seed=1))}
    layers = {layer.node for layer in network.layers}

    def again(nodes: list[fx.Node]) -> None:
        for node in nodes:
            del values[node]
        execute(network.module, nodes, values)

    with torch.no_grad():
        for node in network.nodes:
            execute(network.module, [node], values)
            value = values.get(node)
            if node in layers:
                assert isinstance(value, torch.Tensor)
                weight = node.args[1]
                assert isinstance(weight, fx.Node)
                attribute(network.module, str(weight.target)).div_(value.std())
                again([weight, node])
            elif node.target is aten.batch_norm.default:
                given = values[node.all_input_nodes[0]]
                assert isinstance(given, torch.Tensor)
                for argument, statistic in zip(
                    node.args[3:5], (given.mean((0, 2, 3)), given.var((0, 2, 3))), strict=True
                ):
                    assert isinstance(argument, fx.Node)
                    attribute(network.module, str(argument.target)).copy_(statistic)
                    again([argument])
                again([node])


def make_plan(network: Network, method: str, devices: int) -> Plan:
    random = np.random.default_rng(devices)
    layers = network.plan_layers
    importance = Importance(
        names=tuple(layer.name for layer in layers),
        scores=tuple(random.random((layer.neurons // layer.group, 3)) for layer in layers),
        columns=("s1", "s2", "s3"),
        model=network.reference,
    )
    return partition(
        layers,
        importance if method == "robustdice" else None,
        devices=devices,
        method=method,
        threshold=0.1 if method == "robustdice" else None,
        shared_weights=network.shared_weights,
        model=network.reference,
    )


def plan_bytes(network: Network) -> int:
    return 4 * (network.shared_weights + sum(layer.neurons * layer.neuron_weights for layer in network.plan_layers))


@pytest.mark.parametrize("method", ["robustdice", "lop", "full"])
def test_bundles_give_the_models_scores(subject: Subject, method: str, tmp_path: Path) -> None:
    network = subject.network
    errors = {}
    large = plan_bytes(network) > LARGE
    for devices in {"robustdice": (3,), "lop": (4,), "full": (2,)}[method] if large else (2, 3, 4):
        plan = make_plan(network, method, devices)
        directories = write_bundles(network, plan, tmp_path / "build", graph=subject.graph)
        cluster = InProcess([load_bundle(directory) for directory in directories])
        errors[devices, "none"] = relative_error(cluster.run(subject.image), subject.scores)
        every = [failed for size in range(1, devices) for failed in failure_sets(devices, size)]
        for chosen in np.random.default_rng(devices).permutation(len(every))[:2]:
            failed = every[chosen]
            survivors = [torch.tensor(mask) for mask in plan.surviving_neurons(failed)]
            with torch.no_grad():
                expected = network.run(torch.from_numpy(subject.image), survivors).numpy()
            errors[devices, str(sorted(failed))] = relative_error(cluster.run(subject.image, failed), expected)
    print(f"\n{subject.name} {method}: largest relative error {max(errors.values()):.1e}")
    assert max(errors.values()) < TOLERANCE, errors
