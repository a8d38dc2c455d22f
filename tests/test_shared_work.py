"""What plans that are compared have in common is worked out once, and what cannot matter any more is not: nothing else
comes out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import robustdice as rd
from nets import Plain, Residual, coarsened, random_images, random_plan, shared_network
from robustdice.auto import best_first, candidates, tabulate
from robustdice.cost.model import Judge
from robustdice.failure import matching
from robustdice.failure.agreement import agreement, answers
from robustdice.failure.copies import Copies, state_of
from robustdice.failure.matching import fit, targets_of
from robustdice.learning import learned
from robustdice.plan import failure_sets
from robustdice.report.considered import considered_json, considered_table
from robustdice.representation import CoarseLayer
from robustdice.rivals import rivals
from robustdice.rounding import scales
from robustdice.rounding.layer import Choice, Seen, Target, target
from robustdice.rounding.network import IntactInputs, round_network, round_together
from robustdice.workshop import choose_from


def content(coarse: dict[tuple[int, str], CoarseLayer]) -> dict[tuple[int, str], tuple[bytes, bytes, bytes]]:
    return {
        of: (layer.filter.codes.tobytes(), layer.filter.scales.tobytes(), layer.shift.tobytes())
        for of, layer in coarse.items()
    }


def test_layers_that_are_wanted_alike_behind_layers_alike_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, looked = shared_network(Residual, 3, 8, 8), list[torch.Tensor]()
    layers = len(network.layers)
    assert layers == 5
    int8, int3, int2 = map(Choice, ("int8", "int3", "int2"))
    wanted = [
        {0: [int8], 1: [int3], 2: [int3], 3: [int8], 4: [int8]},
        {0: [int8], 1: [int3], 2: [int2, int3], 3: [int8], 4: [int2]},  # another one from layer 2 on
        {1: [int2], 2: [int3], 3: [int3, int8], 4: [int8]},  # another one from the beginning
        {0: [int8], 1: [int3], 2: [int3]},
        {},
    ]
    images = random_images(32, network.input_shape)
    alone = [round_network(network, each, images) for each in wanted]

    def looked_at(filters: torch.Tensor, seen: Seen | None) -> Target:
        looked.append(filters)
        return target(filters, seen)

    monkeypatch.setattr("robustdice.rounding.network.target", looked_at)
    together = round_together(network, wanted, images)
    # Layer 0 for all; 1 and 2 for the third and for all others; 3 and 4 for the first, the second and the third.
    assert len(looked) == 1 + 2 + 2 + 3 + 3
    assert [*map(content, together)] == [*map(content, alone)]
    known = IntactInputs(network, range(layers), images)
    for each, found in zip(wanted, alone, strict=True):
        assert content(round_together(network, [each], images, known)[0]) == content(found)


@pytest.mark.parametrize(("kind", "group"), [("int8", 300), ("int3", 70), ("int2", 300)])
def test_scales_do_not_depend_on_how_many_weights_are_looked_at_together(
    kind: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    importance = weights[0].square()
    found = []
    for at_once in (1, 1000, 10**9):
        monkeypatch.setattr(scales, "AT_ONCE", at_once)
        found.append(scales.best_scales(weights, kind, group, importance))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_corrections_towards_what_is_known_are_the_same_and_without_losses_nothing_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, images = shared_network(Residual, 3, 8, 8), random_images(24, (3, 8, 8))
    plan = replace(coarsened(network, random_plan(network, 3)), corrections={})
    copies, base = Copies.of(network, plan), state_of(plan, frozenset())
    states = [state_of(plan, failed) for failed in failure_sets(3, 1)]
    targets = targets_of(network, Copies(network, {}), images)
    plain = {number: found for number, found, _ in fit(network, copies, base, states, images)}
    known = {number: found for number, found, _ in fit(network, copies, base, states, images, lambda: targets)}
    assert plain.keys() == known.keys() == {0, 1, 2}
    for number, of_layers in plain.items():
        for a, b in zip(of_layers, known[number], strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                np.testing.assert_array_equal(a.codes, b.codes)
                np.testing.assert_array_equal(a.steps, b.steps)
    monkeypatch.setattr(matching, "execute", None)
    assert not list(fit(network, copies, base, [], images))


def test_a_plan_that_cannot_become_the_best_any_more_is_looked_at_no_longer() -> None:
    network, images = shared_network(Plain, 1, 8, 8), random_images(200, (1, 8, 8))
    right, plan = answers(network, images), rd.partition(network, devices=2, method="lop")
    shares, seen = agreement(network, plan, images, right, 1)
    assert seen == 200
    assert shares[0] == 1
    merit = float(np.mean(shares))
    assert merit < 0.9
    assert agreement(network, plan, images, right, 1, to_beat=merit) == (shares, 200)  # it may still be as good
    few, seen = agreement(network, plan, images, right, 1, to_beat=0.99)
    assert seen < 200
    assert (np.mean(few) * seen + 200 - seen) / 200 < 0.99


def test_what_is_chosen_is_what_would_be_chosen_if_all_were_measured_to_the_end() -> None:
    network, images = shared_network(Plain, 1, 8, 8), random_images(128, (1, 8, 8))
    table = tabulate(network, images, devices=4)
    total = 4 * network.parameters
    fewer = 0
    for share in (0.15, 0.3):
        thorough = best_first([*candidates(table, int(share * total)), *rivals(table, [int(share * total)] * 4)])
        thorough = best_first([*thorough, *learned(table, thorough, [int(share * total)] * 4)])
        found = choose_from(table, share)
        assert found[0].plan.digest == thorough[0].plan.digest
        assert (found[0].agreement, found[0].images) == (thorough[0].agreement, thorough[0].images)
        assert {c.family: c.plan.digest for c in found} == {c.family: c.plan.digest for c in thorough}
        rows = {row[0] for row in considered_table(found, Judge()).rows}
        for each, said in zip(found, considered_json(found, Judge()), strict=True):
            assert said["images"] == each.images
            if each.fits and each.images < found[0].images:
                fewer += 1
                assert each.merit < found[0].merit
                assert f"{each.family} (seen to be worse on {each.images})" in rows
    assert fewer
