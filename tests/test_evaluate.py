"""Accuracy under every failure set, against a loop over images in the original module."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from nets import (
    ChannelsLast,
    Residual,
    network_of,
    random_images,
    random_plan,
    relative_error,
    seeded,
    shared_network,
    without,
)
from robustdice.errors import DataError, OutputError, PlanError
from robustdice.failure.availability import expect
from robustdice.failure.chance import doubt_about
from robustdice.failure.copies import Copies, State
from robustdice.failure.evaluate import (
    Evaluation,
    choose_failure_sets,
    count_correct,
    evaluate,
    evaluate_plans,
)
from robustdice.failure.passes import run_under
from robustdice.model.data import Dataset
from robustdice.model.execute import attribute, execute
from robustdice.model.network import Network
from robustdice.plan import Holder, ModelReference, Plan, Shard, failure_sets
from robustdice.representation import LOST

SHAPE = (3, 8, 8)
SAMPLES = 70  # more than one batch
IMAGES = random_images(SAMPLES, SHAPE)
MODULE = seeded(Residual)
with torch.no_grad():
    # Labels that the model gets right for two of three images.
    ANSWERS = MODULE(torch.from_numpy(IMAGES)).argmax(1).numpy()
LABELS = np.where(np.arange(SAMPLES) % 3 == 0, (ANSWERS + 1) % 5, ANSWERS).astype(np.int64)


@pytest.fixture(scope="module")
def network() -> Network:
    return network_of(MODULE, *SHAPE)


@pytest.fixture
def dataset() -> Dataset:
    return Dataset("random", LABELS, lambda index: IMAGES[index])


def accuracy_without(lost: dict[str, list[int]], lost_classes: list[int]) -> float:
    """Image by image, in the original module."""
    correct = 0
    with without(MODULE, lost), torch.no_grad():
        for image, label in zip(IMAGES, LABELS, strict=True):
            scores = MODULE(torch.from_numpy(image[None]))[0].tolist()
            left = {k: s for k, s in enumerate(scores) if k not in lost_classes}
            correct += bool(left) and max(left, key=lambda k: left[k]) == label
    return correct / SAMPLES


def test_every_failure_set_has_the_accuracy_of_what_is_left(network: Network, dataset: Dataset) -> None:
    plan = random_plan(network, 3, seed=4)
    found = evaluate(network, plan, dataset)
    assert found.clean == pytest.approx(np.mean(ANSWERS == LABELS))
    assert list(found.accuracy) == [failed for size in range(3) for failed in failure_sets(3, size)]
    for failed, accuracy in found.accuracy.items():
        lost = [
            [n for shard in shards if set(shard.devices) <= failed for n in shard.neurons] for shards in plan.shards
        ]
        tails = dict(zip(Residual.tails[:-1], lost[:-1], strict=True))
        assert accuracy == accuracy_without(tails, lost[-1])
    assert found.accuracy[frozenset()] == found.clean
    assert len(set(found.accuracy.values())) > 2
    assert (found.samples, found.data, found.method) == (SAMPLES, "random", "random")
    assert found.memory_share == plan.memory_share


def test_without_any_class_score_no_answer_is_right(network: Network, dataset: Dataset) -> None:
    plan = random_plan(network, 2, seed=0, everywhere=range(4))
    plan = replace(plan, shards=(*plan.shards[:4], (Shard(tuple(range(5)), (Holder(1),)),)))
    found = evaluate(network, plan, dataset).accuracy
    assert found[frozenset({1})] == 0.0
    assert found[frozenset({0})] == found[frozenset()] > 0.5


def test_failures_that_leave_the_same_neurons_share_their_passes(
    network: Network, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(network, 4, seed=0, everywhere=range(5))
    executed = 0
    run = execute

    def counted(module: Any, nodes: list[Any], values: dict[Any, Any]) -> None:
        nonlocal executed
        executed += len(nodes)
        run(module, nodes, values)

    monkeypatch.setattr("robustdice.failure.passes.execute", counted)
    monkeypatch.setattr("robustdice.failure.copies.execute", counted)
    found = evaluate(network, plan, dataset)
    assert len(found.accuracy) == 15
    assert set(found.accuracy.values()) == {found.clean}
    assert executed == 2 * len(network.nodes)  # two batches, each once: clean and all neurons there are the same


def lost_states(survivors: Sequence[Sequence[NDArray[np.bool_]]]) -> list[State]:
    """States in which everything that is there is float32."""
    return [State(tuple(np.where(mask, 0, LOST).astype(np.int8) for mask in masks)) for masks in survivors]


def test_what_comes_before_the_first_difference_is_computed_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    convolutions: list[Any] = []
    run = execute

    def counted(module: Any, nodes: list[Any], values: dict[Any, Any]) -> None:
        convolutions.extend(node for node in nodes if node in {layer.node for layer in network.layers})
        run(module, nodes, values)

    monkeypatch.setattr("robustdice.failure.passes.execute", counted)
    monkeypatch.setattr("robustdice.failure.copies.execute", counted)
    plan = random_plan(network, 3, seed=4, everywhere=(0, 1))
    sets = [plan.surviving_neurons(failed) for size in range(3) for failed in failure_sets(3, size)]
    run_under(network, torch.from_numpy(IMAGES[:2]), lost_states(sets), Copies(network, {}))
    counts = [convolutions.count(layer.node) for layer in network.layers]
    assert counts[:3] == [1, 1, 1]
    assert counts == sorted(counts)
    assert 1 < counts[-1] <= len(sets)


class Views(nn.Module):
    """Two layers, side by side, whose tails end in another look at the same memory: [3, 8, 8] -> 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 6, 3, stride=3)
        self.mixed, self.fc = nn.Linear(3, 4), nn.Linear(4 * 9 + 6 * 4 + 4 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.left(x), self.right(x), self.mixed(x.permute(0, 2, 3, 1))
        result: torch.Tensor = self.fc(torch.cat([part.flatten(1) for part in parts], 1))
        return result


@pytest.mark.parametrize("make", [Residual, ChannelsLast, Views])
@given(seed=st.integers(0, 10**6), devices=st.integers(2, 4))
def test_shared_passes_give_what_separate_ones_give(make: type[nn.Module], seed: int, devices: int) -> None:
    network = shared_network(make, 3, 8, 8)
    random = np.random.default_rng(seed)
    layers = len(network.layers)
    everywhere = random.choice(layers, int(random.integers(0, layers)), replace=False).tolist()
    plan = random_plan(network, devices, seed, everywhere)
    sets = [plan.surviving_neurons(failed) for size in range(devices) for failed in failure_sets(devices, size)]
    images = torch.from_numpy(IMAGES[:3])
    for masks, found in zip(sets, run_under(network, images, lost_states(sets), Copies(network, {})), strict=True):
        with torch.no_grad():
            expected = network.run(images, [torch.tensor(mask) for mask in masks])
        assert relative_error(found.numpy(), expected.numpy()) < 1e-6


class Sliced(nn.Module):
    """The scores are a view of the last layer's value; a lost neuron may have had any value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(self.conv(x).mean((2, 3)))[:, 1:]
        return result


def test_scores_that_are_a_view_of_a_layers_value_stay_apart() -> None:
    network = shared_network(Sliced, *SHAPE)
    images = torch.from_numpy(IMAGES[:3])
    whole = [np.ones(layer.neurons, np.bool_) for layer in network.plan_layers]
    lost = [[*whole[:1], np.arange(6) != neuron] for neuron in (2, 3)]
    for sets in ([whole, *lost], [lost[0], whole, lost[1]], lost):
        for masks, found in zip(sets, run_under(network, images, lost_states(sets), Copies(network, {})), strict=True):
            with torch.no_grad():
                expected = network.run(images, [torch.tensor(mask) for mask in masks])
            assert torch.equal(found, expected)


def test_a_lost_neuron_is_zero_whatever_it_would_have_said() -> None:
    module = seeded(Sliced)
    conv = module.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    network = network_of(module, *SHAPE)
    with torch.no_grad():
        attribute(network.module, "conv.weight")[1] = float("inf")
    masks = [np.arange(6) != 1, np.ones(6, np.bool_)]
    (found,) = run_under(network, torch.from_numpy(IMAGES[:2]), lost_states([masks]), Copies(network, {}))
    assert bool(found.isfinite().all())


def test_several_plans_are_evaluated_as_each_alone(network: Network, dataset: Dataset) -> None:
    plans = [random_plan(network, devices, seed) for devices, seed in ((2, 1), (3, 2), (3, 3))]
    together = evaluate_plans(network, plans, dataset)
    assert together == [evaluate(network, plan, dataset) for plan in plans]


def test_many_failure_sets_are_sampled_and_say_so() -> None:
    chosen = choose_failure_sets(16, None, 256, seed=3)
    assert chosen == choose_failure_sets(16, None, 256, seed=3) != choose_failure_sets(16, None, 256, seed=4)
    assert len(chosen) == len(set(chosen)) == 256
    sizes = [sum(len(failed) == size for failed in chosen) for size in range(16)]
    assert sizes[0] == 1
    assert sizes[1] == sizes[15] == 16
    assert min(sizes[1:]) >= 16
    assert [len(failed) for failed in chosen] == sorted(len(failed) for failed in chosen)
    whole = choose_failure_sets(8, None, 256, seed=3)
    assert whole == [failed for size in range(8) for failed in failure_sets(8, size)]
    found = Evaluation(0.9, 10, "d", "m", 16, 0.5, dict.fromkeys(chosen, 0.5)).by_size
    assert not found[1].sampled
    assert found[8].sampled
    assert (found[8].sets, found[8].of) == (sizes[8], 12870)


def test_interrupted_evaluation_goes_on_where_it_was(network: Network, tmp_path: Path) -> None:
    plan, kept, reads = random_plan(network, 3), tmp_path / "evaluation", []

    def read(index: int) -> Any:
        reads.append(index)
        return IMAGES[index]

    dataset = Dataset("random", LABELS, read)

    def interrupt(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(network, plan, dataset, checkpoint=kept, on_progress=interrupt)
    reads.clear()
    resumed = evaluate(network, plan, dataset, checkpoint=kept)
    assert set(reads) == {64, 65, 66, 67, 68, 69}
    assert resumed == evaluate(network, plan, dataset)
    with pytest.raises(OutputError, match="results of other work"):
        evaluate(network, random_plan(network, 2), dataset, checkpoint=kept)


def test_a_checkpoint_survives_the_repair_of_one_image(network: Network, tmp_path: Path) -> None:
    """Image 66 of 70 is found to be bad when everything before it is done; only its batch is computed after that."""
    plan, kept, reads = random_plan(network, 3), tmp_path / "evaluation", list[int]()
    marks = [f"{index}.png" for index in range(len(LABELS))]

    def read(index: int, bad: bool) -> Any:
        if bad and index == 66:
            raise DataError("cannot read 66.png: truncated")
        reads.append(index)
        return IMAGES[index]

    with pytest.raises(DataError, match=r"66\.png"):
        evaluate(network, plan, Dataset("d", LABELS, lambda index: read(index, True), marks), checkpoint=kept)
    reads.clear()
    marks[66] = "66.png, repaired"
    repaired = Dataset("d", LABELS, lambda index: read(index, False), marks)
    found = evaluate(network, plan, repaired, checkpoint=kept)
    assert set(reads) == set(range(64, 70))
    reads.clear()
    assert evaluate(network, plan, repaired, checkpoint=kept) == found == evaluate(network, plan, repaired)
    for other in (
        Dataset("d", 1 - LABELS.clip(0, 1), repaired.read, marks),
        replace(repaired, marks=["new", *marks[1:]]),
    ):
        reads.clear()
        evaluate(network, plan, other, checkpoint=kept)
        assert set(range(64)) <= set(reads)


def test_bad_images_are_named_before_anything_is_computed(network: Network) -> None:
    def check(index: int) -> None:
        if index % 40 == 3:
            raise DataError(f"cannot read {index}.png")

    def read(_index: int) -> Any:
        raise AssertionError

    with pytest.raises(DataError, match=r"2 of 70 images cannot be used.*\n.* 3\.png\n.* 43\.png"):
        evaluate(network, random_plan(network, 2), Dataset("d", LABELS, read, check=check))


def test_accuracy_needs_labels(network: Network) -> None:
    with pytest.raises(DataError, match="d was loaded without labels; accuracy needs them"):
        evaluate(network, random_plan(network, 2), Dataset("d", np.full(3, -1), lambda index: IMAGES[index]))


@pytest.mark.parametrize(
    ("clean", "samples", "outputs", "doubtful"),
    [
        (0.1, 797, 10, True),
        (0.167, 600, 12, True),  # twelve folders in text order, and a perfect network
        (0.3, 797, 10, False),
        (0.3, 10, 10, True),  # chance could have given that
        (0.54, 1000, 2, True),
        (0.6, 1000, 2, False),
        (1.0, 4, 2, False),
        (0.001, 50000, 1000, True),
        (0.55, 50000, 1000, False),
        (0.0, 100, 5, True),
    ],
)
def test_a_network_near_chance_is_doubted(clean: float, samples: int, outputs: int, doubtful: bool) -> None:
    said = doubt_about(Evaluation(clean, samples, "d", "m", 2, 0.5, {frozenset(): clean}), outputs)
    assert (said is not None) == doubtful
    assert said is None or f"{clean:.1%} of {samples} images rightly, chance {1 / outputs:.1%}" in said


@given(
    seed=st.integers(0, 10**6),
    up=st.lists(st.floats(0, 1), min_size=1, max_size=4).filter(lambda up: len(up) in {1, 4}),
)
def test_expected_accuracy_is_the_sum_over_all_failure_sets(seed: int, up: list[float]) -> None:
    random = np.random.default_rng(seed)
    every = [failed for size in range(4) for failed in failure_sets(4, size)]
    accuracy = {failed: float(random.choice([0.0, 0.25, 0.5, 1.0])) for failed in every}
    found = expect(Evaluation(0.9, 10, "d", "m", 4, 0.5, accuracy), up)
    each = up * 4 if len(up) == 1 else up
    expected = none = 0.0
    for state in itertools.product([False, True], repeat=4):
        probability = math.prod(p if there else 1 - p for p, there in zip(each, state, strict=True))
        failed = frozenset(device for device, there in enumerate(state) if not there)
        expected += probability * accuracy.get(failed, 0.0)
        none += probability * (len(failed) == 4)
    assert found.expected_accuracy == pytest.approx(expected)
    assert found.no_answer_probability == pytest.approx(none)
    assert sum(share for _, share in found.distribution) == pytest.approx(1)
    assert list(found.distribution) == sorted(found.distribution)
    assert not found.estimated


def test_availability_of_sampled_sets_is_an_estimate() -> None:
    chosen = choose_failure_sets(16, None, 256, seed=0)
    found = expect(Evaluation(0.9, 10, "d", "m", 16, 0.5, {f: 1 - len(f) / 16 for f in chosen}), 0.75)
    assert found.estimated
    assert found.expected_accuracy == pytest.approx(0.75)  # the mean share of devices that are up
    assert found.at_least(0.5) == pytest.approx(0.75)
    assert found.at_least(1.0) <= found.at_least(0.9) <= found.at_least(0.5)


@pytest.mark.parametrize(
    ("up", "message"),
    [([0.5, 0.5], "2 availabilities for 4 devices"), (1.5, "between 0 and 1, not 1.5"), (float("nan"), "not nan")],
)
def test_wrong_availabilities_are_refused(up: float | list[float], message: str) -> None:
    accuracy = {failed: 0.5 for size in range(4) for failed in failure_sets(4, size)}
    with pytest.raises(PlanError, match=message):
        expect(Evaluation(0.9, 10, "d", "m", 4, 0.5, accuracy), up)
    with pytest.raises(PlanError, match="with 2 devices down nothing was measured"):
        expect(Evaluation(0.9, 10, "d", "m", 4, 0.5, {f: 0.5 for f in accuracy if len(f) < 2}), 0.5)


def test_failures_can_be_limited(network: Network, dataset: Dataset) -> None:
    plan = random_plan(network, 3)
    assert set(evaluate(network, plan, dataset, max_failed=1).accuracy) == {*map(frozenset, ([], [0], [1], [2]))}
    assert set(evaluate(network, plan, dataset, max_failed=0).accuracy) == {frozenset()}
    with pytest.raises(PlanError, match="0 to 2 can fail, not 3"):
        evaluate(network, plan, dataset, max_failed=3)


def test_progress_is_told_in_images(network: Network, dataset: Dataset) -> None:
    told: list[tuple[int, int]] = []
    evaluate(network, random_plan(network, 2), dataset, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 70), (64, 70), (70, 70)]


def test_summaries_are_worst_mean_and_best_of_each_size() -> None:
    accuracy = {(): 0.9, (0,): 0.5, (1,): 0.7, (2,): 0.6, (0, 1): 0.1, (0, 2): 0.4, (1, 2): 0.1}
    found = Evaluation(0.95, 10, "d", "m", 3, 0.5, {frozenset(failed): value for failed, value in accuracy.items()})
    summaries = {size: (s.worst, round(s.mean, 9), s.best) for size, s in found.by_size.items()}
    assert summaries == {0: (0.9, 0.9, 0.9), 1: (0.5, 0.6, 0.7), 2: (0.1, 0.2, 0.4)}


def test_a_plan_of_another_model_is_refused(network: Network, dataset: Dataset) -> None:
    plan = random_plan(network, 2)
    other = replace(plan, model=ModelReference("other.pt2", "0" * 64))
    with pytest.raises(PlanError, match=r"made for other\.pt2 .* not for test .* make a new plan"):
        evaluate(network, other, dataset)


def test_a_plan_of_other_layers_is_refused(network: Network, dataset: Dataset) -> None:
    plan = random_plan(network, 2)
    fewer = Plan(2, plan.layers[1:], plan.shards[1:], plan.shared_weights, "m", plan.model)
    with pytest.raises(PlanError, match="other layers than this version finds in test"):
        evaluate(network, fewer, dataset)


def test_a_lost_class_is_never_the_answer() -> None:
    low = float("-inf")
    scores = torch.tensor([[1.0, 2.0], [low, -5.0], [low, low], [3.0, low]])
    assert count_correct(scores, torch.tensor([1, 1, 0, 0])) == 3
    assert count_correct(scores, torch.tensor([0, 0, 1, 1])) == 0
