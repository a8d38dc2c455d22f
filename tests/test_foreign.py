"""Files that people try first, and are no model: named for what they are, with lines that make a model of them."""

import io
import pickle
import re
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nets import Plain, export, random_images, seeded
from robustdice.errors import ModelError
from robustdice.model.load import load_model
from robustdice.model.tracing import quiet

SHAPE = (1, 8, 8)


def say(path: Path) -> str:
    return say_of(str(path))


def say_of(source: str) -> str:
    with pytest.raises(ModelError) as error:
        load_model(source)
    return str(error.value)


def do_what_is_said(message: str) -> None:
    """Run the lines of a message, with the size of the images put in."""
    lines = textwrap.dedent(message.split("one of it:\n", 1)[1]).replace("3, 224, 224)", "1, 8, 8)")
    with quiet():
        exec(lines, {"Network": Plain})  # noqa: S102 -- that the advice works is what is tested


def save_state(module: nn.Module, path: Path) -> None:
    torch.save(module.state_dict(), path)


def save_old_state(module: nn.Module, path: Path) -> None:
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=False)


def save_checkpoint(module: nn.Module, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}, path)


def save_old_checkpoint(module: nn.Module, path: Path) -> None:
    state = {"model_state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_old_module(module: nn.Module, path: Path) -> None:
    torch.save(module, path, _use_new_zipfile_serialization=False)


def dump_module(module: nn.Module, path: Path) -> None:
    path.write_bytes(pickle.dumps(module))


def dump_state(module: nn.Module, path: Path) -> None:
    path.write_bytes(pickle.dumps(module.state_dict(), 2))


def save_tensors(module: nn.Module, path: Path) -> None:
    save_file(module.state_dict(), path)


def save_script(module: nn.Module, path: Path) -> None:
    with quiet():
        torch.jit.save(torch.jit.trace(module, torch.zeros(1, *SHAPE)), path)  # type: ignore[no-untyped-call]


def save_module(module: nn.Module, path: Path) -> None:
    torch.save(module, path)


@pytest.mark.parametrize(
    ("write", "name", "what"),
    [
        (save_state, "net.pth", "weights alone"),
        (save_state, "net.pt2", "weights alone"),
        (save_old_state, "net.pt", "weights alone"),
        (save_checkpoint, "net.CKPT", "weights alone"),
        (save_tensors, "net.safetensors", r"weights alone \(safetensors\)"),
        (save_script, "net.pt", "a TorchScript file"),
        (save_module, "net.pth", "a pickled Plain, which is code"),
        (save_old_module, "net.pth", "a pickled Plain, which is code"),
        (dump_module, "net.pkl", "a pickled Plain, which is code"),
        (dump_state, "net.pickle", "weights alone"),
        (save_old_checkpoint, "net.tar", "weights alone"),
    ],
)
def test_the_lines_that_are_said_make_a_model_of_it(
    write: Callable[[nn.Module, Path], None], name: str, what: str, tmp_path: Path
) -> None:
    module = seeded(Plain)
    write(module, tmp_path / name)
    message = say(tmp_path / name)
    assert re.search(f"it is {what}", message), message
    do_what_is_said(message)
    made = tmp_path / ("net.onnx" if "onnx" in message else "net.pt2")
    images = torch.from_numpy(random_images(2, SHAPE))
    torch.testing.assert_close(load_model(str(made)).run(images), module(images))


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "name", "what"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "net.h5", "Keras writes as HDF5"),
        (zipped("config.json", "metadata.json", "model.weights.h5"), "net.keras", "it is a Keras model"),
        (b"\x20\0\0\0TFL3" + bytes(50), "net.tflite", "TensorFlow Lite .* --tflite"),
        (b"\x0a\x20\x0a\x05input" + bytes(50), "net.pb", "TensorFlow graph.* --graphdef"),
        (b"\x08\x01\x12\x20" + bytes(50), "saved_model.pb", "TensorFlow graph.* --saved-model"),
        (zipped("net/archive_format", "net/data/aotinductor/model/a.so"), "net.pt2", "AOTInductor compiled"),
        (zipped("readme.txt", "net.onnx"), "net.zip", "a zip file with net.onnx in it: unpack it"),
        (b"\x1f\x8b\x08" + bytes(50), "net.onnx", "gzip.*unpack it first"),
        (b"<!DOCTYPE html><html>", "net.onnx", "a web page: the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\n", "net.pt2", "pointer of Git LFS: 'git lfs pull'"),
        (b"\x18\0\0\0ORTM" + bytes(50), "net.ort", "ONNX Runtime model"),
        (b"GGUF" + bytes(50), "net.gguf", "GGUF"),
        (b"", "net.onnx", "it is empty"),
        (bytes(257) + b"ustar\x0000" + bytes(300), "net.pt2", "a tar archive: unpack it first"),
        (zipped("net/data/weights/w.pt")[:40] + zipped("archive/data.pkl"), "net.pt2", "was cut short"),
        (zipped("net/archive_format", "net/models/model.json")[:60], "net.pt2", "was cut short"),
        (pickle.dumps({"weights": [1.0]}), "net.pkl", "pickled data without any of PyTorch"),
        (pickle.dumps({"weights": [1.0]}, 2), "net.pdparams", "a Paddle model; give the .pt2 or .onnx file"),
        (b"ftrt" + bytes(50), "net.engine", "a TensorRT engine.*; give the .pt2 or .onnx file"),
        (b"\x08\x04\x12\x40" + bytes(50), "Net.MLModel", "a Core ML model; give"),
        (b"<?xml version='1.0'?><net/>", "net.xml", "an OpenVINO model; give"),
        (b"hello", "net.bin", r"expected a torch\.export program \(\.pt2\) or an ONNX file"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else None,  # archives have the time of day in them
)  # fmt: skip
def test_files_are_called_by_their_name(content: bytes, name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = say(tmp_path / name)
    assert re.search(what, message, re.DOTALL), message


@pytest.mark.parametrize("name", ["NET.PT2", "net.Pt2", "net.pth", "net"])
def test_a_program_is_one_whatever_its_name(name: str, tmp_path: Path) -> None:
    with quiet():
        torch.export.save(export(seeded(Plain), *SHAPE), tmp_path / "net.pt2")
    (tmp_path / "net.pt2").rename(tmp_path / name)
    assert load_model(str(tmp_path / name)).outputs == 4


def test_an_onnx_file_is_one_whatever_its_name(tmp_path: Path) -> None:
    with quiet():
        example = (torch.zeros(1, *SHAPE),)
        torch.onnx.export(seeded(Plain), example, str(tmp_path / "NET.ONNX"), dynamo=False)
    assert load_model(str(tmp_path / "NET.ONNX")).outputs == 4
    (tmp_path / "NET.ONNX").rename(tmp_path / "net.pb")
    assert load_model(str(tmp_path / "net.pb")).outputs == 4


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for name in ("net.pth", "NET.ONNX", "net.safetensors"):
        assert f"there is no model file {tmp_path / name}" in say(tmp_path / name)
    (tmp_path / "net.pt2").write_text("")
    assert "a folder (with net.pt2: name the file)" in say(tmp_path)
    (tmp_path / "net.pt2").unlink()
    (tmp_path / "net.pt2").mkdir()
    assert "is a folder: expected" in say(tmp_path / "net.pt2")
    (tmp_path / "net.mlpackage").mkdir()
    assert "a Core ML model; give the .pt2 or .onnx file" in say(tmp_path / "net.mlpackage")
    assert "is an address; fetch the file" in say_of("https://example.org/net.onnx")
    assert "'' is not a model" in say_of("")
    (tmp_path / "saved_model.pb").write_text("")
    assert "a TensorFlow SavedModel" in say(tmp_path)


class Touch:
    """What an attacker would put into a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("owned"),)


def test_telling_what_a_file_is_runs_nothing_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pth").write_bytes(pickle.dumps(Touch(), protocol=2))
    torch.save({"state": Touch()}, tmp_path / "net.pt")
    for name in ("net.pth", "net.pt"):
        assert "it is" in say(tmp_path / name)
    assert not (tmp_path / "owned").exists()
