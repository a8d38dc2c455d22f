"""The public surface: its names, and what importing them costs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import robustdice as rd

INSTALLED_BYTES = 230e6
RESIDENT_BYTES, PEAK_BYTES = 65e6, 75e6


def test_public_names_are_few_sorted_and_there() -> None:
    assert len(rd.__all__) <= 35
    assert list(rd.__all__) == sorted(rd.__all__)
    for name in rd.__all__:
        assert getattr(rd, name) is not None


def test_dir_lists_the_public_names_without_importing_the_workshop() -> None:
    code = "import sys, robustdice as rd; print(*dir(rd)); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, torch_is_there = result.stdout.splitlines()
    assert names.split() == sorted([*rd.__all__, "__version__"])
    assert torch_is_there == "False"


def test_no_submodule_hides_a_public_name() -> None:
    """A submodule becomes an attribute of the package when it is imported, whatever stood there."""
    submodules = {path.stem for path in Path(rd.__file__).parent.iterdir()}
    assert not submodules.intersection(rd.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        rd.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import robustdice",
        "import robustdice as rd; rd.Client; rd.LocalCluster; rd.run_device; rd.Plan",
        "import robustdice.cli",
        "import robustdice.bundle.read, robustdice.runtime.device, robustdice.images",
    ],
)
def test_device_side_needs_no_workshop(code: str) -> None:
    """Neither PyTorch nor the onnx package, nor scikit-learn, may be imported on a device."""
    workshop = {"torch", "onnx", "onnxscript", "sklearn", "torchvision"}
    check = f"{code}; import sys; print(sorted({workshop} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_device_imports_little_takes_little_memory_and_writes_nothing(tmp_path: Path) -> None:
    """What README says of a device: no tables, no command line, no pictures, 58 MB before a bundle is loaded, and no
    telemetry of the libraries."""
    code = (
        "import sys, robustdice.runtime.device; from robustdice.runtime import memory\n"
        "print(memory.rss_bytes(), memory.peak_rss_bytes(), *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert not list(tmp_path.iterdir())
    resident, peak, *modules = result.stdout.split()
    assert not {"rich", "typer", "click", "PIL", "matplotlib", "torch", "onnx", "scipy", "pandas", "sympy"} & {*modules}
    assert int(resident) < RESIDENT_BYTES
    assert int(peak) < PEAK_BYTES


def device_side() -> set[str]:
    """What ``pip install robustdice`` brings, without extras."""
    found, ahead = set[str](), ["robustdice"]
    while ahead:
        name = ahead.pop()
        found.add(name)
        requirements = map(Requirement, distribution(name).requires or ())
        wanted = {r.name.lower() for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
        ahead += sorted(wanted - found)
    return found


def test_what_a_device_installs_is_small_and_without_the_workshop() -> None:
    packages = device_side()
    assert {"numpy", "onnxruntime", "pyzmq", "pillow"} < packages
    assert not {"torch", "onnx", "scipy", "matplotlib"} & packages
    files = [file.locate() for name in packages for file in distribution(name).files or ()]
    assert sum(file.stat().st_size for file in files if file.is_file()) < INSTALLED_BYTES  # type: ignore[attr-defined]


def test_a_device_imports_nothing_that_makes_plans() -> None:
    """Nor what that brings along: the package's public names are imported when they are used."""
    needless = {f"robustdice.{name}" for name in ("importance", "partitioning", "provenance", "report", "workshop")}
    needless |= {"subprocess", "email", "importlib.metadata"}
    check = f"import robustdice.runtime.device, sys; print(sorted({needless} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_workshop_names_without_torch_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    code = "import robustdice as rd\ntry:\n    rd.load_model\nexcept rd.RobustdiceError as error:\n    print(error)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert "pip install 'robustdice[workshop]'" in result.stdout
