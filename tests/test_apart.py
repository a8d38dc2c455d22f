"""Like units are not lost together: how alike they are, and who holds which, against literal sums."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from nets import ChannelsLast, Residual, random_images, shared_network
from robustdice.importance.gradients import units_of
from robustdice.importance.likeness import PLACES, likeness
from robustdice.model.execute import execute
from robustdice.partitioning.allocation import Kept, Spread, deal, shards_of
from robustdice.partitioning.apart import NEIGHBOURS, apart
from robustdice.plan import Layer, failure_sets


def lost_alike(holders: Sequence[frozenset[int]], like: NDArray[np.floating], devices: int) -> float:
    """The likeness of all pairs that are lost, on average over the failure sets of each size, summed over sizes."""
    total = 0.0
    for size in range(1, devices):
        every = failure_sets(devices, size)
        for failed in every:
            lost = [unit for unit, of_unit in enumerate(holders) if of_unit <= failed]
            total += sum(like[pair] for pair in itertools.combinations(lost, 2)) / len(every)
    return total


def random_likeness(units: int, seed: int) -> NDArray[np.floating]:
    values = np.random.default_rng(seed).standard_normal((units, 3))
    return np.atleast_2d(np.corrcoef(values)) ** 2


@given(st.integers(2, 4), st.data(), st.integers(1, 24), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_units_of_like_importance_change_places_until_no_exchange_keeps_more_apart(
    devices: int, data: st.DataObject, units: int, seed: int
) -> None:
    spread = Spread(data.draw(st.integers(1, devices)), data.draw(st.sampled_from([0.0, 0.5])))
    importance = np.random.default_rng(seed).permutation(units).tolist()
    like, before = random_likeness(units, seed), deal(importance, spread, devices)
    after = apart(before, importance, like, devices)
    order = [u for u in np.argsort(-np.array(importance)).tolist() if len(before[u]) < devices]
    assert all(after[unit] == before[unit] for unit in set(range(units)) - set(order))
    sets, least = len({before[unit] for unit in order}), lost_alike(after, like, devices)
    assert least <= lost_alike(before, like, devices) + 1e-9
    assert sets <= NEIGHBOURS
    for start in range(0, len(order), sets or 1):
        block = order[start : start + sets]
        assert sorted(map(sorted, (after[u] for u in block))) == sorted(map(sorted, (before[u] for u in block)))
        for one, other in itertools.combinations(block, 2):
            exchanged = list(after)
            exchanged[one], exchanged[other] = exchanged[other], exchanged[one]
            assert lost_alike(exchanged, like, devices) >= least - 1e-6


def test_likeness_that_is_not_quite_symmetric_as_float32_products_are_not_comes_to_an_end() -> None:
    units = 60
    like = 0.5 + 1e-6 * np.random.default_rng(2).standard_normal((units, units))
    before = deal([*range(units)], Spread(2), 4)
    after = apart(before, [*range(units)], like, 4)
    assert Counter(after) == Counter(before)


def test_twins_have_different_holders() -> None:
    """Neurons k and k + 6 say the same, and come six ranks after each other: dealt by importance alone, both go to the
    same two of four devices, for there are six such sets."""
    layer = Layer("layer", neurons=12, group=1, neuron_weights=9, neuron_macs=9, neuron_outputs=1)
    twins = np.kron(np.ones((2, 2)), np.eye(6))

    def together(like: NDArray[np.floating] | None) -> int:
        shards = shards_of(layer, [*range(12, 0, -1)], Kept(Spread(2), "float32"), 4, 0, likeness=like)
        of = {neuron: set(shard.devices) for shard in shards for neuron in shard.neurons}
        return sum(of[first] == of[first + 6] for first in range(6))

    assert together(None) == 6
    assert together(twins) == 0


@pytest.mark.parametrize("make", [Residual, ChannelsLast])
def test_likeness_is_the_squared_correlation_of_what_units_hand_over(make: type[nn.Module]) -> None:
    network = shared_network(make, 3, 8, 8)
    images = random_images(12, network.input_shape)
    values = {**network.constants(torch.device("cpu")), network.input: torch.from_numpy(images)}
    with torch.no_grad():
        execute(network.module, network.nodes, values)
    for layer, found in zip(network.layers, likeness(network, images), strict=True):
        assert found is not None
        units = layer.layer.neurons // layer.layer.group
        of_units = np.moveaxis(values[layer.value].double().numpy(), layer.axis, 1).reshape(12, units, -1)
        every = -(-of_units.shape[2] // PLACES)
        rows = of_units[:, :, ::every].transpose(1, 0, 2).reshape(units, -1)
        moving = rows.std(1) > 1e-6
        expected = np.zeros((units, units))
        expected[np.ix_(moving, moving)] = np.corrcoef(rows[moving]) ** 2
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert moving.any()


def test_layers_of_too_many_units_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network = shared_network(Residual, 3, 8, 8)
    monkeypatch.setattr("robustdice.importance.likeness.MOST_UNITS", 6)
    found = likeness(network, random_images(4, network.input_shape))
    assert [each is None for each in found] == [units_of(layer) > 6 for layer in network.layers]
    assert {each is None for each in found} == {True, False}
