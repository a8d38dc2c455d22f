"""A model as robustdice sees it: layers with their tails, and what is computed between them.

This is the one place that reads a model's graph; nothing here knows any architecture by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.export import ExportedProgram

from robustdice.errors import ModelError
from robustdice.markup import html_table
from robustdice.model.beside import check_types, run_beside
from robustdice.model.canonical import canonicalise
from robustdice.model.execute import attribute, execute
from robustdice.model.layers import NetworkLayer, find_layers
from robustdice.model.outputs import SOFTMAX, flatten_scores, read_output
from robustdice.plan import Layer, ModelReference

BATCH_ELEMENTS = 1_000_000
"""Largest temporary, in numbers: larger ones cost more in page faults than they save in calls."""

MAX_ELEMENTS = 200_000_000
"""Numbers in one layer's values for all images that go through a network at once."""

Survivors = Sequence[torch.Tensor]
"""For every layer, which neurons are there: bool[neurons]."""


@dataclass(frozen=True)
class Network:
    """A model in the workshop. Made by :func:`build_network`; ``rd.load_model`` makes one from a name or file.

    ``activation`` is what makes probabilities of the class scores: a softmax, or a sigmoid where each class is a
    question of its own. ``shapes`` has the shape of every tensor of the graph, for some batch size; ``per_image`` are
    the tensors whose first axis is the batch; ``shared_parameters`` names the parameters outside of all layers.
    """

    module: fx.GraphModule
    layers: tuple[NetworkLayer, ...]
    input: fx.Node
    output: fx.Node
    input_shape: tuple[int, ...]
    outputs: int
    activation: str
    shapes: Mapping[fx.Node, tuple[int, ...]]
    per_image: frozenset[fx.Node]
    shared_parameters: tuple[str, ...]
    reference: ModelReference

    def __repr__(self) -> str:
        neurons = sum(layer.neurons for layer in self.plan_layers)
        return (
            f"<Network {self.reference.source}: {len(self.layers)} layers, {neurons:,} neurons, {self.parameters:,} "
            f"parameters, input {list(self.input_shape)}, {self.outputs} outputs>"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the layers."""
        rows = [
            [
                escape(layer.layer.name),
                f"{layer.layer.neurons}",
                f"{layer.layer.neurons * layer.layer.neuron_weights:,}",
                f"{layer.layer.neurons * layer.layer.neuron_macs:,}",
                "x".join(map(str, layer.shape)),
            ]
            for layer in self.layers
        ]
        return html_table(["layer", "neurons", "parameters", "multiply-adds", "exchange"], rows, repr(self)[1:-1])

    @property
    def parameters(self) -> int:
        """Number of parameters, those outside of all layers included."""
        return self.shared_weights + sum(layer.neurons * layer.neuron_weights for layer in self.plan_layers)

    @property
    def plan_layers(self) -> tuple[Layer, ...]:
        """The layers as a plan names them."""
        return tuple(layer.layer for layer in self.layers)

    @property
    def shared_weights(self) -> int:
        """Number of parameters outside of all layers."""
        return sum(attribute(self.module, name).numel() for name in self.shared_parameters)

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """How an image becomes an input, and the names of the classes (docs/formats.md)."""
        return self.reference.preprocessing

    @property
    def nodes(self) -> list[fx.Node]:
        """The graph's nodes, in an order in which they can be computed."""
        return list(self.module.graph.nodes)

    @cached_property
    def _constants(self) -> dict[torch.device, dict[fx.Node, torch.Tensor]]:
        return {}

    def constants(self, device: torch.device) -> dict[fx.Node, torch.Tensor]:
        """Every parameter and buffer of the graph, detached and on ``device``: what :func:`execute` starts from."""
        if device not in self._constants:
            self._constants[device] = {
                node: attribute(self.module, str(node.target)).detach().to(device)
                for node in self.nodes
                if node.op == "get_attr"
            }
        return dict(self._constants[device])

    def run(self, images: torch.Tensor, survivors: Survivors | None = None) -> torch.Tensor:
        """Class scores (before any softmax or sigmoid) [batch, outputs] of ``images`` [batch, channels, height, width].

        With ``survivors``, neurons that are not there are filled in at their layer's exchange.
        """
        values: dict[fx.Node, Any] = {**self.constants(images.device), self.input: images}
        exchanges = {} if survivors is None else exchange_masks(self, survivors)
        remaining = {node: len(node.users) for node in self.nodes}
        for node in self.nodes:
            execute(self.module, [node], values)
            if node in exchanges:
                values[node] = exchanges[node](values[node])
            for used in node.all_input_nodes:
                remaining[used] -= 1
                if not remaining[used] and used is not self.output:
                    del values[used]
        result = values[self.output]
        assert isinstance(result, torch.Tensor)
        return result


def on_best_device(images: torch.Tensor) -> torch.Tensor:
    """The images on a GPU when there is one. Always float32: TF32 is off, for nobody has measured what it does to
    rankings. On a CPU channels come last in memory, which every operation then keeps: pooling is ten times faster."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        return images.to("cuda")
    if images.ndim != 4:
        return images
    # With one channel both layouts are the same bytes, and contiguous() would leave the strides that say which it is.
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)


def together(network: Network, images: NDArray[np.float32], held: Collection[fx.Node] | None = None) -> torch.Tensor:
    """``images`` [n, channels, height, width] on the best device; some at even distances, where what one of the nodes
    that are ``held`` for all of them (any) is worth would be more than ``MAX_ELEMENTS`` numbers."""
    nodes = (node for node in network.shapes if node.op == "call_function") if held is None else held
    widest = max(math.prod(network.shapes[node][1:]) for node in nodes)
    every = -(-len(images) * widest // MAX_ELEMENTS)
    return on_best_device(torch.from_numpy(images[::every].copy()))


def images_at_once(network: Network) -> int:
    """How many images a batch has: few enough that no temporary gets large."""
    largest = max(math.prod(shape[1:]) for node, shape in network.shapes.items() if node.op == "call_function")
    return int(np.clip(BATCH_ELEMENTS // largest, 8, 64))


def exchange_masks(network: Network, survivors: Survivors) -> dict[fx.Node, Callable[[torch.Tensor], torch.Tensor]]:
    """For the exchanged value of every layer that has lost neurons: the function that fills them in."""
    fills: dict[fx.Node, Callable[[torch.Tensor], torch.Tensor]] = {}
    for layer, alive in zip(network.layers, survivors, strict=True):
        if not bool(alive.all()):
            fills[layer.value] = _Fill(layer.broadcast(~alive), layer.fill)
    return fills


@dataclass(frozen=True)
class _Fill:
    lost: torch.Tensor
    fill: float

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value.masked_fill(self.lost, self.fill)


def build_network(
    program: ExportedProgram,
    source: str,
    preprocessing: Mapping[str, Any] | None = None,
    random_weights_seed: int | None = None,
) -> Network:
    """Find the layers, tails and exchanges of an exported program; ModelError when there is something to refuse.

    The rewritten graph is run beside the program, on other batch sizes too, and must give the same scores.
    """
    module = canonicalise(program)
    graph = module.graph
    source_node = next(node for node in graph.nodes if node.op == "placeholder")
    exported = source_node.meta["val"].shape
    input_shape = tuple(exported[1:])
    if not all(isinstance(size, int) for size in input_shape) or len(input_shape) < 1:
        raise ModelError(
            f"the model takes inputs of shape {tuple(exported)}; all but the batch size must be fixed: "
            "say the size with --size, as in --size 3,224,224, or in the sidecar"
        )
    check_types(module, source_node)
    flatten_scores(module.graph)
    batch = exported[0] if isinstance(exported[0], int) else 2
    example = torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(0))
    shapes, per_image = run_beside(module, program, example)
    output_node, outputs, activation = read_output(module, shapes, preprocessing or {})
    shapes, per_image = {**shapes, output_node: (batch, outputs)}, per_image | {output_node}
    layers, shared = find_layers(module, shapes, per_image)
    return Network(
        module=module,
        layers=layers,
        input=source_node,
        output=output_node,
        input_shape=input_shape,
        outputs=outputs,
        activation=activation,
        shapes=shapes,
        per_image=per_image,
        shared_parameters=shared,
        reference=ModelReference(source, _digest(module, activation), random_weights_seed, dict(preprocessing or {})),
    )


def _digest(module: fx.GraphModule, activation: str) -> str:
    """SHA-256 (hex) of the graph, all parameters, and what the scores mean where they are not one question."""
    digest = hashlib.sha256(b"" if activation == SOFTMAX else activation.encode())
    for node in module.graph.nodes:
        digest.update(f"{node.op} {node.target} {node.args} {node.kwargs}\n".encode())
        if node.op == "get_attr":
            digest.update(attribute(module, str(node.target)).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
