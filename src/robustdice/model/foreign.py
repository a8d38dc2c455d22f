"""What a file is, by its content, and the lines that make a model of one that is none. Nothing is unpickled for it."""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import zipfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from robustdice.errors import ModelError

PROGRAM, ONNX = "torch.export program", "ONNX model"
"""What :func:`recognise` calls the files that robustdice reads."""

_OF_OTHERS = {
    (".engine", ".plan", ".trt"): "a TensorRT engine, which one kind of GPU runs",
    (".mlmodel", ".mlpackage"): "a Core ML model",
    (".caffemodel", ".prototxt"): "a Caffe model",
    (".param",): "an ncnn model",
    (".xml",): "an OpenVINO model",
    (".weights", ".cfg"): "a Darknet model",
    (".msgpack", ".orbax"): "what Flax keeps of a network's weights",
    (".pdmodel", ".pdparams", ".pdiparams"): "a Paddle model",
    (".joblib",): "what joblib keeps of Python objects",
}
"""What files with these suffixes are that nothing but the suffix tells."""
FILE_SUFFIXES = frozenset(
    {".pt2", ".onnx", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".ptl", ".safetensors", ".npz", ".gguf"}
    | {".h5", ".hdf5", ".keras", ".tflite", ".pb", ".ort"}
    | {suffix for suffixes in _OF_OTHERS for suffix in suffixes}
)
"""What a source that is to be a file ends in, in small letters."""

_EXPORT = """\
    torch.export.save(torch.export.export(
        model.eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({{0: torch.export.Dim("batch")}},)
    ), "{stem}.pt2")  # 3, 224, 224: the size of its images"""
_LOAD_STATE = """\
    import torch
    model = Network()  # the class that the weights are of, where it was trained
    state = torch.load("{path}", map_location="cpu", weights_only=True){part}
    model.load_state_dict({state})
"""
_LOAD_PICKLED_STATE = """\
    import pickle, torch
    model = Network()  # the class that the weights are of, where it was trained
    state = pickle.load(open("{path}", "rb")){part}  # runs code from the file: trust its source
    model.load_state_dict({state})
"""
_LOAD_SAFETENSORS = """\
    import torch
    from safetensors.torch import load_file
    model = Network()  # the class that the weights are of, where it was trained
    model.load_state_dict(load_file("{path}"))
"""
_LOAD_MODULE = """\
    import torch
    model = torch.load("{path}", map_location="cpu", weights_only=False)  # runs code from the file: trust its source
"""
_LOAD_PICKLED_MODULE = """\
    import pickle, torch
    model = pickle.load(open("{path}", "rb"))  # runs code from the file: trust its source
"""
_FROM_TORCHSCRIPT = """\
    import torch
    model = torch.jit.load("{path}", map_location="cpu").eval()
    torch.onnx.export(model, (torch.zeros(1, 3, 224, 224),), "{stem}.onnx", dynamo=False, input_names=["image"],
                      dynamic_axes={{"image": {{0: "batch"}}}})  # 3, 224, 224: the size of its images"""
_FROM_KERAS = """\
    import keras  # version 3.7 or later
    keras.saving.load_model("{path}").export("{stem}.onnx", format="onnx")"""
_CONVERT = "    python -m tf2onnx.convert {how} --output {stem}.onnx"

_MAGIC_NUMBER = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
"""What torch.save began files with before they were archives."""
_MAGIC = {
    b"PK\x03\x04": "a zip archive that is damaged or was cut short: fetch or copy it again",
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"\xfd7zXZ": "compressed (xz): unpack it first",
    b"BZh": "compressed (bzip2): unpack it first",
    b"7z\xbc\xaf": "compressed (7z): unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it first",
    b"Rar!": "compressed (rar): unpack it first",
    b"GGUF": "a GGUF file of a language model",
    b"version https://git-lfs": "a pointer of Git LFS: 'git lfs pull' fetches the file",
    b"<!doctype html": "a web page: the download failed, fetch it again",
    b"<html": "a web page: the download failed, fetch it again",
}


def recognise(path: Path) -> str:
    """:data:`PROGRAM` or :data:`ONNX`; ModelError that names any other kind of file, and the way to a model."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror}") from None
    suffix = path.suffix.lower()
    if not head:
        raise ModelError(f"{path} is not a model: it is empty")
    if _is_whole_zip(path):
        with zipfile.ZipFile(path) as archive:
            return _recognise_archive(path, archive)
    if (other := _by_its_start(path, head)) is not None:
        raise other
    if suffix == ".onnx" or _parses_as_onnx(path, head):
        return ONNX
    if suffix == ".pb":
        how = f"--graphdef {path} --inputs INPUT:0 --outputs OUTPUT:0"
        if head.startswith(b"\x08\x01\x12"):
            how = f"--saved-model {path.parent}"
        raise _other(path, "a TensorFlow graph", _CONVERT, how=how)
    if suffix == ".pt2":
        return PROGRAM
    if (known := _by_suffix(path)) is not None:
        raise ModelError(f"{path} is no model that robustdice reads: it is {known}")
    raise ModelError(f"{path} is not a model: expected a torch.export program (.pt2) or an ONNX file (.onnx)")


def _by_suffix(path: Path) -> str | None:
    """What a file of some other program is, and the way out."""
    known = next((what for suffixes, what in _OF_OTHERS.items() if path.suffix.lower() in suffixes), None)
    return known and f"{known}; give the .pt2 or .onnx file of the network that it was made of"


def _is_whole_zip(path: Path) -> bool:
    """Whether a file is a zip archive from its first byte on: those that hold others end like one when cut short."""
    try:
        with zipfile.ZipFile(path) as archive:
            return min((entry.header_offset for entry in archive.infolist()), default=0) == 0
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _by_its_start(path: Path, head: bytes) -> ModelError | None:
    """The error for a file that begins as those of another kind do."""
    found = next((what for magic, what in _MAGIC.items() if head.lstrip().lower().startswith(magic.lower())), None)
    if head[257:262] == b"ustar":
        found = "a tar archive: unpack it first"
    if head[4:8] == b"ORTM":
        found = "an ONNX Runtime model (.ort): give the .onnx file that it was made of"
    if found is not None:
        return ModelError(f"{path} is not a model: it is {found}")
    if head.startswith(b"\x89HDF"):
        return _other(path, "what Keras writes as HDF5", _FROM_KERAS)
    if head[4:8] == b"TFL3":
        return _other(path, "a TensorFlow Lite model", _CONVERT, how=f"--tflite {path}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return _other(path, "weights alone (safetensors), without their network", _LOAD_SAFETENSORS + _EXPORT)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        content = path.read_bytes()
        return _pickled(path, content, by_torch=content.startswith(_MAGIC_NUMBER))
    return None


def about_folder(path: Path) -> str:
    """What a folder is that was taken for a model; empty when it is none."""
    if not path.is_dir():
        return ""
    if (path / "saved_model.pb").is_file():
        return (
            f"a TensorFlow SavedModel ('python -m tf2onnx.convert --saved-model {path} --output model.onnx' reads it)"
        )
    if (known := _by_suffix(path)) is not None:
        return known
    models = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in FILE_SUFFIXES)
    return f"a folder (with {', '.join(models[:3])}: name the file)" if models else "a folder"


def _recognise_archive(path: Path, archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    if any("serialized_exported_program" in name or "/models/" in f"/{name}" for name in names):
        return PROGRAM
    if any("aotinductor" in name for name in names):
        raise _other(
            path,
            "what AOTInductor compiled for one kind of machine",
            "    torch.export.save(program, '{stem}.pt2')  # the program that was given to aoti_compile_and_package",
        )
    if any("/code/" in name for name in names):
        raise _other(path, "a TorchScript file", _FROM_TORCHSCRIPT)
    if pickled := [name for name in names if name.endswith("data.pkl")]:
        raise _pickled(path, archive.read(pickled[0]), by_torch=True)
    if "model.weights.h5" in names:
        raise _other(path, "a Keras model", _FROM_KERAS)
    models = [name for name in names if name.lower().endswith((".onnx", ".pt2"))]
    inside = f" with {models[0]} in it: unpack it" if models else ""
    raise ModelError(f"{path} is not a model: it is a zip file{inside}")


def _pickled(path: Path, content: bytes, *, by_torch: bool) -> ModelError:
    """What torch.save or pickle wrote, told from the words of its pickle, which is only scanned."""
    classes: list[str] = []
    keys: list[str] = []
    stream = io.BytesIO(content)
    # Before 2020 torch.save wrote several pickles, one behind the other. Behind the last one, or where a file is
    # damaged, what was seen is enough.
    with contextlib.suppress(ValueError):
        while True:
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "GLOBAL":
                    classes.append(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":  # of the two texts before it, where these are new
                    classes.append(".".join(keys[-2:]))
                elif operation.name in ("BINUNICODE", "SHORT_BINUNICODE"):
                    keys.append(str(argument))
    modules = [name for name in classes if name.startswith("torch.nn.modules.")]
    if modules:
        own = (name for name in classes if not name.startswith(("torch.", "collections.", "__builtin__.", "builtins.")))
        what = f"a pickled {next(own, modules[0]).rpartition('.')[2]}, which is code as much as weights"
        return _other(path, what, (_LOAD_MODULE if by_torch else _LOAD_PICKLED_MODULE) + _EXPORT)
    if not any(name.startswith("torch.") for name in classes):
        found = _by_suffix(path) or "pickled data without any of PyTorch"
        return ModelError(f"{path} is no model that robustdice reads: it is {found}")
    nested = next((key for key in ("state_dict", "model_state_dict", "model") if key in keys), None)
    weights = [key for key in keys if "." in key and key.rpartition(".")[2] in ("weight", "bias")]
    prefix = _common_prefix(weights)
    state = f"{{key.removeprefix('{prefix}'): value for key, value in state.items()}}" if prefix else "state"
    what = "weights alone (what torch.save writes of a state_dict), without their network"
    load = _LOAD_STATE if by_torch else _LOAD_PICKLED_STATE
    return _other(path, what, load + _EXPORT, state=state, part=f'["{nested}"]' if nested else "")


def _common_prefix(weights: Sequence[str]) -> str:
    """What wraps a network puts before the names of its weights."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if weights and all(name.startswith(prefix) for name in weights):
            return prefix
    return ""


def _parses_as_onnx(path: Path, head: bytes) -> bool:
    if head[:1] != b"\x08":  # the first field, the version of its form
        return False
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # whatever a file of another kind makes the parser raise
        return False
    return bool(model.graph.node)


def _other(path: Path, what: str, lines: str, **words: str) -> ModelError:
    made = lines.format(path=path, stem=path.with_suffix(""), **words)
    return ModelError(f"{path} is no model that robustdice reads: it is {what}. These lines make one of it:\n{made}")
