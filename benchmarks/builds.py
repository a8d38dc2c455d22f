"""Builds that benchmarks run: of a model, a split and a number of devices. They can be kept from run to run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

import robustdice as rd
from robustdice.errors import PlanError
from robustdice.meter.whole import whole_model
from robustdice.model.network import Network
from robustdice.plan import Certificate

SPLITS = ("neurons", "hidden", "rows", "auto", "latency", "replicas")
"""How a model is dealt out: ``auto`` and ``latency`` as the cost model says is best for throughput and for one frame
alone, with its typical figures; ``replicas``: whole models, which take frames in turn."""


class Builds:
    """Builds in a directory; what is there already is not made again."""

    def __init__(self, root: Path) -> None:
        """``root`` need not be there."""
        self.root = root

    def whole(self, model: str) -> Path:
        """The unpartitioned model as an ONNX file."""
        path = self.root / f"{name_of(model)}.onnx"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole_model(network_of(model)))
        return path

    def build(
        self,
        model: str,
        split: str,
        devices: int,
        *,
        wire: str = "float32",
        memory: float | None = None,
        hosts: tuple[str, ...] | None = None,
        certified: bool = False,
    ) -> Path:
        """A build's directory. Plain slices, or with copies where there is room for them, up to ``memory``, a share of
        the model. What is ``certified`` was not evaluated: the certificate is there so that answers say whether they
        were computed in one view from first to last. PlanError where a model cannot be split so."""
        words = [name_of(model), str(devices), split, wire, *([] if memory is None else [f"{memory:g}"])]
        words += [*(["apart"] if hosts else []), *(["certified"] if certified else [])]
        place = self.root / "-".join(words)
        if not (place / "plan.json").exists():
            network = network_of(model)
            plan = self._plan(network, split, devices, wire, memory)
            if certified:
                down = [each for size in range(devices) for each in rd.failure_sets(devices, size)]
                plan = replace(plan, certificate=Certificate("none", "0", 1, 1.0, dict.fromkeys(down, 1.0)))
            rd.build(network, plan, place, host=hosts, base_port=None if hosts is None else 27200)
        return place

    def _plan(self, network: Network, split: str, devices: int, wire: str, memory: float | None) -> rd.Plan:
        if split == "replicas":
            return rd.partition(network, devices=devices, method="full")
        if split in ("neurons", "hidden"):
            return self._partition(network, devices, memory, split=split, wire=wire)
        how = {
            "split": "auto" if split == "latency" else split,
            "goal": "latency" if split == "latency" else "throughput",
        }
        return self._partition(network, devices, memory, wire=wire, **how)

    def _partition(self, network: Network, devices: int, memory: float | None, **how: object) -> rd.Plan:
        options = {"devices": devices, **how}
        if memory is None:
            return rd.partition(network, method="lop", **options)  # type: ignore[arg-type]
        scores = rd.score(network, np.zeros((1, *network.input_shape), np.float32), columns=["s1"])
        return rd.partition(network, scores, memory=memory, **options)  # type: ignore[arg-type]


@cache
def network_of(model: str) -> Network:
    """A file, ``module:factory``, or a model of torchvision with random weights."""
    if Path(model).exists() or ":" in model:
        return rd.load_model(model)
    return rd.load_model(f"torchvision:{model}", random_weights=True)


def name_of(model: str) -> str:
    """Of a model, for people."""
    return Path(model).stem.partition(":")[0]


def try_build(builds: Builds, model: str, split: str, devices: int, **options: object) -> Path | None:
    """A build, or None, and the reason printed, where a model cannot be split so."""
    try:
        return builds.build(model, split, devices, **options)  # type: ignore[arg-type]
    except PlanError as error:
        print(f"{name_of(model)}: no plan by {split}: {error}", flush=True)
        return None
