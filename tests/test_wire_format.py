"""Values on the wire: each form against a literal transcription of what docs/formats.md says of it."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from robustdice.wire_format import WIRES, WireForm, sent_bytes, suited

Floats = NDArray[np.float32]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TAME = st.floats(-100, 100, width=32)


@st.composite
def layers(draw: st.DrawFn, elements: st.SearchStrategy[float]) -> tuple[tuple[int, ...], int, int, Floats]:
    """The shape, axis and features of some neurons, and values of a batch."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis, features = draw(st.integers(1, len(shape))), draw(st.integers(1, 3))
    shape[axis - 1] *= features
    batch = draw(st.integers(1, 3))
    return tuple(shape), axis, features, draw(arrays(np.float32, (batch, *shape), elements=elements))


def literally(values: Floats, axis: int, features: int) -> tuple[bytes, Floats]:
    """One image [*shape] in uint8: what is sent, and what it is worth. Number by number."""
    neurons = values.shape[axis - 1] // features
    offsets, scales = [], []
    codes, worth = np.empty(values.shape, np.uint8), np.empty(values.shape, np.float32)
    for neuron in range(neurons):
        places = [p for p in np.ndindex(values.shape) if p[axis - 1] // features == neuron]
        least, most = min(values[p] for p in places), max(values[p] for p in places)
        spread = max(np.float32(most - least), np.float32(2.0**-100))
        offsets.append(least + np.float32(0))  # no negative zero
        scales.append(np.float32(spread / np.float32(255)))
        for p in places:
            step = np.float32(np.float32(values[p] - least) * np.float32(np.float32(255) / spread))
            codes[p] = math.floor(np.float32(step + np.float32(0.5)))
            worth[p] = np.float32(np.float32(codes[p]) * scales[-1]) + least
    sent = struct.pack(f"<{2 * neurons}f", *offsets, *scales) + bytes(int(codes[p]) for p in np.ndindex(values.shape))
    return sent, worth


@settings(max_examples=60)
@given(layers(TAME))
def test_eight_bits_are_what_the_description_says_number_by_number(
    drawn: tuple[tuple[int, ...], int, int, Floats],
) -> None:
    shape, axis, features, values = drawn
    form = WireForm("uint8", shape, axis, features)
    sent = form.narrow(values)
    assert sent.shape == (len(values), *form.sent_shape)
    worth = form.widen(sent)
    for image, of_image, numbers in zip(values, sent, worth, strict=True):
        expected, expected_worth = literally(image, axis, features)
        assert bytes(of_image) == expected
        np.testing.assert_array_equal(numbers, expected_worth)


@settings(max_examples=60)
@given(layers(FINITE))
def test_eight_bits_are_off_by_half_a_step_at_most_or_not_a_number(
    drawn: tuple[tuple[int, ...], int, int, Floats],
) -> None:
    shape, axis, features, values = drawn
    form = WireForm("uint8", shape, axis, features)
    worth = form.widen(form.narrow(values)).astype(np.float64)
    grid = (len(values), *form._grid)
    exact, found = values.astype(np.float64).reshape(grid), worth.reshape(grid)
    least, most = exact.min((1, 3), keepdims=True), exact.max((1, 3), keepdims=True)
    largest = float(np.finfo(np.float32).max)
    widest = np.maximum(most - least, np.maximum(abs(least), abs(most)))
    representable = np.broadcast_to(widest <= largest * (1 - 1e-6), grid)
    allowed = (most - least) * (0.5 / 255 + 1e-6) + np.maximum(abs(least), abs(most)) * 1e-6 + 2.0**-100
    assert (np.abs(found - exact) <= allowed)[representable].all()
    in_no_range = np.broadcast_to(most - least > largest * (1 + 1e-6), grid)
    assert np.isnan(found[in_no_range]).all()


@settings(max_examples=60)
@given(layers(st.floats(width=32)))
def test_halves_are_ieee_and_stop_at_the_largest(drawn: tuple[tuple[int, ...], int, int, Floats]) -> None:
    shape, axis, features, values = drawn
    form = WireForm("float16", shape, axis, features)
    sent = form.narrow(values)
    assert (sent.dtype, sent.shape) == (np.dtype("<f2"), values.shape)
    for value, half, worth in zip(values.flat, sent.flat, form.widen(sent).flat, strict=True):
        if math.isfinite(value):
            held = min(max(float(value), -65504.0), 65504.0)
            assert half.tobytes() == struct.pack("<e", held)
            assert float(worth) == struct.unpack("<e", half.tobytes())[0]
        else:
            np.testing.assert_array_equal([half, worth], [value, value])


@pytest.mark.parametrize("wire", WIRES)
def test_a_constant_neuron_is_exact_and_zero_stays_zero(wire: str) -> None:
    values = np.zeros((1, 3, 4), np.float32)
    values[0, 1], values[0, 2] = 0.25, [0, 0, 0.5, 1]
    form = WireForm(wire, (3, 4), 1)
    worth = form.widen(form.narrow(values))
    np.testing.assert_array_equal(worth[0, :2], values[0, :2])
    assert not worth[0, 2, :2].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wire", WIRES)
def test_what_is_no_finite_number_does_not_become_one_and_spoils_its_neuron_alone(wire: str, bad: float) -> None:
    values: Floats = np.tile(np.arange(4, dtype=np.float32), (1, 3, 1))
    values[0, 1, 2] = bad
    form = WireForm(wire, (3, 4), 1)
    worth = form.widen(form.narrow(values))
    assert not np.isfinite(worth[0, 1, 2])
    np.testing.assert_allclose(worth[0, [0, 2]], values[0, [0, 2]], atol=1e-6)


def test_every_image_of_a_batch_has_scales_of_its_own() -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 4, 4), dtype=np.float32)
    values[1] *= 100
    form = WireForm("uint8", (5, 4, 4), 1)
    together = form.widen(form.narrow(values))
    alone = [form.widen(form.narrow(image[None]))[0] for image in values]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_any_axis_can_be_that_of_the_neurons(axis: int) -> None:
    values = np.random.default_rng(0).standard_normal((2, 4, 5, 6), dtype=np.float32)
    found = WireForm("uint8", (4, 5, 6), axis)
    first: Floats = np.ascontiguousarray(np.moveaxis(values, axis, 1))
    as_first = WireForm("uint8", first.shape[1:], 1)
    np.testing.assert_array_equal(
        np.moveaxis(found.widen(found.narrow(values)), axis, 1), as_first.widen(as_first.narrow(first))
    )


@given(wire=st.sampled_from(WIRES), values=st.integers(1, 40), neurons=st.integers(1, 4))
def test_bytes_are_counted_as_sent_and_eight_bits_never_take_more_than_halves(
    wire: str, values: int, neurons: int
) -> None:
    form = WireForm(wire, (neurons, values), 1)
    sent = form.narrow(np.zeros((1, neurons, values), np.float32))
    assert sent.nbytes == form.nbytes == sent_bytes(wire, neurons, neurons * values)
    coarser = WIRES[: WIRES.index(wire) + 1]
    taken = suited(wire, neurons, neurons * values)
    assert sent_bytes(taken, neurons, neurons * values) == min(
        sent_bytes(w, neurons, neurons * values) for w in coarser
    )
