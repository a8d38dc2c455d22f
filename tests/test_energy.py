"""Energy, from trees like those that kernels show: what is measured once is counted once, and nothing is made up."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bundles import INPUT_SHAPE, Network, make_plan, write_bundles
from commands import run, run_json
from robustdice.errors import ClusterError
from robustdice.meter import throughput
from robustdice.meter.throughput import bench_running
from robustdice.report.cluster_tables import bench_table
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.device import run_device
from robustdice.runtime.energy import SAMPLE_SECONDS, Counter, EnergyMeter, Power, find_gauges
from robustdice.runtime.wire.founding import write_cluster


def put(root: Path, **files: object) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).write_text(f"{content}\n")


def old_jetson(sysfs: Path, **rails: int) -> None:
    """Milliwatts of each rail, as kernels up to 4.9 show them; found through the driver and through the bus."""
    device = sysfs / "devices" / "i2c-7" / "7-0040" / "iio:device0"
    for number, (name, milliwatts) in enumerate(rails.items()):
        put(
            device,
            **{f"rail_name_{number}": name, f"in_power{number}_input": milliwatts, f"in_voltage{number}_input": 5000},
        )
    for place in ("bus/i2c/drivers/ina3221x", "bus/i2c/devices"):
        (sysfs / place).mkdir(parents=True)
        (sysfs / place / "7-0040").symlink_to(device.parent)


def new_jetson(sysfs: Path, **rails: tuple[int, int]) -> None:
    """Millivolts and milliamperes of each rail, as kernels from 5.10 on show them, beside other sensors."""
    put(sysfs / "class/hwmon/hwmon0", name="tmp451", temp1_input=41000)
    chip = sysfs / "class/hwmon/hwmon3"
    put(chip, name="ina3221", in7_label="sum of shunt voltages", in7_input=1, curr4_input=9)
    for number, (name, (volts, amperes)) in enumerate(rails.items(), 1):
        put(chip, **{f"in{number}_label": name, f"in{number}_input": volts, f"curr{number}_input": amperes})


def rapl(sysfs: Path, zone: str, name: str, microjoules: int, largest: int = 999_999) -> Path:
    put(sysfs / "class/powercap" / zone, name=name, energy_uj=microjoules, max_energy_range_uj=largest)
    return sysfs / "class/powercap" / zone / "energy_uj"


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def meter_of(sysfs: Path, clock: Clock) -> EnergyMeter:
    """A meter that samples when it is asked only."""
    meter = EnergyMeter(*find_gauges(sysfs), clock=clock)
    meter.close()
    return meter


@pytest.mark.parametrize("layout", ["iio", "hwmon"])
@pytest.mark.parametrize(("whole", "watts"), [("VDD_IN", 6.0), ("VDD_SOC", 6.0 + 2.5)])
def test_a_jetson_is_measured_at_its_input_or_at_all_rails(
    tmp_path: Path, layout: str, whole: str, watts: float, clock: Clock
) -> None:
    if layout == "iio":
        old_jetson(tmp_path, **{whole: 6000, "VDD_CPU_GPU_CV": 2500})
    else:
        new_jetson(tmp_path, **{whole: (5000, 1200), "VDD_CPU_GPU_CV": (5000, 500)})
    meter = meter_of(tmp_path, clock)
    clock.seconds += 10
    assert meter.document() == {"source": "ina3221", "joules": pytest.approx(10 * watts), "seconds": 10.0}


def test_power_is_taken_to_change_evenly_and_a_missed_reading_is_made_up_for(tmp_path: Path, clock: Clock) -> None:
    new_jetson(tmp_path, VDD_IN=(5000, 1000))
    meter = meter_of(tmp_path, clock)
    current = tmp_path / "class/hwmon/hwmon3/curr1_input"
    clock.seconds += 1
    current.unlink()
    assert meter.document()["joules"] == 0.0
    clock.seconds += 1
    current.write_text("3000")
    assert meter.document()["joules"] == pytest.approx(2 * (5 + 15) / 2)


def test_a_channel_that_is_not_connected_is_no_rail(tmp_path: Path, clock: Clock) -> None:
    new_jetson(tmp_path, VIN_SYS=(5000, 1000), NC=(0, 0))
    (tmp_path / "class/hwmon/hwmon3/curr2_input").write_text("")
    meter = meter_of(tmp_path, clock)
    clock.seconds += 2
    assert meter.document()["joules"] == pytest.approx(10)


def test_rapl_counts_packages_and_memory_once_and_begins_again_from_zero(tmp_path: Path, clock: Clock) -> None:
    package = rapl(tmp_path, "intel-rapl:0", "package-0", 999_000)
    rapl(tmp_path, "intel-rapl:0:0", "core", 5)
    memory = rapl(tmp_path, "intel-rapl:0:1", "dram", 10)
    rapl(tmp_path, "intel-rapl:1", "psys", 77)
    rapl(tmp_path, "intel-rapl-mmio:0", "package-0", 999_000)
    meter = meter_of(tmp_path, clock)
    for grown in range(1, 4):
        package.write_text(str((999_000 + 600_000 * grown) % 1_000_000))
        memory.write_text(str(10 + 100_000 * grown))
        assert meter.document()["joules"] == pytest.approx(0.7 * grown)
    assert meter.document()["source"] == "rapl"


def test_what_may_not_be_read_is_named_with_the_way_out() -> None:
    directory = Path(tempfile.mkdtemp())
    try:
        energy = rapl(directory, "intel-rapl:0", "package-0", 1)
        energy.chmod(0)
        directory.chmod(0o755)
        if os.geteuid() == 0:  # who may read everything
            os.seteuid(65534)
        try:
            gauges, reason = find_gauges(directory)
        finally:
            os.seteuid(os.getuid())
        assert not gauges
        assert reason is not None
        assert f"{energy} may not be read" in reason
    finally:
        shutil.rmtree(directory)


def test_nothing_is_made_up_where_nothing_can_be_read(tmp_path: Path, clock: Clock) -> None:
    threads = threading.active_count()
    meter = EnergyMeter(*find_gauges(tmp_path), clock=clock)
    assert threading.active_count() == threads
    document = meter.document()
    assert document["source"] is None
    assert "measures no energy" in document["reason"]
    new_jetson(tmp_path, VDD_IN=(5000, 1000))
    meter = meter_of(tmp_path, clock)
    (tmp_path / "class/hwmon/hwmon3/curr1_input").unlink()
    clock.seconds += 5
    assert meter.document() == {"source": None, "reason": "ina3221 could not be read for 5 s"}


def test_a_gpu_is_asked_only_by_who_computes_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    millijoules = iter(range(0, 10**6, 500))
    nvml = ModuleType("pynvml")
    vars(nvml).update(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(millijoules),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    assert [gauge.name for gauge in find_gauges(tmp_path)[0]] == ["rapl"]
    meter = EnergyMeter(*find_gauges(tmp_path, gpu=True), clock=clock)
    meter.close()
    found = meter.document()
    assert found["source"] == "rapl+nvml"
    assert found["joules"] >= 0.5
    lost = StopIteration("GPU is lost")  # as any error of NVML's own, which may come at any reading
    vars(nvml).update(nvmlDeviceGetTotalEnergyConsumption=lambda _: (_ for _ in ()).throw(lost))
    clock.seconds += 5
    assert meter.document() == {"source": None, "reason": "rapl+nvml could not be read for 5 s"}
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert [gauge.name for gauge in find_gauges(tmp_path, gpu=True)[0]] == ["rapl"]


def test_a_counter_that_was_reset_counts_from_there() -> None:
    values = iter([50, 80, 10, 30])
    counter = Counter("gpu", lambda: next(values), 1.0)
    for now in range(4):
        counter.sample(now)
    assert counter.joules == 30 + 10 + 20


def test_a_thread_samples_by_itself() -> None:
    times: list[float] = []

    def watts() -> float:
        times.append(time.monotonic())
        return 2.0

    meter = EnergyMeter([Power("made up", watts)])
    while len(times) < 4:
        time.sleep(SAMPLE_SECONDS / 4)
    found = meter.document()
    meter.close()
    assert found["joules"] == pytest.approx(2.0 * found["seconds"], rel=0.05)


@pytest.fixture
def jetsons(tmp_path: Path) -> Iterator[Path]:
    """Two devices that run, one of which has an INA3221 that says 5 W."""
    plan = make_plan(2)
    write_bundles(tmp_path, plan, Network())
    write_cluster(tmp_path, 2, plan.digest)
    new_jetson(tmp_path / "sys-0", VDD_IN=(5000, 1000))
    stop = threading.Event()
    threads = [
        threading.Thread(
            target=run_device,
            args=(tmp_path / f"device-{device}",),
            kwargs={"stop": stop, "provider": "cpu", "sysfs": tmp_path / f"sys-{device}"},
        )
        for device in range(2)
    ]
    for thread in threads:
        thread.start()
    with Client(tmp_path / "cluster.toml") as client:
        while {*map(len, (said["up"] for said in client.status(0.2).values()))} != {2}:
            time.sleep(0.02)
    yield tmp_path
    stop.set()
    for thread in threads:
        thread.join()


def test_a_measurement_ends_soon_after_devices_stop_answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "ANSWER_SECONDS", 0.5)
    plan = make_plan(2)
    write_bundles(tmp_path, plan, Network())
    write_cluster(tmp_path, 2, plan.digest)
    with LocalCluster(tmp_path) as cluster:
        cluster.infer(np.zeros(INPUT_SHAPE, np.float32))

        def freeze() -> None:
            cluster.freeze(0)
            cluster.freeze(1)

        stop = threading.Timer(0.7, freeze)
        stop.start()
        with pytest.raises(ClusterError, match=r"stopped answering: none of the last frames was answered, for \d+ s"):
            bench_running(tmp_path, seconds=0.1, rounds=1, window=2, samples=1_000_000)
        stop.join()


def test_bench_measures_devices_that_run_already_and_what_they_take(jetsons: Path) -> None:
    found = run_json("bench", jetsons, "--running", "--seconds", "0.3", "--rounds", "2")
    first, second = found["devices"]
    assert first["energy_source"] == "ina3221"
    assert first["joules_per_image"] == pytest.approx(5.0 / found["frames_per_second"], rel=0.3)
    assert second["joules_per_image"] is second["energy_source"] is None
    assert "measures no energy" in second["no_energy"]
    assert (found["unanswered"], found["coverage"], found["silent"]) == (0, 1.0, [])
    assert found["images"] > 10
    assert all(device["peak_rss_bytes"] >= device["rss_bytes"] > 0 for device in found["devices"])

    beyond = bench_running(jetsons, seconds=0.3, rounds=1, window=2, idle_seconds=0.3)
    assert beyond.devices[0].joules_per_image == pytest.approx(0.0, abs=0.2 * first["joules_per_image"])
    assert "beyond what it takes at rest" in str(bench_table(beyond).caption)
    assert "leave out --provider" in run("bench", jetsons, "--running", "--provider", "cpu", status=1).stderr
