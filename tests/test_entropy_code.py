"""Entropy coding: what a reader of DEFLATE makes of it, and what anybody would by the table of codes."""

import hashlib
from contextlib import suppress
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from robustdice import entropy_code
from robustdice.bundle.parts import Affine, Coarse, Filter, Part
from robustdice.entropy_code import CODED, END, PADS, Code, excess, lengths, meanings, over, pack, symbols, unpack
from robustdice.errors import BundleError
from robustdice.representation import CoarseFilter, filter_bytes
from robustdice.rounding.coded import fitting, scales_and_levels
from robustdice.runtime.weights import Weights


def levels_of(kind: str, neurons: int, weights: int, seed: int, wide: float) -> NDArray[np.int8]:
    """Levels that fill their room; with ``wide``, more of them are large."""
    random = np.random.default_rng(seed)
    exact = wide * random.standard_t(4, (neurons, weights))
    largest = CODED[kind].largest
    nearest = torch.from_numpy(np.rint(exact).clip(-largest, largest))
    return fitting(nearest, torch.from_numpy(exact), kind).numpy().astype(np.int8)


def decoded(packed: NDArray[np.uint8], kind: str) -> list[int]:
    """The symbols of one packed filter, bit by bit, by codes that are told by their lengths as RFC 1951 does."""
    table, code = {}, 0
    of_symbols = [*lengths(kind).tolist(), END]
    for length in range(1, END + 1):
        for symbol, its in enumerate(of_symbols):
            if its == length:
                table[f"{code:0{length}b}"] = symbol
                code += 1
        code *= 2
    bits = "".join(f"{byte:08b}"[::-1] for byte in packed.tolist())
    found, begun = [], ""
    for bit in bits:
        begun += bit
        if begun in table:
            found.append(table[begun])
            begun = ""
    assert not begun
    return found


@settings(deadline=None)
@given(st.sampled_from(sorted(CODED)), st.integers(1, 4), st.integers(1, 70), st.integers(0, 10**6), st.floats(0.05, 8))
def test_levels_survive_packing_in_as_many_bytes_for_every_filter(
    kind: str, neurons: int, weights: int, seed: int, wide: float
) -> None:
    levels = levels_of(kind, neurons, weights, seed, wide)
    packed = pack(levels, kind)
    assert packed.shape == (neurons, int(-(-weights * CODED[kind].bits // 8)) + 1)
    assert np.array_equal(unpack(packed, kind, weights), levels)
    some = np.random.default_rng(seed).permutation(neurons)
    assert np.array_equal(unpack(packed[some], kind, weights), levels[some])
    for row, expected in zip(packed, levels, strict=True):
        *found, last = decoded(row, kind)
        of_row = np.concatenate([meanings(kind)[symbol] for symbol in found])
        assert np.array_equal(of_row[:weights], expected)
        assert not of_row[weights:].any()
        assert last - CODED[kind].symbols in range(len(PADS))


@given(st.sampled_from(sorted(CODED)), st.integers(1, 40), st.integers(0, 10**6), st.floats(0.05, 8))
def test_what_does_not_fill_its_room_is_refused(kind: str, weights: int, seed: int, wide: float) -> None:
    largest = CODED[kind].largest
    random = np.random.default_rng(seed)
    levels = np.rint(wide * random.standard_t(4, (1, weights))).clip(-largest, largest).astype(np.int8)
    (off,), (room,) = excess(levels, kind), -over(levels, kind)
    assert (off > 0) == (room < 0)
    zeros = int((symbols(levels, kind) == CODED[kind].zero).sum())
    assert (off < 0) == (room - 7 > zeros * (END - int(lengths(kind)[CODED[kind].zero])))
    assume(off)
    for refuse in (pack, lambda of, kind: CoarseFilter(kind, of, np.ones((1, 1), np.float16), weights)):
        with pytest.raises(ValueError, match=r"do not fill"):
            refuse(levels, kind)


@given(st.sampled_from(sorted(CODED)), st.integers(1, 40), st.integers(0, 10**6))
def test_bytes_that_are_no_filters_are_refused(kind: str, weights: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    levels = levels_of(kind, 3, weights, seed, 1)
    packed = pack(levels, kind)
    assert unpack(packed[:0], kind, weights).shape == (0, weights)
    for count in (1, 3):  # any bytes: they are levels by chance, or refused
        with suppress(ValueError):
            found = unpack(random.integers(0, 256, (count, packed.shape[1])).astype(np.uint8), kind, weights)
            assert np.abs(found).max() <= CODED[kind].largest


def test_what_is_not_ended_or_goes_on_is_refused() -> None:
    packed = pack(levels_of("ec2", 4, 64, 0, 1), "ec2")
    with pytest.raises(ValueError, match="17 belong"):
        unpack(packed[:, :10], "ec2", 64)
    with pytest.raises(ValueError, match="17 belong"):
        unpack(np.tile(packed, 2), "ec2", 64)
    with pytest.raises(ValueError, match="symbols in ec2 where"):
        unpack(np.zeros_like(packed), "ec2", 64)
    odd = pack(np.concatenate([levels_of("ec2", 1, 62, 0, 1), levels_of("ec2", 1, 62, 1, 1)]), "ec2")
    assert odd.shape[1] == 17
    with pytest.raises(ValueError, match=r"end where they should|symbols in ec2 where"):
        unpack(odd, "ec2", 64)


@pytest.mark.parametrize("kind", CODED)
def test_codes_are_complete_and_the_commonest_level_has_the_shortest(kind: str) -> None:
    code, each = CODED[kind], lengths(kind)
    assert sum(2.0 ** -int(length) for length in each if length) + 2.0**-END == 1
    assert each[: code.symbols].min() == each[code.zero]
    assert tuple(each[code.symbols :][: len(PADS)]) == PADS
    assert tuple(meanings(kind)[code.zero]) == (0,) * code.together
    assert len(np.unique(meanings(kind)[: code.symbols], axis=0)) == code.symbols


def test_codes_are_what_they_were_when_the_first_bundles_were_built() -> None:
    content = b"".join(files("robustdice").joinpath("codes", f"{kind}.bin").read_bytes() for kind in CODED)
    assert hashlib.sha256(content).hexdigest() == "3e390e416ebdfcf34acb4b038105e01a94ac88ff6208f404b87038bd1031c15e"
    assert CODED["ec1.5"] == Code(1.5, 2, 7)


def test_bytes_count_codes_one_more_and_the_scale() -> None:
    assert filter_bytes(13, "ec3") == 5 + 1 + 2
    assert filter_bytes(16, "ec0.7") == 2 + 1 + 2


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(CODED)), st.integers(1, 60), st.integers(0, 10**6), st.sampled_from([0, 1, 3]))
def test_every_filter_can_be_coded(kind: str, weights: int, seed: int, few: int) -> None:
    """Those of all zeros, of a few large weights among zeros, and of equal weights among them."""
    random = np.random.default_rng(seed)
    filters = torch.from_numpy(random.standard_normal((4, weights))).to(torch.float32)
    filters[0], filters[1] = 0, 0.3
    filters[2, few:] = 0
    scales, levels = scales_and_levels(filters, kind)
    assert not excess(levels.numpy().astype(np.int8), kind).any()
    assert float(levels.abs().max()) <= CODED[kind].largest
    found = levels * scales
    assert float(found[0].abs().max()) < 1e-6
    nearest_zero = (filters[1] ** 2).sum()
    if weights >= 24:  # equal weights are not all lost
        assert float(((found[1] - filters[1]) ** 2).sum()) < 0.9 * float(nearest_zero)
    if weights >= 3:  # among zeros large weights stay what they are by half, and zeros zero but for a few
        assert float((found[2] - filters[2]).abs().max()) <= max(0.55 * float(filters[2].abs().max()), 1e-6)


@pytest.mark.parametrize(
    ("kind", "most"), [("ec4", 1.7), ("ec3", 1.75), ("ec2", 1.8), ("ec1.5", 1.95), ("ec1", 2.0), ("ec0.7", 1.9)]
)
def test_the_error_is_that_of_the_rate(kind: str, most: float) -> None:
    """Of normally distributed weights no code leaves less than 2 ** (-2 * bits) of their squares, and the best one for
    equal steps 1.42 times as much; a code of whole bits for each filter, with nearest levels, a little more."""
    filters = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    scales, levels = scales_and_levels(filters, kind)
    lost = float((levels * scales - filters).square().mean() / filters.square().mean())
    assert 1 < lost * 2.0 ** (2 * CODED[kind].bits) < most


def part_of(kind: str, neurons: int, weights: int, at_once: int) -> Part:
    """A part that takes nothing but one layer's filters from a bundle's weights."""
    own = Filter("filters", kind, (weights,), weights, 0)
    coarse = Coarse((own,), None, 1.0, rounded=False, shift=None, at_once=at_once, axis=1)
    return Part("part.onnx", ("x",), ("y",), affine=(Affine("scale", "shift", neurons, (), coarse),))


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("weights", [64, 67])
def test_devices_unpack_the_levels_of_any_neurons(kind: str, weights: int) -> None:
    levels = levels_of(kind, 9, weights, 0, 1)
    content = pack(levels, kind).tobytes() + np.ones(9, np.float16).tobytes()
    kept, part = Weights(content), part_of(kind, 9, weights, 4)
    for start in (4, 0, 8):
        assert np.array_equal(kept.filters(part, start)["filters"], levels[start : start + 4])


def test_a_device_that_was_given_damaged_filters_says_so() -> None:
    content = bytearray(pack(levels_of("ec2", 4, 64, 0, 1), "ec2").tobytes() + np.ones(4, np.float16).tobytes())
    content[: 2 * 17] = bytes(2 * 17)
    with pytest.raises(BundleError, match=r"the weights of filters are damaged: .* build the bundle again"):
        Weights(bytes(content)).filters(part_of("ec2", 4, 64, 4))


def test_a_filter_has_one_scale() -> None:
    levels = levels_of("ec3", 2, 12, 0, 1)
    assert CoarseFilter("ec3", levels, np.ones((2, 1), np.float16), 12).neuron_bytes == 5 + 1 + 2
    with pytest.raises(ValueError, match="have one scale"):
        CoarseFilter("ec3", levels, np.ones((2, 3), np.float16), 4)


def test_many_filters_are_packed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = levels_of("ec1", 20, 40, 0, 1)
    packed, off = pack(levels, "ec1"), over(levels, "ec1")
    monkeypatch.setattr(entropy_code, "AT_ONCE", 130)
    assert np.array_equal(pack(levels, "ec1"), packed)
    assert np.array_equal(over(levels, "ec1"), off)


@pytest.mark.parametrize("kind", CODED)
def test_wide_filters_of_any_kind_fit_and_keep_what_they_can(kind: str) -> None:
    """More symbols than are looked at in a round, and levels that are far from what the code was made for."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(3, 25088, generator=generator) - 0.5
    ternary = torch.randint(-1, 2, (3, 25088), generator=generator).to(torch.float32)
    for filters in (uniform, ternary):
        scales, levels = scales_and_levels(filters, kind)
        assert not excess(levels.numpy().astype(np.int8), kind).any()
        lost = (levels * scales - filters).square().mean() / filters.square().mean()
        assert float(lost) < min(0.95, 7 * 2.0 ** (-2 * CODED[kind].bits))
