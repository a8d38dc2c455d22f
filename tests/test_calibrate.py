"""Corrections for failure sets: what they bring back, and where there are none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustdice as rd
from commands import run_json
from nets import (
    Branches,
    ChannelsLast,
    Residual,
    coarsened,
    network_of,
    random_images,
    random_plan,
    seeded,
    shared_network,
)
from robustdice.errors import PlanError
from robustdice.failure.calibrate import calibrate
from robustdice.failure.copies import Copies, State, state_of
from robustdice.failure.matching import fit
from robustdice.failure.passes import run_under
from robustdice.model import network as network_module
from robustdice.model.execute import execute
from robustdice.model.network import Network, together
from robustdice.partitioning.allocation import Kept, Spread, shards_of
from robustdice.plan import Holder, Plan, Shard, failure_sets

DEMO = "robustdice.demo.network:digits_cnn"


def behind_chains(network: Network, images: Tensor) -> list[Tensor]:
    """Every layer's value behind its affine chain, neurons first: [neurons, everything else]."""
    values = {**network.constants(images.device), network.input: images}
    with torch.no_grad():
        execute(network.module, network.nodes, values)
    return [values[layer.affine_end].transpose(0, layer.affine_axis).flatten(1) for layer in network.layers]


@pytest.mark.parametrize(("make", "shape"), [(Residual, (3, 8, 8)), (Branches, (2, 6, 6)), (ChannelsLast, (3, 8, 8))])
def test_the_evaluator_computes_under_each_set_what_the_corrections_were_fitted_to(
    make: type[nn.Module], shape: tuple[int, ...]
) -> None:
    network = shared_network(make, *shape)
    plan = replace(coarsened(network, random_plan(network, 3)), corrections={})
    images = random_images(24, shape)
    states = [State(plan.copies(failed)) for size in (1, 2) for failed in failure_sets(3, size)]
    copies = Copies(network, plan.coarse)
    for number, corrections, scores in fit(network, copies, State(plan.copies(())), states, images):
        state = State(states[number].copies, corrections)
        (found,) = run_under(network, torch.from_numpy(images), [state], copies)
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)


def test_every_layers_means_and_spreads_are_again_those_of_the_intact_network() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 32)
            self.second = nn.Linear(32, 24)
            self.third = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
            return result

    network = shared_network(Chain, 6)
    everywhere = [Kept(Spread(2), "float32"), Kept(Spread(2), "float32"), Kept(Spread(4), "float32")]
    shards = tuple(
        shards_of(layer, [0.0] * layer.neurons, kept, 4, i)
        for i, (layer, kept) in enumerate(zip(network.plan_layers, everywhere, strict=True))
    )
    plan = Plan(4, network.plan_layers, shards, network.shared_weights, "test", network.reference)
    images = random_images(300, (6,))
    plan = replace(plan, corrections=calibrate(network, plan, images))
    intact = behind_chains(network, torch.from_numpy(images))[2]
    for failed in [frozenset({0, 1}), frozenset({0, 2, 3})]:
        assert plan.corrections[failed][0] is None  # its inputs are whole
        (scores,) = run_under(network, torch.from_numpy(images), [state_of(plan, failed)], Copies(network, {}))
        torch.testing.assert_close(scores.mean(0), intact.mean(1), rtol=0, atol=5e-3)
        torch.testing.assert_close(scores.std(0), intact.std(1), rtol=5e-3, atol=0)


def test_a_lost_neuron_that_never_changes_is_made_up_for_exactly() -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    first_layer = module.get_submodule("0")
    assert isinstance(first_layer, nn.Linear)
    with torch.no_grad():
        first_layer.weight[2] = 0
        first_layer.bias[2] = 3.0
    network = network_of(module, 4)
    first = (Shard((0, 1, 3, 4, 5), (Holder(0), Holder(1))), Shard((2,), (Holder(1),)))
    last = (Shard((0, 1, 2), (Holder(0), Holder(1))),)
    plan = Plan(2, network.plan_layers, (first, last), network.shared_weights, "test", network.reference)
    images = random_images(200, (4,))
    corrections = calibrate(network, plan, images)
    assert set(corrections) == {frozenset({1})}
    calibrated = replace(plan, corrections=corrections)
    exact = network.run(torch.from_numpy(images)).detach()
    zero_filled, corrected = (
        run_under(network, torch.from_numpy(images), [state_of(each, frozenset({1}))], Copies(network, {}))[0]
        for each in (plan, calibrated)
    )
    assert (zero_filled - exact).abs().max() > 0.5
    torch.testing.assert_close(corrected, exact, rtol=0, atol=float(exact.abs().max()) / 200)  # corrections are bytes


def test_sets_that_change_nothing_and_the_intact_cluster_have_no_corrections() -> None:
    network = shared_network(Residual, 3, 8, 8)
    kept = Kept(Spread(3), "float32")
    shards = tuple(
        shards_of(layer, [0.0] * (layer.neurons // layer.group), kept, 4, i)
        for i, layer in enumerate(network.plan_layers)
    )
    plan = Plan(4, network.plan_layers, shards, network.shared_weights, "test", network.reference)
    corrections = calibrate(network, plan, random_images(16, (3, 8, 8)))
    assert set(corrections) == set(failure_sets(4, 3))
    assert calibrate(network, plan, random_images(16, (3, 8, 8)), max_failed=2) == {}
    images = random_images(16, (3, 8, 8))
    assert set(calibrate(network, plan, images, lost_only=True)) == set(failure_sets(4, 3))
    assert calibrate(network, plan, images, min_failed=4, lost_only=True) == {}
    spread = rd.partition(network, devices=4, method="lop")
    assert set(calibrate(network, spread, images, min_failed=2, max_failed=2)) == set(failure_sets(4, 2))


@pytest.mark.slow
def test_calibrating_on_trained_weights_brings_answers_back() -> None:
    network = rd.load_model("robustdice.demo.network:digits_cnn")
    train = rd.load_data("digits", network.preprocessing, network.outputs, split="train").sample(128)
    test = rd.load_data("digits", network.preprocessing, network.outputs).sample(200)
    kept = [Kept(Spread(2), "float32")] * 4 + [Kept(Spread(4), "float32")]
    shards = tuple(
        shards_of(layer, [0.0] * layer.neurons, of_layer, 4, i)
        for i, (layer, of_layer) in enumerate(zip(network.plan_layers, kept, strict=True))
    )
    plan = Plan(4, network.plan_layers, shards, network.shared_weights, "test", network.reference)
    calibrated = replace(plan, corrections=calibrate(network, plan, train.images()))
    before, after = (rd.evaluate(network, each, test).by_size[3] for each in (plan, calibrated))
    assert after.mean > before.mean + 0.02


def test_a_plan_of_another_model_is_refused() -> None:
    plan = random_plan(shared_network(Residual, 3, 8, 8), 3)
    with pytest.raises(PlanError, match="was made for"):
        calibrate(network_of(seeded(Residual, 1), 3, 8, 8), plan, np.zeros((2, 3, 8, 8), np.float32))


def test_a_plan_is_calibrated_and_certified_from_the_command_line(tmp_path: Path) -> None:
    path, calibrated = tmp_path / "plan.json", tmp_path / "calibrated.json"
    run_json("plan", DEMO, "--devices", "3", "--method", "lop", "-o", path)
    found = run_json(
        "calibrate", path, "--data", "digits", "--samples", "40", "--max-failed", "1", "--passes", "1", "-o", calibrated
    )
    assert found["output"] == str(calibrated)
    bytes_with, bytes_without = (max(Plan.load(each).bytes_per_device) for each in (calibrated, path))
    assert 0 < found["correction_bytes"] == bytes_with - bytes_without
    measured = run_json("evaluate", calibrated, "--data", "digits", "--samples", "50")
    plan = Plan.load(calibrated)
    assert plan.certificate is not None
    assert plan.certificate.samples == 50
    assert plan.certificate.expected([1]) == measured["failures"]["1"]["sets"]["1"]
    low, high = plan.certificate.interval([1]) or (1.0, 0.0)
    assert low < plan.certificate.accuracy[frozenset({1})] < high
    assert plan.digest == measured["plan_digest"]  # to be certified changes nothing
    assert Plan.load(path).certificate is None


def test_of_more_images_than_fit_into_memory_at_once_some_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    network = shared_network(Branches, 2, 6, 6)
    images = random_images(20, (2, 6, 6))
    widest = max(int(np.prod(shape[1:])) for node, shape in network.shapes.items() if node.op == "call_function")
    for elements, some in ((20 * widest, images), (8 * widest, images[::3]), (1, images[:1])):
        monkeypatch.setattr(network_module, "MAX_ELEMENTS", elements)
        np.testing.assert_array_equal(together(network, images).cpu().numpy(), some)
    monkeypatch.setattr(network_module, "MAX_ELEMENTS", 20 * 3)
    assert len(together(network, images, [network.output])) == 20  # three classes an image
