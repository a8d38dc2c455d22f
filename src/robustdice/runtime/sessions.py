"""The models of a bundle in ONNX Runtime, each computed by the provider that was asked for, or on the CPU.

A provider is ONNX Runtime's word for what computes: the CPU's own kernels, CUDA, TensorRT, OpenVINO and so on. What one
cannot compute as a whole is computed on the CPU: a model that is split between two has its values copied to and fro,
and nobody could say what a device uses.
"""

from __future__ import annotations

import contextlib
import io
import logging
import platform
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime

from robustdice.bundle.parts import Part
from robustdice.bundle.read import Bundle
from robustdice.errors import BundleError, ClusterError, first_line
from robustdice.runtime.journal import say
from robustdice.runtime.memory import give_back

log = logging.getLogger(__name__)

CPU, AUTO = "cpu", "auto"
GPU_PROVIDERS = frozenset({"cuda", "tensorrt"})
"""Those that compute on an NVIDIA GPU."""
SIGNED_IS_FASTER = frozenset({"aarch64", "arm64"})
"""Processors, as Python calls them, whose instructions multiply codes of inputs by those of weights (which are signed)
when both are signed; those of x86 want unsigned inputs, and what they do not want takes up to seven times as long."""
_SUFFIX = "ExecutionProvider"
_ONLY_ON_REQUEST = ("azure", "tensorrt")
"""The first computes elsewhere, the second compiles every model for minutes."""
_OPTIONS: Mapping[str, Mapping[str, str]] = {"cuda": {"use_tf32": "0"}}
"""TF32 keeps 10 bits of each number: that is less than a trial allows for rounding."""


def provider_named(name: str) -> str:
    """What ``--provider`` says, as one of this ONNX Runtime's providers in small letters; ``auto``: the one that it
    prefers. ClusterError when it has no such provider."""
    found = [_short(provider) for provider in onnxruntime.get_available_providers()]
    if name == AUTO:
        return next((each for each in found if each not in _ONLY_ON_REQUEST), CPU)
    if name.lower() in found:
        return name.lower()
    known = {_short(provider) for provider in onnxruntime.get_all_providers()}
    which = f"ONNX Runtime {onnxruntime.__version__} here has {', '.join(found)}"
    if name.lower() not in known:
        raise ClusterError(f"there is no provider {name!r}; {which}; 'auto' takes the best of them")
    raise ClusterError(
        f"the provider {name.lower()!r} is not in the package that is installed: {which}. Another build of it has "
        "more, such as onnxruntime-gpu (cuda, tensorrt) or onnxruntime-openvino, instead of onnxruntime"
    )


def _short(provider: str) -> str:
    return provider.removesuffix(_SUFFIX).lower()


def open_session(
    model: Path | bytes, threads: int, shares_arena: bool = False, provider: str = CPU, packs: bool = True
) -> Any:
    """An ONNX Runtime session for a model file (or its content), on the CPU or as a whole with another provider; idle
    threads sleep instead of spinning. Whatever ONNX Runtime raises when that cannot be.

    From a file where memory counts: a session that is made from bytes keeps a second copy of the weights.
    ``shares_arena``: what it computes with on the CPU is in the same memory as that of all others that share: sessions
    that run one after the other need no more than the largest of them. ``packs``: it makes copies of weights that are
    faster to multiply by matrices, and slower by vectors.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # 8-bit products whose pairs may not saturate, where the processor has instructions for pairs only.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.disable_prepacking", "0" if packs else "1")
    options.log_severity_level = 3
    if provider == CPU:
        if shares_arena:
            _register_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
    else:
        if provider in GPU_PROVIDERS:
            _load_gpu_libraries()
        options.log_severity_level = 4  # what it cannot do is an exception, and said once
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        wanted = next(each for each in onnxruntime.get_all_providers() if _short(each) == provider)
        providers = [(wanted, dict(_OPTIONS.get(provider, {})))]
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
    if _short(session.get_providers()[0]) != provider:
        raise RuntimeError(f"{provider} cannot be used on this machine: its libraries or its processor are missing")
    return session


@cache
def _load_gpu_libraries() -> None:
    """CUDA's libraries where they come from the package index, for the system does not look there; it prints what it
    does not find, which a session says again when it needs it."""
    if hasattr(onnxruntime, "preload_dlls"):  # not before ONNX Runtime 1.21
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


@cache
def _register_arena() -> None:
    """For the whole process; it grows by what is asked for, not by doubling."""
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, 1, -1, -1))


class Sessions:
    """The models of a bundle, loaded when they are first needed. Not thread-safe."""

    def __init__(self, bundle: Bundle, threads: int, provider: str = CPU) -> None:
        """``provider`` as :func:`provider_named` gives it; nothing is loaded yet."""
        self._bundle, self._threads, self._provider = bundle, threads, provider
        self._signed = platform.machine().lower() in SIGNED_IS_FASTER
        self._opened: dict[str, Any] = {}
        self._on_cpu: dict[str, str] = {}
        """Models that are computed on the CPU against the wish, and why."""
        self._said = 0

    def __len__(self) -> int:
        return len(self._opened)

    @property
    def used(self) -> dict[str, int]:
        """How many of the bundle's models each provider computes."""
        files = {part.file for part in self._bundle.manifest.parts}
        return dict(Counter(CPU if file in self._on_cpu else self._provider for file in sorted(files)))

    def file_of(self, part: Part) -> str:
        """The file of a part's model that is computed here."""
        return part.signed if part.signed is not None and self._signed else part.file

    def load(self, part: Part) -> Any:
        """The session of a part's model, opened if it is not; BundleError when not even the CPU can."""
        if part.file not in self._opened:
            self._opened[part.file] = self._open(part)
        return self._opened[part.file]

    def run(self, part: Part, inputs: Mapping[str, Any]) -> list[Any]:
        """A part's outputs. What a provider fails at is computed on the CPU, from then on."""
        session = self._opened.get(part.file)
        if session is None:
            session = self.load(part)
            give_back()
        try:
            found: list[Any] = session.run(part.outputs, inputs)
        except Exception as error:  # ONNX Runtime's exceptions have no common root below Exception
            if not self.move_to_cpu(part, first_line(error)):
                raise
            self.say_what_moved()
            found = self.load(part).run(part.outputs, inputs)
        return found

    def drop(self, part: Part) -> None:
        """Free a model that is not needed soon."""
        del self._opened[part.file]

    def move_to_cpu(self, part: Part, reason: str) -> bool:
        """Compute a model on the CPU from now on; False when that is done already."""
        if self._provider == CPU or part.file in self._on_cpu:
            return False
        self._on_cpu[part.file] = reason
        self._opened.pop(part.file, None)
        return True

    def say_what_moved(self) -> None:
        """Log, in one line, that models are computed on the CPU against the wish, if more are than when it was said."""
        if len(self._on_cpu) == self._said:
            return
        self._said = len(self._on_cpu)
        (file, reason), *more = list(self._on_cpu.items())[::-1]
        text = (
            f"{len(self._on_cpu)} of {sum(self.used.values())} models are computed on the CPU, not with "
            f"{self._provider}: {file}: {reason}{f' (and {len(more)} more)' if more else ''}"
        )
        device = self._bundle.manifest.device
        say(log, text, event="on-cpu", device=device, reason=reason, level=logging.WARNING)

    def _open(self, part: Part) -> Any:
        path = self._bundle.path(self.file_of(part))
        if part.apart is not None:
            self._bundle.path(part.apart)
        if self._provider != CPU and part.file not in self._on_cpu:
            try:
                return open_session(path, self._threads, provider=self._provider)
            except Exception as error:
                self.move_to_cpu(part, first_line(error))
        try:
            packs = part.apart is None or part.in_strips or part.signed is not None
            return open_session(path, self._threads, shares_arena=True, packs=packs)
        except Exception as error:
            needs = self._bundle.manifest.needs
            stated = "" if needs is None else f" ({needs}; this is ONNX Runtime {onnxruntime.__version__})"
            raise BundleError(
                f"{path} cannot be loaded: {first_line(error)}{stated}; install a newer ONNX Runtime, or build the "
                "bundle again for this one"
            ) from None
