"""Plans for a budget: what is chosen keeps to it, survives, and beats what anybody would do by hand."""

import pytest

import robustdice as rd
from nets import Plain, Residual, random_images, shared_network
from robustdice.auto import candidates, tabulate
from robustdice.errors import PlanError
from robustdice.model.network import Network
from robustdice.workshop import choose_from, choose_plan


def total_bytes(network: Network) -> int:
    return 4 * (network.shared_weights + sum(layer.neurons * layer.neuron_weights for layer in network.plan_layers))


@pytest.mark.parametrize("share", [0.3, 0.2])
def test_a_budget_is_kept_to_and_the_best_plan_comes_first(share: float) -> None:
    network = shared_network(Plain, 1, 8, 8)
    budget = int(share * total_bytes(network))
    found = candidates(tabulate(network, random_images(24, (1, 8, 8)), devices=4, survive=3), budget)
    held = [max(candidate.plan.bytes_per_device) for candidate in found]
    assert max(held) <= budget
    assert 0.8 * budget < max(held)
    assert [candidate.merit for candidate in found] == sorted((c.merit for c in found), reverse=True)
    assert all(len(candidate.agreement) == 4 for candidate in found)
    for plan in (candidate.plan for candidate in found):
        assert bool(plan.corrections) != all(plan.held_by_all(layer) for layer in range(len(plan.layers)))


def test_where_fine_copies_fit_everywhere_nothing_is_spread() -> None:
    network = shared_network(Residual, 3, 8, 8)
    images = random_images(24, (3, 8, 8))
    found = candidates(tabulate(network, images, devices=3), int(0.6 * total_bytes(network)))
    plan = found[0].plan
    assert all(plan.held_by_all(layer) for layer in range(len(plan.layers)))
    assert found[0].agreement[0] == found[0].agreement[2] > 0.9


def test_a_budget_that_nothing_fits_is_refused_with_what_is_needed() -> None:
    network = shared_network(Plain, 1, 8, 8)
    with pytest.raises(PlanError, match=r"need .* bytes per device, 40 are allowed"):
        candidates(tabulate(network, random_images(8, (1, 8, 8)), devices=4), 40)


def test_budgets_that_share_a_table_get_the_plans_that_they_get_alone() -> None:
    network = shared_network(Plain, 1, 8, 8)
    images = random_images(16, (1, 8, 8))
    table = tabulate(network, images, devices=3, survive=1)
    choose_from(table, 0.5)  # leaves nothing behind
    shared, alone = choose_from(table, 0.25), choose_plan(network, images, devices=3, memory=0.25, survive=1)
    assert [(each.family, each.plan.digest) for each in shared] == [(each.family, each.plan.digest) for each in alone]


@pytest.mark.slow
def test_trained_weights_keep_most_of_their_accuracy_at_a_twentieth_of_the_memory() -> None:
    network = rd.load_model("robustdice.demo.network:digits_cnn")
    images = rd.load_data("digits", network.preprocessing, network.outputs, split="train").sample(96).images()
    test = rd.load_data("digits", network.preprocessing, network.outputs).sample(200)
    best = candidates(tabulate(network, images, devices=4), int(0.055 * total_bytes(network)))[0]
    measured = rd.evaluate(network, best.plan, test)
    assert best.plan.memory_share <= 0.055
    assert measured.by_size[1].worst > 0.9 * measured.clean
    assert [measured.by_size[size].worst for size in range(4)] == pytest.approx(best.agreement, abs=0.12)
