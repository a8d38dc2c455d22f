"""What handing over takes on this machine: devices run small networks with few and many exchanges, of few and many
values, to few and many peers, and what their processes take more is divided by what they hand over more (needs the
workshop)."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from robustdice.cost.profile import LayerSeconds, Profile
from robustdice.errors import ClusterError
from robustdice.meter.arithmetic import measure_layers
from robustdice.meter.unpacking import measure_unpacking
from robustdice.model.network import Network, build_network
from robustdice.model.tracing import export_module
from robustdice.plan import Plan
from robustdice.progress import Progress, silent
from robustdice.runtime.cluster import LocalCluster
from robustdice.wire_format import WIRES
from robustdice.workshop import build, partition

FEW, MANY = 2, 10
"""Exchanges of a frame."""
SMALL, LARGE = 16, 64
"""Height and width of what is exchanged, ``CHANNELS`` deep."""
CHANNELS = 16
MORE_DEVICES = 4
STREAM_SECONDS = 1.5
IDLE_SECONDS = 1.0
FRAMES_ALONE = 20
T = TypeVar("T")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Taken:
    """What a frame took on devices of this machine: seconds of the busiest one's processor in all its threads, frames
    per second with several in flight, and seconds from its sending to its answer when it is alone (a median)."""

    processor_seconds: float
    frames_per_second: float
    latency_seconds: float


class _Chain(nn.Module):
    """Layers one after the other; to what every other one gives its input is added, which no device does for others."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x + layer(x) if number % 2 else torch.relu(layer(x))
        return x.mean((2, 3))


def measure_handing(on_progress: Progress = silent) -> Profile:
    """A profile without layers, of devices like the processes of this machine."""
    wanted = [(FEW, SMALL, 2, "float32"), (MANY, SMALL, 2, "float32"), (MANY, SMALL, MORE_DEVICES, "float32")]
    wanted += [(MANY, LARGE, 2, wire) for wire in WIRES]
    found: list[Taken] = []
    for each in wanted:
        found.append(_measure(*each))
        on_progress(len(found), len(wanted))
    few, many, more, *large = found
    # Every device takes the input. Of two, each sends one half of every exchange and receives the other.
    small = CHANNELS * SMALL**2
    values = {
        wire: max(0.0, each.processor_seconds - many.processor_seconds) / (CHANNELS * LARGE**2 - small) / (MANY + 1)
        for wire, each in zip(WIRES, large, strict=True)
    }
    to_one = (many.processor_seconds - few.processor_seconds) / (MANY - FEW) - small * values["float32"]
    frame = few.processor_seconds - FEW * (to_one + small * values["float32"])
    handled = 2 * small * (MORE_DEVICES - 1) / MORE_DEVICES  # a part is sent to each peer, and one received from each
    to_more = (more.processor_seconds - frame) / MANY - handled * values["float32"]
    peer = min(max(0.0, (to_more - to_one) / (MORE_DEVICES - 2)), max(0.0, to_one))
    hop = (many.latency_seconds - few.latency_seconds) / (MANY - FEW) - to_one - small * values["float32"]
    return Profile(
        exchange_seconds=max(0.0, to_one - peer),
        peer_seconds=peer,
        value_seconds=values,
        hop_seconds=max(0.0, hop),
        frame_seconds=max(0.0, frame),
    )


@cache
def _network(layers: int, size: int) -> tuple[Network, Mapping[str, LayerSeconds], float]:
    """A chain, what its layers take, and what is beside them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _Chain(layers)
    network = build_network(export_module(module, (CHANNELS, size, size), "the chain"), "chain")
    return network, *measure_layers(network)


def _measure(layers: int, size: int, devices: int, wire: str) -> Taken:
    """Of a chain in even slices, beside its arithmetic."""
    network, times, rest_seconds = _network(layers, size)
    arithmetic_seconds = rest_seconds + sum(each.of(1 / devices) for each in times.values())
    plan = replace(partition(network, devices=devices, method="lop"), wire=wire)
    taken = measure_plan(network, plan, STREAM_SECONDS)
    return replace(
        taken,
        processor_seconds=taken.processor_seconds - arithmetic_seconds,
        latency_seconds=taken.latency_seconds - arithmetic_seconds,
    )


def measure_plan(network: Network, plan: Plan, seconds: float) -> Taken:
    """Build a plan, run its devices as processes of this machine, and stream random frames for so long."""
    frame = np.random.default_rng(0).standard_normal(network.input_shape, dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="robustdice-profile-") as directory:
        build(network, plan, Path(directory) / "build")
        with LocalCluster(Path(directory) / "build", timeout_seconds=30.0, window=4) as cluster:
            processes = [pid for device in range(plan.devices) if (pid := cluster.process(device)) is not None]
            _stream(cluster, frame, seconds / 3)
            cluster.infer(frame)  # the frames that were in flight are done before it
            _, idle, _ = _loads(processes, lambda: time.sleep(IDLE_SECONDS))
            frames, busy, elapsed = _loads(processes, lambda: _stream(cluster, frame, seconds))
            latencies = [cluster.infer(frame).latency_seconds for _ in range(FRAMES_ALONE)]
    # Devices keep in contact whether there are frames or not: that is no part of what a frame takes.
    load = max(0.0, *(with_frames - without for with_frames, without in zip(busy, idle, strict=True)))
    return Taken(load * elapsed / frames, frames / elapsed, median(latencies))


def _loads(processes: Sequence[int], run: Callable[[], T]) -> tuple[T, list[float], float]:
    """What ``run`` gives, how much of a processor each process took meanwhile, and how many seconds these were."""
    before, start = [processor_seconds_of(process) for process in processes], time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    spent = [processor_seconds_of(process) - then for process, then in zip(processes, before, strict=True)]
    return result, [seconds / elapsed for seconds in spent], elapsed


def _stream(cluster: LocalCluster, frame: np.ndarray, seconds: float) -> int:
    """How many frames are answered."""
    start = time.perf_counter()
    for answered, answer in enumerate(cluster.client.stream(repeat(frame)), start=1):
        if answer.outputs is None:
            raise ClusterError(f"frame {answer.number} was not answered: {answer.refused or 'time is up'}; try again")
        if time.perf_counter() - start > seconds:
            return answered
    raise AssertionError("a stream of endless frames has ended")


def processor_seconds_of(process: int) -> float:
    """What a process has taken so far, in all its threads."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError as error:
        raise ClusterError(f"what device processes take is read from /proc: {error}; profile on Linux") from None
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure_profile(network: Network, on_progress: Progress = silent) -> Profile:
    """What this machine takes for the layers of a network on one thread, for unpacking weights, and for handing over
    between processes."""
    layers, rest_seconds = measure_layers(network, on_progress=on_progress)
    macs = sum(layer.neurons * layer.neuron_macs for layer in network.plan_layers)
    taken = rest_seconds + sum(each.whole for each in layers.values())
    return replace(
        measure_handing(on_progress),
        macs_per_second=macs / taken,
        layers=layers,
        rest_seconds=rest_seconds,
        model_digest=network.reference.digest,
        unpack_seconds=measure_unpacking(),
    )
