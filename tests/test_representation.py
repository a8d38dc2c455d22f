"""Coarse weights: packed bytes and back, and what they are worth."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from robustdice.plan import Layer
from robustdice.representation import (
    BITS,
    REPRESENTATIONS,
    CoarseFilter,
    CoarseLayer,
    Correction,
    code_offset,
    code_range,
    filter_bytes,
    neuron_bytes,
    pack,
    unpack,
)

FIXED = [kind for kind in REPRESENTATIONS if kind.startswith("int")]


@given(st.sampled_from(FIXED), st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_codes_survive_packing_and_take_no_more_than_their_bits(
    kind: str, neurons: int, weights: int, seed: int
) -> None:
    low, high = code_range(kind)
    codes = np.random.default_rng(seed).integers(low, high + 1, (neurons, weights)).astype(np.int8)
    packed = pack(codes, kind)
    assert packed.shape == (neurons, -(-weights * BITS[kind] // 8))
    assert np.array_equal(unpack(packed, kind, weights), codes)


@pytest.mark.parametrize("kind", FIXED)
def test_levels_are_symmetric(kind: str) -> None:
    low, high = code_range(kind)
    assert low + code_offset(kind) == -(high + code_offset(kind))
    assert high - low + 1 in {2 ** BITS[kind], 2 ** BITS[kind] - 1}


@given(st.sampled_from(FIXED), st.integers(1, 20), st.integers(1, 25), st.integers(0, 10**6))
def test_a_weight_is_its_level_times_its_groups_scale(kind: str, weights: int, group: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    low, high = code_range(kind)
    codes = random.integers(low, high + 1, (2, weights)).astype(np.int8)
    scales = random.uniform(0.01, 1, (2, -(-weights // group))).astype(np.float16)
    values = CoarseFilter(kind, codes, scales, group).values()
    for neuron in range(2):
        for k in range(weights):
            expected = (float(codes[neuron, k]) + code_offset(kind)) * float(scales[neuron, k // group])
            assert values[neuron, k] == pytest.approx(expected, rel=1e-6)


def test_bytes_count_codes_and_scales() -> None:
    assert filter_bytes(10, "float32") == 40
    assert filter_bytes(10, "float16") == 20
    assert filter_bytes(10, "int3") == 4 + 2
    assert filter_bytes(10, "int2", group=4) == 3 + 3 * 2


@pytest.mark.parametrize(
    ("codes", "scales", "group"),
    [
        (np.full((2, 3), 4), np.ones((2, 1)), 3),  # of int3
        (np.zeros((2, 3)), np.ones((2, 2)), 3),
        (np.zeros((2, 3)), np.full((2, 1), np.inf), 3),
        (np.zeros((2, 3)), np.ones((2, 1)), 0),
        (np.zeros(3), np.ones((3, 1)), 1),
    ],
)
def test_arrays_that_are_no_coarse_filter_are_refused(codes: NDArray[Any], scales: NDArray[Any], group: int) -> None:
    with pytest.raises(ValueError, match=r"codes|scales|filter"):
        CoarseFilter("int3", codes, scales, group)


@pytest.mark.parametrize(
    "shift", [np.array([np.nan, 0]), np.array([7e4, 0]), np.array([-(2**31), 0], np.int32), np.zeros(3)]
)
def test_shifts_that_are_no_finite_float16_numbers_are_refused(shift: NDArray[Any]) -> None:
    own = CoarseFilter("int3", np.zeros((2, 3)), np.ones((2, 1), np.float16), 3)
    assert CoarseLayer(own, np.array([65504.0, -1.0])).shift.tolist() == [65504, -1]
    with pytest.raises(ValueError, match="all finite in float16"):
        CoarseLayer(own, shift)


def test_a_neuron_takes_its_codes_a_scale_a_shift_and_what_else_it_has() -> None:
    layer = Layer("conv", 4, 1, 74, 720, 10, filter_weights=72, affine_weights=2)
    assert neuron_bytes(layer, "float32") == 4 * 74
    assert neuron_bytes(layer, "int8") == 72 + 2 + 2
    assert neuron_bytes(layer, "int3") == 27 + 2 + 2
    assert neuron_bytes(layer, "ec1") == 9 + 1 + 2 + 2
    assert neuron_bytes(replace(layer, neuron_weights=72, affine_weights=0), "int3") == 27 + 2


SCALES = st.floats(1 / 8, 8, width=32)


@given(st.lists(st.tuples(SCALES, st.floats(-6e4, 6e4, width=32)), min_size=1, max_size=20))
def test_corrections_are_kept_in_a_byte_each_and_are_the_same_when_given_again(
    wanted: list[tuple[float, float]],
) -> None:
    scale, shift = np.array(wanted, np.float32).T
    kept = Correction.of(scale, shift)
    assert kept.codes.dtype == np.int8
    assert kept.codes.shape == (2, len(wanted))
    largest = np.abs(np.log(scale)).max()
    least = 127 * 2.0**-25 + 1e-6  # steps are float16: the smallest is 2^-24
    assert np.abs(np.log(kept.scale) - np.log(scale)).max() <= 0.51 * largest / 127 + least
    assert np.abs(kept.shift - shift).max() <= 0.51 * np.abs(shift).max() / 127 + least
    again = Correction(kept.codes, kept.steps)  # as they are read from a file
    assert np.array_equal(again.codes, kept.codes)
    assert np.array_equal(again.steps, kept.steps)
    assert np.array_equal(again.scale, kept.scale)


@pytest.mark.parametrize("largest", [1e-5, 2e-4, 8e-4])
def test_next_to_no_correction_is_the_same_when_it_is_read_again(largest: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        kept = Correction.of(np.exp(random.uniform(-largest, largest, 32)), random.uniform(-largest, largest, 32))
        again = Correction(kept.codes, kept.steps)
        assert np.array_equal(again.codes, kept.codes)
        assert np.array_equal(again.steps, kept.steps)


@pytest.mark.parametrize("steps", [(500.0, 1.0), (np.nan, 1.0), (1.0, np.inf)])
def test_codes_that_give_no_numbers_are_refused(steps: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Correction(np.full((2, 3), 100, np.int8), np.array(steps, np.float16))


@pytest.mark.parametrize(("scale", "shift"), [([0.0], [0.0]), ([-1.0], [0.0]), ([1.0], [np.inf]), ([1.0, 1.0], [0.0])])
def test_what_is_no_correction_is_refused(scale: list[float], shift: list[float]) -> None:
    with pytest.raises(ValueError, match=r"finite, and scales positive|a scale and a shift for each neuron"):
        Correction.of(np.array(scale, np.float32), np.array(shift, np.float32))
