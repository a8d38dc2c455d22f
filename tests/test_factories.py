"""Models that a function returns: wrapped, in other precisions, talking; and everything that can be wrong with them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from robustdice.errors import DataError, ModelError
from robustdice.model.load import load_model, reload_model


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with a module of factories."""
    (tmp_path / "factories.py").write_text(
        """
import torch
from torch import nn

class Net(nn.Sequential):
    preprocessing = {"input_size": [1, 4, 4], "mean": [0.1], "std": [0.9]}

def net():
    return Net(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))

def trained(random_weights=False):
    model = net()
    if not random_weights:
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.1)
    return model

def unsized():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))

class Branching(nn.Module):
    preprocessing = {"input_size": [1, 4, 4]}
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

def fails():
    raise OSError("no such\\nfile")

class Shapes(nn.Module):
    preprocessing = {"input_size": [1, 4, 4]}
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        return self.net(x)

def wrapped():
    return nn.DataParallel(torch.compile(Shapes()))

def inner():
    model = Shapes()
    model.net[0] = torch.compile(model.net[0])
    model.net[2].compile()
    return model

def half():
    return trained().half()

def brain():
    return trained().to(torch.bfloat16)

def double():
    return trained().double()

def empty():
    return trained().to("meta")

def scripted():
    return torch.jit.trace(net(), torch.zeros(1, 1, 4, 4))

def prefixed():
    model = trained()
    model.load_state_dict({f"module.{key}": value for key, value in model.state_dict().items()})

def talks():
    print("building the network")
    import logging, warnings
    logging.warning("logged")
    warnings.warn("warned")
    return trained()

def text():
    return "a network"

number = 3
"""
    )
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("factories", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("factories")
def test_a_factory_is_found_in_the_working_directory() -> None:
    network = load_model("factories:trained")
    assert network.preprocessing == {"input_size": [1, 4, 4], "mean": [0.1], "std": [0.9]}
    torch.testing.assert_close(network.run(torch.zeros(1, 1, 4, 4)), torch.full((1, 3), 0.1 + 8 * 0.1 * 0.1))
    assert [layer.name for layer in network.plan_layers] == ["0", "2"]


@pytest.mark.usefixtures("factories")
def test_random_weights_follow_the_seed_and_are_said_to_be_random() -> None:
    one, again = (load_model("factories:trained", random_weights=True, seed=1).reference for _ in range(2))
    other = load_model("factories:trained", random_weights=True, seed=2).reference
    assert one == again
    assert one.digest != other.digest
    assert (one.random_weights_seed, other.random_weights_seed) == (1, 2)
    assert load_model("factories:trained", seed=7).reference.random_weights_seed is None


@pytest.mark.usefixtures("factories")
def test_loading_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model("factories:trained", random_weights=True, seed=1)
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.usefixtures("factories")
def test_a_factory_that_draws_its_weights_can_be_loaded_again() -> None:
    network = load_model("factories:net", seed=9)  # the seed is that of samples and the like
    assert reload_model(network.reference).reference == network.reference


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("factories:missing", "cannot import the model 'factories:missing': .*missing"),
        ("nowhere:net", "cannot import the model 'nowhere:net': No module named 'nowhere'"),
        ("broken:net", "cannot import the model 'broken:net': division by zero"),
        (":net", "cannot import the model"),
        ("factories:fails", "factories:fails failed: OSError: no such$"),
        (
            "factories:prefixed",
            r'Missing key.* "0.weight".*; Unexpected key.*The keys begin with .module\.\'; load without',
        ),
        ("factories:empty", "factories:empty has weights without values"),
        ("factories:scripted", "factories:scripted returned TorchScript, which torch.export does not take"),
        ("factories:text", "returned a str; expected a torch.nn.Module"),
        ("factories:number", "factories:number is a int; expected a function"),
        ("factories:unsized", "the input size of factories:unsized is not known; say it with --size"),
        ("factories:Branching", "factories:Branching does not export: .*torch.export must be able to trace it"),
        ("resnet18", "'resnet18' is not a model: expected torchvision:NAME, timm:NAME, a .pt2 or .onnx file, or pack"),
    ],
)
def test_sources_that_give_no_model_are_refused(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(source)


@pytest.mark.usefixtures("factories")
def test_sizes_are_checked_before_they_are_used() -> None:
    network = load_model("factories:unsized", preprocessing={"input_size": [1, 4, 4]})
    assert network.input_shape == (1, 4, 4)
    with pytest.raises(DataError, match="damaged"):
        load_model("factories:unsized", preprocessing={"input_size": ["a", 4, 4]})
    with pytest.raises(ModelError, match="does not export: Given groups=1"):
        load_model("factories:unsized", preprocessing={"input_size": [3, 4, 4]})


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("name", ["wrapped", "inner"])
def test_wrappers_are_opened(name: str) -> None:
    network = load_model(f"factories:{name}")
    assert [layer.name for layer in network.plan_layers] == ["net.0", "net.2"]


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("name", ["half", "brain", "double"])
def test_other_precisions_become_float32(name: str) -> None:
    network = load_model(f"factories:{name}")
    found = network.run(torch.ones(1, 1, 4, 4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, load_model("factories:trained").run(torch.ones(1, 1, 4, 4)), rtol=1e-2, atol=0.0)


@pytest.mark.usefixtures("factories")
def test_what_a_factory_prints_is_no_output(capfd: pytest.CaptureFixture[str]) -> None:
    load_model("factories:talks")
    with pytest.raises(ModelError):
        load_model("factories:Branching")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "building the network" in captured.err
    assert "def forward" not in captured.err
    assert "warned" not in captured.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.usefixtures("factories")
def test_a_model_on_a_gpu_is_moved(factories: Path) -> None:
    module = "import torch, factories\ndef net():\n    return factories.trained().to('cuda')\n"
    (factories / "on_gpu.py").write_text(module)
    assert load_model("on_gpu:net").reference.digest == load_model("factories:trained").reference.digest


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("7", "the preprocessing of said:net is a int; expected a dictionary"),
        ("[3, 4, 4]", "the preprocessing of said:net is a list; expected a dictionary"),
        ("{'size': [1, 4, 4]}", "unknown preprocessing key 'size'; known: .*input_size"),
    ],
)
def test_what_a_module_says_about_images_wrongly_is_named(
    said: str, message: str, factories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (factories / "said.py").write_text(
        "import factories\ndef net():\n    model = factories.net()\n"
        f"    model.preprocessing = {said}\n    return model\n"
    )
    monkeypatch.delitem(sys.modules, "said", raising=False)
    with pytest.raises((DataError, ModelError), match=message):
        load_model("said:net")


@pytest.mark.usefixtures("factories")
def test_random_weights_of_a_factory_that_knows_none_are_refused() -> None:
    with pytest.raises(ModelError, match="factories:net takes no argument random_weights"):
        load_model("factories:net", random_weights=True)
