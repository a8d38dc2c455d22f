"""Accuracy under every failure set, against a loop over images in the original module."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nets import Residual, network_of, random_images, random_plan, seeded, without
from robustdice.errors import PlanError
from robustdice.failure.evaluate import Evaluation, count_correct, evaluate
from robustdice.model.data import Dataset
from robustdice.model.network import Network, Survivors
from robustdice.plan import Holder, ModelReference, Plan, Shard, failure_sets

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
    passes = 0
    run = Network.run

    def counted(self: Network, images: torch.Tensor, survivors: Survivors | None = None) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return run(self, images, survivors)

    monkeypatch.setattr(Network, "run", counted)
    found = evaluate(network, plan, dataset)
    assert len(found.accuracy) == 15
    assert set(found.accuracy.values()) == {found.clean}
    assert passes <= 2 * 2  # two batches, clean and all neurons there


def test_failures_can_be_limited(network: Network, dataset: Dataset) -> None:
    plan = random_plan(network, 3)
    assert set(evaluate(network, plan, dataset, max_failed=1).accuracy) == {*map(frozenset, ([], [0], [1], [2]))}
    assert set(evaluate(network, plan, dataset, max_failed=0).accuracy) == {frozenset()}
    with pytest.raises(PlanError, match="0 to 2 can fail, not 3"):
        evaluate(network, plan, dataset, max_failed=3)


def test_progress_is_told_in_images(network: Network, dataset: Dataset) -> None:
    told: list[tuple[int, int]] = []
    evaluate(network, random_plan(network, 2), dataset, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(64, 70), (70, 70)]


def test_summaries_are_worst_mean_and_best_of_each_size() -> None:
    accuracy = {(): 0.9, (0,): 0.5, (1,): 0.7, (2,): 0.6, (0, 1): 0.1, (0, 2): 0.4, (1, 2): 0.1}
    found = Evaluation(0.95, 10, "d", "m", 0.5, {frozenset(failed): value for failed, value in accuracy.items()})
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
