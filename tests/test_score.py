"""The three scores against literal oracles: loops over neurons, the original module, hooks, NumPy."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from nets import Branches, Floats, Plain, Residual, network_of, random_images, seeded, without
from robustdice.errors import DataError, ModelError, OutputError, PlanError
from robustdice.importance import exact, gradients
from robustdice.importance import score as scoring
from robustdice.importance.divergence import jensen_shannon
from robustdice.importance.score import choose_s3, score
from robustdice.model.data import load_data
from robustdice.model.load import load_model
from robustdice.model.network import Network
from robustdice.workshop import partition

FILTERS = (("conv1",), ("conv2",), ("expand", "depthwise"), ("grouped",), ("head",))
SHAPE = (3, 8, 8)
UNITS = [6, 6, 8, 4, 5]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return seeded(Residual)


@pytest.fixture(scope="module")
def network(module: nn.Module) -> Network:
    return network_of(module, *SHAPE)


def unit(index: int, layer: int) -> slice:
    """The neurons of a unit: three in the grouped convolution."""
    group = 3 if layer == 3 else 1
    return slice(index * group, (index + 1) * group)


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials: NDArray[np.float64] = np.exp(scores - scores.max(1, keepdims=True))
    exponentials /= exponentials.sum(1, keepdims=True)
    return exponentials


def divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Mean Jensen-Shannon divergence over the rows: H((p + q) / 2) - (H(p) + H(q)) / 2."""

    def entropy(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        terms = [[-x * np.log(x) if x > 0 else 0.0 for x in row] for row in rows.tolist()]
        sums: NDArray[np.float64] = np.array(terms).sum(1)
        return sums

    return float((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).mean())


def digit(scores: NDArray[np.float64]) -> float:
    """Half of what a layer's scores are rounded to, at most."""
    return float(scores.max()) * 2.0**-20


def removal(module: nn.Module, images: Floats, tail: str, entries: Sequence[int], fill: float) -> float:
    with torch.no_grad():
        intact = module(torch.from_numpy(images)).double().numpy()
        with without(module, {tail: entries}, fill):
            removed = module(torch.from_numpy(images)).double().numpy()
    return divergence(softmax(intact), softmax(removed))


def test_s1_is_the_norm_of_filter_and_bias(module: nn.Module, network: Network) -> None:
    found = score(network, random_images(1, SHAPE), columns=("s1",))
    assert [len(scores) for scores in found.scores] == UNITS
    for layer, names in enumerate(FILTERS):
        for index in range(UNITS[layer]):
            expected = 0.0
            for name in names:
                part = module.get_submodule(name)
                assert isinstance(part, nn.Conv2d | nn.Linear)
                expected += sum(abs(w) for w in part.weight[unit(index, layer)].flatten().tolist())
                expected += 0 if part.bias is None else sum(abs(w) for w in part.bias[unit(index, layer)].tolist())
            assert found.scores[layer][index, 0] == pytest.approx(expected, rel=1e-9, abs=digit(found.scores[layer]))


def test_s2_is_the_connection_sensitivity(module: nn.Module, network: Network) -> None:
    images = random_images(7, SHAPE)
    found = score(network, images, columns=("s2",))
    module.zero_grad()
    outputs = module(torch.from_numpy(images))
    nn.functional.cross_entropy(outputs, outputs.argmax(1)).backward()  # type: ignore[no-untyped-call]
    for layer, names in enumerate(FILTERS):
        for index in range(UNITS[layer]):
            expected = 0.0
            for name in names:
                for parameter in module.get_submodule(name).parameters():
                    assert parameter.grad is not None
                    products = (parameter * parameter.grad)[unit(index, layer)].flatten()
                    expected += sum(abs(product) for product in products.tolist())
            assert found.scores[layer][index, 0] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_s3_is_the_divergence_after_removal(module: nn.Module, network: Network) -> None:
    images = random_images(5, SHAPE)
    found = score(network, images, columns=("s3",))
    for layer, tail in enumerate(Residual.tails):
        for index in range(UNITS[layer]):
            neurons = range(100)[unit(index, layer)]
            expected = removal(module, images, tail, neurons, network.layers[layer].fill)
            close = pytest.approx(expected, rel=1e-3, abs=1e-9 + digit(found.scores[layer]))
            assert found.scores[layer][index, 0] == close
    assert np.mean(np.concatenate(found.scores) > 1e-7) > 0.8


@pytest.mark.parametrize(("make", "shape"), [(Plain, (1, 8, 8)), (Branches, (2, 6, 6))])
def test_s3_with_blocks_of_features_and_branches(make: type[Plain | Branches], shape: tuple[int, ...]) -> None:
    module, images = seeded(make), random_images(4, shape)
    network = network_of(module, *shape)
    found = score(network, images, columns=("s3",))
    for scores, layer, tail in zip(found.scores, network.layers, make.tails, strict=True):
        for neuron in range(layer.layer.neurons):
            block = range(neuron * layer.features, (neuron + 1) * layer.features)
            expected = removal(module, images, tail, block, layer.fill)
            assert scores[neuron, 0] == pytest.approx(expected, rel=1e-3, abs=1e-9 + digit(scores))


def test_s3_is_between_zero_and_the_logarithm_of_two() -> None:
    sharp = seeded(Residual)
    head = sharp.get_submodule("head")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight *= 1000  # one class has all the probability: removing its neuron is a complete change
    found = score(network_of(sharp, *SHAPE), random_images(6, SHAPE), columns=("s3",))
    highest = max(scores.max() for scores in found.scores)
    assert min(scores.min() for scores in found.scores) >= 0
    assert 0.3 < highest <= np.log(2)


def test_a_layer_that_says_nothing_has_no_divergence() -> None:
    module = seeded(Plain)
    conv = module.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    with torch.no_grad():
        conv.bias -= 100  # below zero everywhere, whatever the image
    found = score(network_of(module, 1, 8, 8), random_images(2, (1, 8, 8)), columns=("s3",))
    assert not found.scores[0].any()


def test_identical_distributions_have_no_divergence_and_disjoint_ones_the_most() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]], dtype=torch.float64)
    np.testing.assert_allclose(jensen_shannon(p, q), [0, np.log(2), np.log(2) / 2], atol=1e-15)


def test_micro_batches_change_nothing(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(5, SHAPE)
    whole = score(network, images)
    for limit in (1, 1000, 3000):
        monkeypatch.setattr(exact, "BATCH_ELEMENTS", limit)
        monkeypatch.setattr(gradients, "GRADIENT_ELEMENTS", limit)
        parts = score(network, images)
        for a, b in zip(whole.scores, parts.scores, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7)


class Token(nn.Module):
    """What a batch of removals must not confuse: sizes of the batch, and a tensor with the batch on its second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.token = nn.Parameter(torch.ones(1, 1, 3))
        self.other = nn.Linear(3, 3)
        self.tail = nn.Identity()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        swapped = x.flatten(2)[:, :, :16].reshape(-1, 4, 4)[:, :, :3].transpose(0, 1)  # [4, batch, 3]
        y = self.tail(self.conv(x)).flatten(2).transpose(1, 2)  # [batch, 16, 3]
        y = torch.cat([self.token.expand(batch, -1, -1), y], 1)
        y = y.transpose(0, 1)[:4] * swapped
        result: Tensor = self.head(self.other(y.transpose(0, 1)).mean(1))
        return result


def test_s3_where_the_batch_is_on_another_axis() -> None:
    module, images = seeded(Token), random_images(3, (1, 6, 6))
    network = network_of(module, 1, 6, 6)
    found = score(network, images, columns=("s3",))
    for neuron in range(3):
        expected = removal(module, images, "tail", [neuron], 0.0)
        assert found.scores[0][neuron, 0] == pytest.approx(expected, rel=1e-3, abs=1e-10 + digit(found.scores[0]))


def test_scores_name_layers_model_and_settings(network: Network) -> None:
    progress: list[tuple[int, int]] = []
    found = score(network, random_images(2, SHAPE), on_progress=lambda done, total: progress.append((done, total)))
    assert found.names == ("conv1", "conv2", "expand", "grouped", "head")
    assert found.columns == ("s1", "s2", "s3")
    assert found.model == network.reference
    assert found.settings == {"samples": 2, "s3": "exact", "s3_chosen_by": "auto"}
    assert progress[-1][0] == progress[-1][1] > 0
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


@pytest.mark.parametrize("how", ["exact", "fisher"])
def test_the_number_of_threads_changes_no_bit_of_the_scores(how: str) -> None:
    network = load_model("robustdice.demo.network:digits_cnn")
    dataset = load_data("digits", network.preprocessing, network.outputs, split="train").sample(24, seed=3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(score(network, dataset, s3=how))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len({scores.digest for scores in found}) == 1
    plans = [partition(network, scores, devices=4, memory=0.5) for scores in found]
    assert len({plan.digest for plan in plans}) == 1
    origin = plans[0].provenance["scores"]
    assert origin["seed"] == 3
    assert origin["data"]["name"] == "digits (train)"
    assert origin["data"]["samples"] == 24
    assert len(origin["data"]["digest"]) == 64
    assert {"python", "robustdice", "torch", "numpy"} == set(origin["versions"])


def test_scores_have_no_digits_that_the_order_of_sums_decides(network: Network) -> None:
    for scores in score(network, random_images(2, SHAPE)).scores:
        step = 2.0 ** (np.frexp(scores.max(axis=0))[1] - 20)
        assert (scores / step == np.round(scores / step)).all()


def test_scoring_that_fails_in_a_thread_says_why(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("cannot differentiate")

    monkeypatch.setattr("robustdice.importance.score.sensitivities", fail)
    with pytest.raises(ModelError, match="cannot differentiate"):
        score(network, random_images(2, SHAPE))


def test_columns_come_in_the_order_asked_for(network: Network) -> None:
    images = random_images(2, SHAPE)
    everything, two = score(network, images), score(network, images, columns=("s2", "s1"))
    for a, b in zip(everything.scores, two.scores, strict=True):
        np.testing.assert_allclose(a[:, [1, 0]], b, rtol=1e-6)


def test_scoring_leaves_the_network_as_it_was(network: Network) -> None:
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in network.module.named_parameters()}
    score(network, random_images(2, SHAPE))
    assert all(torch.equal(before[name], value) for name, value in network.module.state_dict().items())
    assert flags == {name: parameter.requires_grad for name, parameter in network.module.named_parameters()}


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 8, 7), (3, 8, 8)])
def test_images_that_do_not_fit_are_refused(network: Network, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"the model takes \[n, 3, 8, 8\]"):
        score(network, np.zeros(shape, np.float32))


def test_a_weight_that_nothing_depends_on_smoothly_has_no_sensitivity() -> None:
    class Comparing(nn.Module):
        def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.conv, self.gate, self.head = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1), nn.Linear(3, 2)
            self.use = use

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head((self.conv(x) * self.use(self.gate(x))).mean((2, 3)))
            return result

    network = network_of(seeded(lambda: Comparing(lambda gate: (gate > 0).float())), 1, 4, 4)
    found = score(network, random_images(2, (1, 4, 4)), columns=("s2",))
    assert not found.scores[1].any()
    assert found.scores[0].any()


def linearised(module: nn.Module, images: Floats, tail: str, entries: Sequence[int], likeliest: int = 99) -> float:
    """The mean divergence between p and p moved by -a . d log p_y / d a, image by image and outcome by outcome; the
    outcomes are the likeliest classes, and all others together."""
    before, after = [], []
    for image in torch.from_numpy(images):
        kept: list[Tensor] = []
        handle = module.get_submodule(tail).register_forward_hook(lambda _m, _i, output, to=kept: to.append(output))
        log_p = module(image[None]).double().log_softmax(1)[0]
        handle.remove()
        ranked = sorted(range(len(log_p)), key=lambda y: -log_p[y].item())
        outcomes = [log_p[y] for y in ranked[:likeliest]]
        if rest := ranked[likeliest:]:
            outcomes.append(log_p[rest].exp().sum().log())
        moved = []
        for outcome in outcomes:
            (gradient,) = torch.autograd.grad(outcome, kept[0], retain_graph=True)
            moved.append(outcome.item() - (kept[0] * gradient)[0, list(entries)].sum().item())
        before.append([outcome.exp().item() for outcome in outcomes])
        after.append(moved)
    return divergence(np.array(before), softmax(np.array(after)))


@pytest.mark.parametrize("likeliest", [99, 2])
@pytest.mark.parametrize(("make", "shape"), [(Residual, SHAPE), (Plain, (1, 8, 8)), (Branches, (2, 6, 6))])
def test_fisher_is_the_divergence_of_the_linearised_answer(
    make: type[nn.Module], shape: tuple[int, ...], likeliest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if likeliest == 2:
        monkeypatch.setattr(gradients, "EVERY_CLASS_UP_TO", 2)
        monkeypatch.setattr(gradients, "LIKELIEST", 2)
    module, images = seeded(make), random_images(3, shape)
    network = network_of(module, *shape)
    found = score(network, images, columns=("s3",), s3="fisher")
    for layer, scores, tail in zip(network.layers, found.scores, module.tails, strict=True):  # type: ignore[arg-type]
        for index, value in enumerate(scores[:, 0]):
            width = layer.features * layer.layer.group
            entries = range(index * width, (index + 1) * width)
            if np.isinf(layer.fill):  # the loss of a class score has a closed form, which needs no approximation
                expected = removal(module, images, tail, entries, layer.fill)
            else:
                expected = linearised(module, images, tail, entries, likeliest)
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-9 + digit(scores))


@pytest.mark.parametrize("how", ["fisher", "exact"])
def test_a_network_of_one_layer_has_scores(how: str) -> None:
    network = network_of(seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5))), 3, 2, 2)
    found = score(network, random_images(2, (3, 2, 2)), s3=how)
    assert [scores.shape for scores in found.scores] == [(5, 3)]
    assert bool(found.scores[0].all())


def test_small_removals_have_the_fisher_informations_divergence() -> None:
    module, images = seeded(Residual), random_images(3, SHAPE)
    head = module.get_submodule("head")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight *= 1e-3
    scores = score(network_of(module, *SHAPE), images, columns=("s3",), s3="fisher").scores
    kept: list[Tensor] = []
    module.get_submodule("grouped_act").register_forward_hook(lambda _m, _i, output: kept.append(output))
    log_p = module(torch.from_numpy(images)).double().log_softmax(1)
    quadratic = torch.zeros(len(images), 4, dtype=torch.float64)
    for y in range(log_p.shape[1]):
        (gradient,) = torch.autograd.grad(log_p[:, y].sum(), kept[0], retain_graph=True)
        slopes = (kept[0] * gradient).reshape(len(images), 4, -1).sum(2)
        quadratic += log_p[:, y, None].exp() * slopes.double() ** 2 / 8
    np.testing.assert_allclose(scores[3][:, 0], quadratic.mean(0).detach(), rtol=5e-3)


def test_fisher_ranks_neurons_as_the_exact_divergence_does() -> None:
    network = load_model("robustdice.demo.network:digits_cnn")
    images = load_data("digits", network.preprocessing, network.outputs, split="train").sample(32).images()
    exactly, fast = (score(network, images, columns=("s3",), s3=how).scores for how in ("exact", "fisher"))
    assert spearmanr(np.concatenate(exactly), np.concatenate(fast)).statistic > 0.9


def test_auto_is_exact_where_that_is_cheap(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_s3(network, 64) == "exact"
    assert choose_s3(network, 10**9) == "fisher"
    monkeypatch.setattr("robustdice.importance.score.AUTO_EXACT_MACS", 0)
    found = score(network, random_images(2, SHAPE), columns=("s3",))
    assert (found.settings["s3"], found.settings["s3_chosen_by"]) == ("fisher", "auto")
    with pytest.raises(PlanError, match="auto, exact, fisher, not 'guess'"):
        score(network, random_images(2, SHAPE), s3="guess")


@pytest.mark.parametrize("how", ["exact", "fisher"])
def test_interrupted_scoring_goes_on_where_it_was(
    how: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, kept = random_images(3, SHAPE), tmp_path / "scores.partial"
    whole = score(network, images, s3=how)
    ran: list[str] = []
    monkeypatch.setattr("robustdice.importance.score._run", counting := _counting(ran))
    monkeypatch.setattr("robustdice.importance.score.TASK_MACS", 1)
    monkeypatch.setattr("robustdice.importance.score.PREFIX_SHARE", 1)

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(network, images, s3=how, checkpoint=kept, on_progress=interrupt)
    before = [json.loads(line)["key"] for line in kept.read_text().splitlines()[1:]]
    ran.clear()
    resumed = score(network, images, s3=how, checkpoint=kept)
    assert len(before) > 1
    assert ran
    assert not set(before) & set(ran)
    assert counting is not None
    for a, b in zip(whole.scores, resumed.scores, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9 + digit(a))
    with pytest.raises(OutputError, match="results of other work"):
        score(network, random_images(4, SHAPE), s3=how, checkpoint=kept)


def _counting(ran: list[str]) -> Callable[[Any, str], Any]:
    run = scoring._run

    def counted(work: Any, task: str) -> Any:
        ran.append(task)
        return run(work, task)

    return counted
