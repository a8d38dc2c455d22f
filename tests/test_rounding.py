"""Coarse weights: what they lose, against the plain way and against trying everything."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from nets import Branches, Chains, ChannelsLast, Residual, network_of, random_images, shared_network
from robustdice.entropy_code import CODED
from robustdice.failure.copies import Copies, State
from robustdice.failure.passes import run_under
from robustdice.importance.values import Importance
from robustdice.model.data import load_data
from robustdice.model.execute import attribute, execute
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.representation import REPRESENTATIONS, CoarseFilter, code_offset, code_range
from robustdice.rounding import curvature as curvature_module
from robustdice.rounding import scales as scales_module
from robustdice.rounding.affine import fold
from robustdice.rounding.curvature import Curvature, damped
from robustdice.rounding.gptq import gptq
from robustdice.rounding.inputs import MAX_COLUMNS, MAX_NUMBERS, MOST_COLUMNS, columns
from robustdice.rounding.layer import Choice
from robustdice.rounding.network import round_network
from robustdice.rounding.scales import as_float16, best_scales, to_levels
from robustdice.workshop import partition

FIXED = ["int8", "int4", "int3", "int2"]


def problem(seed: int, neurons: int, weights: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters, and inputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, weights, generator=generator) @ torch.randn(weights, weights, generator=generator)
    return torch.randn(neurons, weights, generator=generator), inputs


def loss(filters: torch.Tensor, values: torch.Tensor, inputs: torch.Tensor) -> float:
    """The mean squared difference of what filters give, as it is minimised."""
    difference = (filters - values).double()
    return float(torch.einsum("nk,kl,nl->", difference, damped(inputs.T @ inputs / len(inputs)), difference))


@pytest.mark.parametrize("kind", FIXED)
def test_later_columns_make_up_for_earlier_ones(kind: str) -> None:
    lost = np.zeros(2)
    for seed in range(10):
        filters, inputs = problem(seed, 16, 20)
        steps = best_scales(filters, kind, 20).expand(-1, 20)
        lost += (
            loss(filters, to_levels(filters, steps, kind) * steps, inputs),
            loss(filters, gptq(filters, Curvature.of(inputs), steps, torch.arange(20), kind) * steps, inputs),
        )
    assert lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize("weights", [30, 130, 256])
def test_few_inputs_say_the_same_by_themselves_and_by_their_second_moments(
    weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters, inputs = problem(0, 16, weights)
    few, wanted = inputs[:5], inputs[:5] @ filters.T
    curvatures = [Curvature.of(few)]
    monkeypatch.setattr(curvature_module, "FEW", weights)
    curvatures.append(Curvature.of(few))
    assert {type(curvature) for curvature in curvatures} == set(Curvature.__subclasses__())
    solved = [curvature.solve(wanted) for curvature in curvatures]
    torch.testing.assert_close(*solved, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(few @ solved[0].T, wanted, rtol=0.1, atol=0.1 * float(wanted.std()))
    steps = best_scales(filters, "int3", weights).expand(-1, weights)
    by_each = [gptq(filters, curvature, steps, torch.arange(weights), "int3") * steps for curvature in curvatures]
    losses = [loss(filters, values, few) for values in by_each]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] < 0.5 * loss(filters, to_levels(filters, steps, "int3") * steps, few)


def test_gptq_comes_near_the_best_of_all_codes() -> None:
    low, high = code_range("int3")
    every = torch.tensor(list(itertools.product(range(low, high + 1), repeat=4)), dtype=torch.float32)
    best = found = nearest = 0.0
    for seed in range(40):
        filters, inputs = problem(seed, 8, 4)
        steps = best_scales(filters, "int3", 4).expand(-1, 4)
        difference = (filters[:, None] - every * steps[:, None]).double()
        losses = torch.einsum("nek,kl,nel->ne", difference, damped(inputs.T @ inputs / 64), difference)
        of_seed = float(losses.min(1).values.sum())
        best += of_seed
        by_gptq = loss(filters, gptq(filters, Curvature.of(inputs), steps, torch.arange(4), "int3") * steps, inputs)
        assert by_gptq >= of_seed * 0.9999
        found += by_gptq
        nearest += loss(filters, to_levels(filters, steps, "int3") * steps, inputs)
    assert found < best + 0.5 * (nearest - best)


def test_of_a_wide_filter_some_weights_say_what_scale_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1))
    of_all = best_scales(filters, "int3", 5000)
    monkeypatch.setattr(scales_module, "ENOUGH", 1000)
    of_some = best_scales(filters, "int3", 5000)

    def error(scales: torch.Tensor) -> float:
        return float((to_levels(filters, scales, "int3") * scales - filters).abs().pow(2.4).sum())

    assert error(of_all) <= error(of_some) < 1.05 * error(of_all)


@settings(max_examples=25)
@given(st.sampled_from(FIXED), st.integers(1, 30), st.integers(1, 9), st.integers(0, 10**6))
def test_the_scales_beat_the_widest_one(kind: str, weights: int, group: int, seed: int) -> None:
    filters, _ = problem(seed, 5, weights)
    group = min(group, weights)
    scales = best_scales(filters, kind, group)
    steps = scales.repeat_interleave(group, 1)[:, :weights]
    codes = (to_levels(filters, steps, kind) - code_offset(kind)).to(torch.int8).numpy()
    kept = CoarseFilter(kind, codes, scales.numpy().astype(np.float16), group).values()
    assert np.allclose(kept, to_levels(filters, steps, kind) * steps)  # the scales are float16 already
    _, high = code_range(kind)
    for start in range(0, weights, group):
        part = filters[:, start : start + group]
        widest = as_float16(part.abs().amax(1, keepdim=True) / (high + code_offset(kind)))
        naive = (to_levels(part, widest, kind) * widest - part).abs().pow(2.4).sum()
        ours = np.abs(kept[:, start : start + group] - part.numpy()) ** 2.4
        assert ours.sum() <= float(naive) * 1.0001 + 1e-9


NETWORKS = {
    "residual": partial(shared_network, Residual, 3, 8, 8),
    "branches": partial(shared_network, Branches, 2, 6, 6),
    "channels_last": partial(shared_network, ChannelsLast, 3, 8, 8),
    "chains": partial(shared_network, Chains, 2, 8, 8),
}


class Sliding(nn.Module):
    """Strides, padding, dilation and groups, in one dimension: [4, 30] -> 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.first(x).relu().mean(2))
        return result


def values_of(network: Network, images: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
    values: dict[fx.Node, torch.Tensor] = {**network.constants(images.device), network.input: images}
    with torch.no_grad():
        execute(network.module, network.nodes, values)
    return values


@pytest.mark.parametrize("name", [*NETWORKS, "sliding"])
def test_folded_filters_times_what_they_see_are_the_values_behind_the_affine_chain(name: str) -> None:
    network = NETWORKS[name]() if name in NETWORKS else shared_network(Sliding, 4, 30)
    values = values_of(network, torch.from_numpy(random_images(3, network.input_shape)))
    for layer in network.layers:
        folded = fold(network, layer)
        size = tuple(attribute(network.module, layer.own_filter).shape)
        seen = columns(layer, values[layer.node.all_input_nodes[0]], size)
        assert seen is not None
        each = layer.layer.neurons // len(seen)
        found = (
            torch.cat([x @ folded.filters[g * each : (g + 1) * each].T for g, x in enumerate(seen)], 1) + folded.shift
        )
        expected = values[layer.affine_end].movedim(layer.affine_axis, -1).reshape(-1, layer.layer.neurons)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), layer.layer.name


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_fine_copies_compute_nearly_what_the_network_does(name: str, kind: str) -> None:
    network = NETWORKS[name]()
    images = random_images(32, network.input_shape)
    coarse = round_network(network, {i: [Choice(kind)] for i in range(len(network.layers))}, images)
    exact, found = scores(network, images, None, {}), scores(network, images, kind, coarse)
    assert np.abs(found - exact).max() <= 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(("kind", "group"), [("int3", None), ("int2", 16), ("ec2", None), ("ec1", None)])
def test_fitting_to_images_keeps_more_than_rounding_to_nearest(kind: str, group: int | None) -> None:
    network = load_model("robustdice.demo.network:digits_cnn")
    data = load_data("digits", network.preprocessing, network.outputs, split="train")
    images, fresh = data.images(0, 100), data.images(100, 200)
    wanted = {i: [Choice(kind, group)] for i in range(len(network.layers))}
    exact = scores(network, fresh, None, {})
    errors = [
        float(((scores(network, fresh, kind, round_network(network, wanted, given)) - exact) ** 2).mean())
        for given in (images, None)
    ]
    assert errors[0] < 0.7 * errors[1]


def scores(network: Network, images: np.ndarray, kind: str | None, coarse: object) -> np.ndarray:
    position = 0 if kind is None else REPRESENTATIONS.index(kind)
    state = State(tuple(np.full(layer.layer.neurons, position, np.int8) for layer in network.layers))
    (found,) = run_under(network, torch.from_numpy(images), [state], Copies(network, coarse))  # type: ignore[arg-type]
    return found.numpy()


@settings(max_examples=6)
@given(
    primary=st.sampled_from(REPRESENTATIONS),
    spare=st.sampled_from(REPRESENTATIONS),
    memory=st.floats(0.3, 1.0),
    seed=st.integers(0, 10**6),
)
def test_a_budget_is_for_the_bytes_of_the_copies_as_they_are_kept(
    primary: str, spare: str, memory: float, seed: int
) -> None:
    network = NETWORKS["residual"]()
    random = np.random.default_rng(seed)
    importance = Importance(
        names=tuple(layer.name for layer in network.plan_layers),
        scores=tuple(random.random((layer.neurons // layer.group, 1)) for layer in network.plan_layers),
        columns=("s1",),
        model=network.reference,
    )
    least = partition(network, importance, devices=3, threshold=math.inf, precision=primary, spare_precision=spare)
    memory = max(memory, least.memory_share)
    plan = partition(network, importance, devices=3, memory=memory, precision=primary, spare_precision=spare)
    assert plan.memory_share <= memory
    for index, shards in enumerate(plan.shards):
        for shard in shards:
            for position, holder in enumerate(shard.holders):
                expected = spare if position or plan.held_by_all(index) else primary
                delicate = index in (0, len(plan.layers) - 1)
                coarse = {"int4", "int3", "int2", *CODED}
                if delicate and expected in coarse:
                    expected = "int8"
                if plan.layers[index].filter_weights > 25 or delicate or expected not in coarse:
                    assert holder.representation == expected


@pytest.mark.parametrize(
    ("inputs", "neurons", "least", "most"),
    [
        (4, 4, MOST_COLUMNS / 2, MOST_COLUMNS),
        (4, 1024, MAX_COLUMNS / 2, MAX_COLUMNS),  # what comes out counts as well
        (80, 8, MAX_NUMBERS / 80 / 9 / 2, MAX_NUMBERS / 80 / 9),
        (150, 8, MAX_COLUMNS / 2, MAX_COLUMNS),
    ],
)
def test_of_narrow_filters_more_inputs_are_looked_at(inputs: int, neurons: int, least: float, most: float) -> None:
    network = network_of(nn.Sequential(nn.Conv2d(inputs, neurons, 3, padding=1), nn.Flatten()), inputs, 8, 8)
    seen = columns(network.layers[0], torch.zeros(600, inputs, 8, 8), (neurons, inputs, 3, 3))
    assert seen is not None
    assert least <= seen.shape[1] <= most


def test_of_a_linear_layer_likewise() -> None:
    network = network_of(nn.Sequential(nn.Linear(16, 8), nn.Flatten()), 1, 50, 16)
    seen = columns(network.layers[0], torch.zeros(1000, 1, 50, 16), (8, 16))
    assert seen is not None
    assert MOST_COLUMNS / 2 <= seen.shape[1] <= MOST_COLUMNS
