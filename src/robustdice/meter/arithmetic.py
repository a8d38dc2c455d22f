"""What each layer of a model takes on one thread of this machine (needs the workshop)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.bundle.onnx_graph import OnnxGraph, cut, cut_layer, export_onnx, make_model
from robustdice.cost.profile import LayerSeconds
from robustdice.model.canonical import arguments
from robustdice.model.network import Network
from robustdice.progress import Progress, silent
from robustdice.runtime.sessions import open_session

MOST_ROUNDS = 30
ENOUGH_SECONDS = 2.0
"""Of the whole model's time: so long, and not less than three times, it is run."""


@dataclass
class _Run:
    session: Any
    inputs: dict[str, NDArray[Any]]
    seconds: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        # Of this thread alone, in which ONNX Runtime computes: other jobs on the machine do not count.
        start = time.thread_time()
        self.session.run(None, self.inputs)
        self.seconds.append(time.thread_time() - start)


def measure_layers(
    network: Network, graph: OnnxGraph | None = None, on_progress: Progress = silent
) -> tuple[dict[str, LayerSeconds], float]:
    """Every layer with its tail, and what the model takes beside them: medians of rounds in which everything runs once,
    as layers follow each other in a frame."""
    graph = graph or export_onnx(network)
    wholes = [_whole(network, graph, packs) for packs in (True, False)]
    runs: list[tuple[str, _Run, _Run, float]] = []
    for number, layer in enumerate(network.layers):
        group, neurons = layer.layer.group, np.arange(layer.layer.neurons)
        half = max(1, len(neurons) // group // 2) * group
        every, part = (_layer(network, graph, number, some) for some in (neurons, neurons[:half]))
        runs.append((layer.layer.name, every, part, half / len(neurons)))
    for whole in wholes:
        whole()
    rounds = int(np.clip(ENOUGH_SECONDS / max(*(whole.seconds.pop() for whole in wholes), 1e-6), 3, MOST_ROUNDS))
    for done in range(rounds):
        for whole in wholes:
            whole()
        for _, every, part, _ in runs:
            every()
            part()
        on_progress(done + 1, rounds)
    found = {name: LayerSeconds(median(a.seconds), median(b.seconds), share) for name, a, b, share in runs}
    rest = min(median(whole.seconds) for whole in wholes) - sum(each.whole for each in found.values())
    return found, max(0.0, rest)


def _whole(network: Network, graph: OnnxGraph, packs: bool) -> _Run:
    source, result = network.input.name, network.output.name
    model = make_model([cut(graph, [source], [result])], [source], [result], graph.opset, graph.types)
    return _Run(open_session(model, 1, packs=packs), {source: _numbers(network.input_shape)})


def _layer(network: Network, graph: OnnxGraph, index: int, neurons: NDArray[np.int64]) -> _Run:
    layer = network.layers[index]
    source = arguments(layer.node)[0]
    part = cut_layer(graph, layer, neurons, "some/")
    model = make_model([part], [source.name], [f"some/{layer.value.name}"], graph.opset, graph.types)
    packs = len(network.shapes[source]) > 2  # as devices do
    return _Run(open_session(model, 1, packs=packs), {source.name: _numbers(network.shapes[source][1:])})


def _numbers(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
