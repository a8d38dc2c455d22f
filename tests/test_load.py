"""Models by name and in .pt2 files, with their sidecars, where they were or moved; and everything that can be wrong."""

import inspect
import io
import os
import pickle
import subprocess
import sys
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nets import Plain, Residual, random_images, save, seeded
from robustdice.cli.build import build as build_command
from robustdice.cli.build import verify as verify_command
from robustdice.cli.calibrate import calibrate as calibrate_command
from robustdice.cli.cluster import bench as bench_command
from robustdice.cli.evaluate import evaluate as evaluate_command
from robustdice.demo.network import digits_cnn
from robustdice.errors import DataError, ModelError
from robustdice.model.builders import import_torchvision
from robustdice.model.digits import PREPROCESSING
from robustdice.model.load import load_model, reload_model
from robustdice.model.tracing import quiet

SIDECAR = {
    "input_size": [3, 8, 8],
    "resize": None,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "classes": ["a", "b", "c", "d", "e"],
}


def test_a_pt2_file_comes_back_with_its_sidecar(tmp_path: Path) -> None:
    module = seeded(Residual)
    network = load_model(save(module, tmp_path / "net.pt2", 3, 8, 8, sidecar=SIDECAR))
    images = torch.from_numpy(random_images(2, (3, 8, 8)))
    torch.testing.assert_close(network.run(images), module(images))
    assert network.preprocessing == {key: value for key, value in SIDECAR.items() if value is not None}
    assert network.reference.source == str(tmp_path / "net.pt2")
    assert network.reference.random_weights_seed is None
    assert network.outputs == 5


def test_what_is_said_overrides_the_sidecar(tmp_path: Path) -> None:
    source = save(seeded(Residual), tmp_path / "net.pt2", 3, 8, 8, sidecar=SIDECAR)
    network = load_model(source, preprocessing={"mean": [0, 0, 0], "resize": 9})
    assert network.preprocessing == {**SIDECAR, "mean": [0.0, 0.0, 0.0], "resize": 9}


def test_a_pt2_file_needs_no_sidecar(tmp_path: Path) -> None:
    assert load_model(save(seeded(Plain), tmp_path / "net.pt2", 1, 8, 8)).preprocessing == {}


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ("{", r"net\.json is not JSON"),
        ("[1]", r"net\.json is not a JSON object; see docs/formats\.md"),
        ({"input_size": [3, 9, 8]}, r"inputs of shape \[3, 8, 8\], but input_size says \[3, 9, 8\]; correct --size"),
        ({"classes": ["a"]}, r"5 outputs, but 1 classes are named \(a\); correct --classes"),
    ],
)
def test_a_sidecar_that_does_not_fit_is_refused(tmp_path: Path, sidecar: object, message: str) -> None:
    source = save(seeded(Residual), tmp_path / "net.pt2", 3, 8, 8, sidecar=sidecar)
    with pytest.raises(ModelError, match=message):
        load_model(source)


def test_a_sidecar_with_an_unknown_word_is_refused(tmp_path: Path) -> None:
    source = save(seeded(Residual), tmp_path / "net.pt2", 3, 8, 8, sidecar={"crop": 3})
    with pytest.raises(DataError, match="unknown preprocessing key 'crop'"):
        load_model(source)


def test_what_is_no_pt2_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model file .*missing\.pt2"):
        load_model(str(tmp_path / "missing.pt2"))
    source = save(seeded(Plain), tmp_path / "net.pt2", 1, 8, 8)
    content = Path(source).read_bytes()
    for damaged, why in {
        b"": " model: it is empty",
        b"hello": r" torch\.export program",
        content[: len(content) // 2]: " model: it is a zip archive that is damaged or was cut short",
    }.items():
        Path(source).write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"net\.pt2 is not a{why}"):
            load_model(source)
    with pytest.raises(ModelError, match=r"--random-weights is for .* a \.pt2 file brings its weights"):
        load_model(source, random_weights=True)


def test_images_of_any_size_become_images_of_the_declared_size(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    sides = {axis: torch.export.Dim(name, min=2, max=64) for axis, name in enumerate(("batch", "", "h", "w")) if name}
    with quiet():
        program = torch.export.export(module, (torch.zeros(2, 1, 16, 16),), dynamic_shapes=(sides,))
        torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(ModelError, match="all but the batch size must be fixed: say the size with --size"):
        load_model(str(tmp_path / "net.pt2"))
    network = load_model(str(tmp_path / "net.pt2"), preprocessing={"input_size": [1, 12, 10]})
    images = torch.rand(3, 1, 12, 10)
    torch.testing.assert_close(network.run(images), module(images))


def test_channels_last_are_not_what_a_size_can_mend(tmp_path: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded(Plain)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.net(x.permute(0, 3, 1, 2))
            return result

    source = save(Last().eval(), tmp_path / "net.pt2", 8, 8, 1, sidecar={"input_size": [1, 8, 8]})
    with pytest.raises(ModelError, match="export a module that permutes them"):
        load_model(source)


class Touch:
    """What an attacker would put into a model file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pt2_file_is_unpickled(tmp_path: Path) -> None:
    source = save(seeded(Plain), tmp_path / "net.pt2", 1, 8, 8)
    hostile = io.BytesIO()
    torch.save({"a": Touch(tmp_path / "owned")}, hostile)
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    inputs = [name for name in entries if "sample_inputs" in name]
    assert inputs
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, hostile.getvalue() if name in inputs else content)
    with pytest.raises(ModelError, match=r"net\.pt2 is not a torch\.export program"):
        load_model(source)
    assert not (tmp_path / "owned").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    Path(source).write_bytes(pickle.dumps(Touch(tmp_path / "owned")))
    with pytest.raises(ModelError):
        load_model(source)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_a_program_of_another_precision_becomes_float32(kind: torch.dtype, tmp_path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded(Plain)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.net(x.to(kind) * torch.ones(1, dtype=kind))
            return scores

    module = Cast().to(kind).eval()
    with quiet():
        example = (torch.zeros(2, 1, 8, 8, dtype=kind),)
        program = torch.export.export(module, example, dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, tmp_path / "net.pt2")
    network = load_model(str(tmp_path / "net.pt2"))
    images = torch.from_numpy(random_images(3, (1, 8, 8)))
    torch.testing.assert_close(network.run(images), module(images.to(kind)).float(), rtol=1e-2, atol=1e-2)
    assert [layer.name for layer in network.plan_layers] == ["net.conv", "net.fc1", "net.fc2"]


def test_a_changed_model_is_noticed(tmp_path: Path) -> None:
    source = save(seeded(Residual), tmp_path / "net.pt2", 3, 8, 8, sidecar=SIDECAR)
    network = load_model(source, preprocessing={"mean": [0, 0, 0]})
    assert reload_model(network.reference).reference == network.reference
    save(seeded(Residual, seed=1), tmp_path / "net.pt2", 3, 8, 8)
    with pytest.raises(ModelError, match=r"net\.pt2 has changed since the plan was made .* make a new plan"):
        reload_model(network.reference)
    (tmp_path / "net.pt2").unlink()
    with pytest.raises(ModelError, match=r"no longer at .*net\.pt2; say where it is now with --model PATH"):
        reload_model(network.reference)


def test_a_moved_model_is_found_beside_its_plan_or_where_it_is_said_to_be(tmp_path: Path) -> None:
    source = save(seeded(Plain), tmp_path / "net.pt2", 1, 8, 8)
    network = load_model(source, preprocessing={"mean": [0.5]})
    plans, elsewhere = tmp_path / "plans", tmp_path / "elsewhere"
    for folder in (plans, elsewhere):
        folder.mkdir()
    Path(source).rename(elsewhere / "renamed.pt2")
    with pytest.raises(ModelError, match=r"or copy it to .*plans/net\.pt2"):
        reload_model(network.reference, near=plans)
    moved = reload_model(network.reference, elsewhere / "renamed.pt2", plans)
    assert (moved.reference.digest, moved.preprocessing) == (network.reference.digest, network.preprocessing)
    (elsewhere / "renamed.pt2").rename(plans / "net.pt2")
    assert reload_model(network.reference, near=plans).reference.source == str(plans / "net.pt2")
    other = save(seeded(Plain, seed=1), elsewhere / "other.pt2", 1, 8, 8)
    with pytest.raises(ModelError, match=r"other\.pt2 is not the model that the plan was made of .*name that one"):
        reload_model(network.reference, other)


@pytest.mark.parametrize("command", [bench_command, build_command, calibrate_command, evaluate_command, verify_command])
def test_commands_that_need_a_plans_model_take_its_place(command: Callable[..., None]) -> None:
    assert "model" in inspect.signature(command).parameters


def test_the_digest_is_the_same_in_another_process() -> None:
    source = "robustdice.demo.network:digits_cnn"
    program = f"from robustdice.model.load import load_model; print(load_model({source!r}).reference.digest)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    assert other == load_model(source).reference.digest


def test_the_demos_network_is_a_model() -> None:
    network = load_model("robustdice.demo.network:digits_cnn")
    assert [layer.name for layer in network.plan_layers] == [
        "features.0",
        "features.4",
        "features.8",
        "classifier.1",
        "classifier.4",
    ]
    assert [layer.neurons for layer in network.plan_layers] == [32, 64, 96, 128, 10]
    assert [layer.neuron_outputs for layer in network.plan_layers] == [256, 64, 4, 1, 1]
    assert network.preprocessing == {key: value for key, value in PREPROCESSING.items() if value is not None}
    images = torch.from_numpy(random_images(2, (1, 32, 32)))
    torch.testing.assert_close(network.run(images), digits_cnn()(images))


def test_torchvision_without_weights_names_them_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_arguments: object, **_keywords: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    import_torchvision()
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"weights of torchvision:squeezenet1_1 .*pth .*Name or service.*random-weights"
    ):
        load_model("torchvision:squeezenet1_1")


def test_torchvision_models_bring_their_preprocessing() -> None:
    network = load_model("torchvision:squeezenet1_1", random_weights=True, seed=3)
    assert network.preprocessing == {
        "input_size": [3, 224, 224],
        "resize": 256,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert network.reference.source == "torchvision:squeezenet1_1"
    assert network.reference.random_weights_seed == 3
    assert (network.outputs, len(network.layers), network.layers[-1].fill) == (1000, 26, -np.inf)
    assert network.layers[-1].value is network.output


def test_timm_models_bring_their_preprocessing() -> None:
    network = load_model("timm:resnet10t", random_weights=True, seed=3)
    assert network.preprocessing == {
        "input_size": [3, 176, 176],
        "resize": 201,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert (network.reference.source, network.reference.random_weights_seed) == ("timm:resnet10t", 3)
    assert (network.outputs, network.layers[-1].fill) == (1000, -np.inf)
    larger = load_model("timm:resnet10t", random_weights=True, seed=3, preprocessing={"input_size": [3, 224, 224]})
    assert larger.input_shape == (3, 224, 224)
    assert larger.preprocessing["resize"] == 256


def test_timm_without_weights_names_them_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"weights of timm:resnet10t are not on .* or go on with --random-weights"):
        load_model("timm:resnet10t")
    with pytest.raises(ModelError, match=r"timm has no model 'resnet19'; .*lists them"):
        load_model("timm:resnet19")


def test_unknown_torchvision_models_are_refused() -> None:
    with pytest.raises(ModelError, match="torchvision has no classification model 'resnet19'"):
        load_model("torchvision:resnet19")
