"""What energy a device's machine takes, by what it measures itself, added up while the device runs.

A Jetson has an INA3221 for its supplies, which older kernels show as iio devices and newer ones as hwmon; x86 machines
count what their processors take (RAPL, in powercap); NVIDIA's other GPUs are asked through NVML. Every one of these is
of the whole machine or GPU, whoever uses it.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

SYSFS = Path("/sys")
SAMPLE_SECONDS = 0.1
LOST_SECONDS = 2.0
"""A gauge that could not be read for so long is no source any more."""
_IIO = ("bus/i2c/drivers/ina3221x/*/iio*", "bus/i2c/devices/*/iio*", "bus/iio/devices/iio*")


@dataclass
class Power:
    """Energy as the integral of a power, taken to change evenly between two readings."""

    name: str
    read: Callable[[], float]
    """Watts; OSError while there is no reading."""
    joules: float = 0.0
    _last: tuple[float, float] | None = field(default=None, init=False)

    def sample(self, now: float) -> None:
        """Read it, ``now`` seconds by some clock."""
        watts = self.read()
        if self._last is not None:
            then, before = self._last
            self.joules += (now - then) * (watts + before) / 2
        self._last = now, watts


@dataclass
class Counter:
    """Energy as the growth of a counter, which begins again from zero after ``largest``."""

    name: str
    read: Callable[[], float]
    """OSError while there is no reading."""
    unit_joules: float
    largest: int | None = None
    joules: float = 0.0
    _last: float | None = field(default=None, init=False)

    def sample(self, _now: float) -> None:
        """Read it; it must not begin again twice between two readings."""
        count = self.read()
        if self._last is not None:
            grown = count - self._last
            if grown < 0:  # without a largest count, it was reset: what it took until then is not known
                grown = count if self.largest is None else grown + self.largest + 1
            self.joules += grown * self.unit_joules
        self._last = count


Gauge = Power | Counter


def find_gauges(sysfs: Path = SYSFS, gpu: bool = False) -> tuple[list[Gauge], str | None]:
    """What this machine measures itself with, each energy once, or nothing and the reason. ``gpu``: the device computes
    on an NVIDIA GPU."""
    if rails := _rails(sysfs):
        return [Power("ina3221", lambda: sum(rail() for rail in rails))], None
    counters, hidden = _rapl(sysfs)
    gauges: list[Gauge] = [*counters, *(_nvml() if gpu else [])]
    if gauges:
        return gauges, None
    if hidden is not None:
        return [], f"{hidden} may not be read: run the device as root, or let its user read it (chmod)"
    return [], f"this machine measures no energy: neither INA3221 nor RAPL in {sysfs}{', and no NVML' if gpu else ''}"


def _rails(sysfs: Path) -> list[Callable[[], float]]:
    """The board's supplies in watts: the one that all others come from, if it is measured, else all of them."""
    found: list[tuple[str, Callable[[], float]]] = []
    for name, read in _hwmon_rails(sysfs) or _iio_rails(sysfs):
        with contextlib.suppress(OSError, ValueError):  # of a channel that is not connected
            read()
            found.append((name, read))
    whole = [read for name, read in found if name.upper().endswith("_IN")]
    return whole or [read for _, read in found]


def _hwmon_rails(sysfs: Path) -> list[tuple[str, Callable[[], float]]]:
    """Channels with a current (mA) and a voltage (mV)."""
    found: list[tuple[str, Callable[[], float]]] = []
    for current in sorted(sysfs.glob("class/hwmon/hwmon*/curr*_input")):
        chip, number = current.parent, current.name.removeprefix("curr").removesuffix("_input")
        volts = chip / f"in{number}_input"
        if _text(chip / "name") == "ina3221" and volts.exists():
            name = _text(chip / f"in{number}_label") or number
            found.append((name, partial(_product, volts, current)))
    return found


def _iio_rails(sysfs: Path) -> list[tuple[str, Callable[[], float]]]:
    """Channels with a power (mW), which may be found in several ways."""
    found: dict[Path, tuple[str, Callable[[], float]]] = {}
    for pattern in _IIO:
        for power in sorted(sysfs.glob(f"{pattern}/in_power*_input")):
            number = power.name.removeprefix("in_power").removesuffix("_input")
            name = _text(power.parent / f"rail_name_{number}") or number
            found.setdefault(power.resolve(), (name, partial(_scaled, power, 1e-3)))
    return list(found.values())


def _scaled(path: Path, unit: float) -> float:
    return int(path.read_text()) * unit


def _product(millivolts: Path, milliamperes: Path) -> float:
    return _scaled(millivolts, 1e-3) * _scaled(milliamperes, 1e-3)


def _rapl(sysfs: Path) -> tuple[list[Counter], Path | None]:
    """The processors' packages, and memory where it is counted by itself; and what is there but may not be read."""
    found: list[Counter] = []
    hidden = None
    for zone in sorted(sysfs.glob("class/powercap/intel-rapl:*")):
        if not (_text(zone / "name") or "").startswith(("package", "dram")):
            continue  # cores and graphics are parts of a package
        energy = zone / "energy_uj"
        try:
            int(energy.read_text())
            largest = int((zone / "max_energy_range_uj").read_text())
        except PermissionError:
            hidden = energy
        except (OSError, ValueError):
            continue
        else:
            found.append(Counter("rapl", partial(_scaled, energy, 1), 1e-6, largest))
    return found, hidden


def _nvml() -> list[Gauge]:
    """All GPUs that NVML shows; none without the package ``nvidia-ml-py``."""
    found: list[Gauge] = []
    with contextlib.suppress(Exception):  # NVML's errors are of the package, which may not be there
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        for number in range(nvml.nvmlDeviceGetCount()):
            gpu = nvml.nvmlDeviceGetHandleByIndex(number)
            nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
            found.append(Counter("nvml", partial(_millijoules, nvml, gpu), 1e-3))
    return found


def _millijoules(nvml: Any, gpu: Any) -> float:
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))
    except Exception as error:  # the GPU is lost, or its driver is being replaced
        raise OSError(str(error)) from None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


class EnergyMeter:
    """Adds up, in a thread of its own, what all gauges say. Without any there is no thread, and no figure."""

    def __init__(
        self, gauges: Sequence[Gauge], reason: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``reason``: why there are no gauges."""
        self._gauges, self._reason, self._clock = gauges, reason, clock
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._started = clock()
        self._read_at = [self._started] * len(gauges)
        """When each was read last."""
        self._sample()
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
        if gauges:
            self._thread.start()

    def close(self) -> None:
        """Sample no more."""
        self._stop.set()
        if self._gauges:
            self._thread.join()

    def document(self) -> dict[str, Any]:
        """For ``status``: ``source``, and ``joules`` since ``seconds`` ago; or no source and the ``reason``."""
        if not self._gauges:
            return {"source": None, "reason": self._reason}
        now = self._sample()
        source = "+".join(dict.fromkeys(gauge.name for gauge in self._gauges))
        if now - min(self._read_at) > LOST_SECONDS:
            return {"source": None, "reason": f"{source} could not be read for {now - min(self._read_at):.0f} s"}
        joules = sum(gauge.joules for gauge in self._gauges)
        return {"source": source, "joules": joules, "seconds": now - self._started}

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> float:
        with self._lock:
            now = self._clock()
            for number, gauge in enumerate(self._gauges):
                with contextlib.suppress(OSError, ValueError):  # the next reading makes up for one that is missed
                    gauge.sample(now)
                    self._read_at[number] = now
            return now
