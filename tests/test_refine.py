"""Corrections fitted to answers: what they bring, and when they are not taken."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import robustdice as rd
from nets import Branches, Residual, coarsened, random_images, random_plan, shared_network
from robustdice.failure import refine
from robustdice.failure.calibrate import calibrate
from robustdice.failure.copies import Copies, state_of
from robustdice.failure.passes import run_under
from robustdice.failure.refine import Refiner
from robustdice.importance.divergence import kullback_leibler
from robustdice.model.network import Network
from robustdice.partitioning.allocation import Kept, Spread, shards_of
from robustdice.plan import FailureSet, Plan
from robustdice.workshop import round_activations


def calibrated(network: Network, images: np.ndarray, devices: int = 3) -> Plan:
    """A random plan with copies in several representations, and with corrections."""
    plan = replace(coarsened(network, random_plan(network, devices)), corrections={})
    return replace(plan, corrections=calibrate(network, plan, images))


def distance(network: Network, plan: Plan, failed: FailureSet, images: np.ndarray) -> float:
    """How far from the intact network's answers the plan's are."""
    seen = torch.from_numpy(images)
    with torch.no_grad():
        exact = network.run(seen)
    (scores,) = run_under(network, seen, [state_of(plan, failed)], Copies.of(network, plan))
    return float(kullback_leibler(exact, scores))


def test_on_images_that_were_not_fitted_to_answers_come_closer_to_the_intact_networks() -> None:
    network = rd.load_model("robustdice.demo.network:digits_cnn")
    train = rd.load_data("digits", network.preprocessing, network.outputs, split="train").sample(120).images()
    test = rd.load_data("digits", network.preprocessing, network.outputs).sample(100).images()
    held = [Kept(Spread(1), "float32")] * 4 + [Kept(Spread(4), "float32")]
    shards = tuple(
        shards_of(layer, [0.0] * layer.neurons, kept, 4, 0)
        for layer, kept in zip(network.plan_layers, held, strict=True)
    )
    plan = Plan(4, network.plan_layers, shards, network.shared_weights, "test", network.reference)
    plan = replace(plan, corrections=calibrate(network, plan, train))
    failed = frozenset({0, 1, 2})
    found = Refiner.of(network, Copies.of(network, plan), train).refined(state_of(plan, failed), passes=10)
    refined = replace(plan, corrections={**plan.corrections, failed: found})
    assert distance(network, refined, failed, test) < 0.8 * distance(network, plan, failed, test)


def test_a_fit_that_answers_other_images_no_better_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = shared_network(Residual, 3, 8, 8), random_images(24, (3, 8, 8))
    plan = calibrated(network, images)
    monkeypatch.setattr(refine, "RATE", 30.0)
    state = state_of(plan, frozenset({1}))
    assert Refiner.of(network, Copies.of(network, plan), images).refined(state, passes=2) is state.corrections


def test_equal_seeds_give_equal_corrections() -> None:
    network, images = shared_network(Branches, 2, 6, 6), random_images(150, (2, 6, 6))
    plan = calibrated(network, images)
    first, again, other = (
        [
            each.codes.tobytes()
            for of_set in calibrate(network, plan, images, max_failed=1, passes=1, seed=seed).values()
            for each in of_set
            if each is not None
        ]
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_with_inputs_and_values_on_the_wire_in_eight_bits_all_corrections_are_still_fitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("robustdice.failure.activations.MIN_WEIGHTS", 1)  # small layers too
    network, images = shared_network(Residual, 3, 8, 8), random_images(48, (3, 8, 8))
    plan = rd.partition(network, devices=3, method="lop", precision="int8", wire="uint8")
    plan = round_activations(network, plan, images)
    plan = replace(plan, corrections=calibrate(network, plan, images))
    state = state_of(plan, frozenset({0}))
    assert state.corrections is not None
    found = Refiner.of(network, Copies.of(network, plan), images)._descend(state, torch.arange(48), 2, 0)
    for before, after in zip(state.corrections, found, strict=True):
        assert (before is None) == (after is None)
        assert before is None or after is None or (before.codes != after.codes).any()


def test_class_scores_that_are_lost_leave_the_others_fitted() -> None:
    network, images = shared_network(Branches, 2, 6, 6), random_images(40, (2, 6, 6))
    plan = rd.partition(network, devices=2, method="lop")
    plan = replace(plan, corrections=calibrate(network, plan, images, passes=2))
    assert set(plan.corrections) == {frozenset({0}), frozenset({1})}
    assert distance(network, plan, frozenset({0}), images) < 40  # finite, where half of the classes are lost
