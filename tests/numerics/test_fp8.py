"""FP8 codes, scales and histories against their definitions, in numbers of Python and NumPy."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempo_megatron.numerics.fp8 import (
    E4M3,
    E5M2,
    cast,
    e8m0_bits,
    largest,
    next_scales,
    quantise_blocks,
    quantise_mx,
    quantise_tensor,
    scale_of,
)

FORMATS = [E4M3, E5M2]
#: exponent bits, mantissa bits, largest finite number: OCP 8-bit floating point specification, table 1
LAYOUTS = {E4M3: (4, 3, 448.0), E5M2: (5, 2, 57344.0)}


@cache
def _numbers(code: torch.dtype) -> np.ndarray:
    """What each of the 256 codes means, float64, from the bits."""
    exponent_bits, mantissa_bits, most = LAYOUTS[code]
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for byte in range(256):
        exponent = (byte >> mantissa_bits) & (2**exponent_bits - 1)
        mantissa = (byte & (2**mantissa_bits - 1)) / 2**mantissa_bits
        size = 2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa
        found.append(math.copysign(size if size <= most else math.nan, -1 if byte >> 7 else 1))
    return np.array(found)


def _nearest(value: float, code: torch.dtype) -> int:
    """The code of a number by search: nearest, of two the even one; saturated."""
    positive = _numbers(code)[:128]
    positive = positive[np.isfinite(positive)]
    distance = np.abs(positive - min(abs(value), positive[-1]))
    byte = min(np.flatnonzero(distance == distance.min()), key=lambda b: b & 1)
    return int(byte) | (0x80 if math.copysign(1, value) < 0 else 0)


def _bytes(codes: Tensor) -> list[int]:
    return codes.contiguous().view(torch.uint8).flatten().tolist()


def _values(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many orders of magnitude."""
    return torch.ldexp(torch.randn(rows, cols), torch.randint(-12, 6, (rows, cols))).to(dtype)


# --- codes


@pytest.mark.parametrize("code", FORMATS)
def test_every_finite_code_is_its_own_number_and_comes_back(code: torch.dtype) -> None:
    numbers = _numbers(code)
    finite = np.isfinite(numbers)
    every = torch.arange(256, dtype=torch.uint8).view(code)
    assert (every.double().numpy()[finite] == numbers[finite]).all()
    assert _bytes(cast(every[torch.from_numpy(finite)].float(), code)) == np.flatnonzero(finite).tolist()


@pytest.mark.parametrize("code", FORMATS)
def test_ties_go_to_the_even_code(code: torch.dtype) -> None:
    positive = _numbers(code)[:128]
    positive = positive[np.isfinite(positive)]
    ties = (positive[1:] + positive[:-1]) / 2  # exact in float32
    for sign in (1, -1):
        values = torch.tensor(sign * ties, dtype=torch.float32)
        assert _bytes(cast(values, code)) == [_nearest(value, code) for value in values.tolist()]
        assert all(byte & 1 == 0 for byte in _bytes(cast(values, code)))


@pytest.mark.parametrize("code", FORMATS)
def test_what_is_too_large_becomes_the_largest_number(code: torch.dtype) -> None:
    most = torch.finfo(code).max
    large = torch.tensor([most, most * 1.001, most * 1.07, most * 4, 3e38, math.inf])
    assert cast(large, code).float().tolist() == [most] * 6
    assert cast(-large, code).float().tolist() == [-most] * 6
    assert cast(torch.tensor([math.nan]), code).float().isnan().all()


@pytest.mark.parametrize("code", FORMATS)
@given(value=st.floats(width=32, allow_nan=False))
def test_any_number_goes_to_the_nearest(code: torch.dtype, value: float) -> None:
    assert _bytes(cast(torch.tensor([value], dtype=torch.float32), code)) == [_nearest(value, code)]


# --- scales


@pytest.mark.parametrize("code", FORMATS)
@given(amax=st.floats(min_value=0, width=32, exclude_min=True, allow_infinity=False))
def test_a_scale_brings_the_largest_to_the_end_of_the_format(code: torch.dtype, amax: float) -> None:
    most = LAYOUTS[code][2]
    with np.errstate(over="ignore"):
        quotient = np.float32(most) / np.float32(amax)
    wanted = np.float32(min(quotient, np.finfo(np.float32).max))
    assert scale_of(torch.tensor(amax), code).item() == wanted
    power = scale_of(torch.tensor(amax), code, power_of_two=True).item()
    assert power == 2.0 ** (math.frexp(wanted)[1] - 1)
    assert power <= float(wanted) < 2 * power


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_where_there_is_no_scale_it_is_one(amax: float, power_of_two: bool) -> None:
    assert scale_of(torch.tensor([amax, 448.0]), E4M3, power_of_two=power_of_two).tolist() == [1.0, 1.0]


@given(value=st.floats(min_value=0, width=32, exclude_min=True, allow_infinity=False))
def test_e8m0_is_the_least_power_of_two_that_is_not_below(value: float) -> None:
    (byte,) = e8m0_bits(torch.tensor([value], dtype=torch.float32)).tolist()
    wanted = min(127, max(-127, math.ceil(math.log2(value)) if value >= 2.0**-1000 else -127))
    # log2 rounds: decided in whole numbers
    wanted = next(e for e in range(max(-127, wanted - 1), 129) if 2.0**e >= value or e == 127)
    assert byte == wanted + 127


def test_e8m0_of_what_is_not_finite() -> None:
    assert e8m0_bits(torch.tensor([0.0, math.inf, math.nan])).tolist() == [0, 254, 255]
    every = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).double()
    assert (every == 2.0 ** torch.arange(-127, 128, dtype=torch.float64)).all()


# --- matrices


@pytest.mark.parametrize("code", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_with_one_scale(code: torch.dtype, dtype: torch.dtype) -> None:
    values = _values(5, 7, dtype)
    found = quantise_tensor(values, code)
    scale = np.float32(LAYOUTS[code][2]) / np.abs(values.float().numpy()).max()
    assert found.scale_inv.item() == np.float32(1) / scale
    scaled = values.float().numpy() * scale
    assert _bytes(found.codes) == [_nearest(float(x), code) for x in scaled.flatten()]
    assert (found.dequantise().numpy() == found.codes.float().numpy() * np.float32(found.scale_inv.item())).all()


def test_a_given_scale_saturates_what_has_grown() -> None:
    found = quantise_tensor(torch.tensor([[1.0, 4.0, -8.0]]), E4M3, torch.tensor(112.0))
    assert found.dequantise().tolist() == [[1.0, 4.0, -4.0]]


@pytest.mark.parametrize("code", FORMATS)
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 4), (4, 4)])
@pytest.mark.parametrize("shape", [(1, 1), (4, 128), (9, 131), (130, 260)])
def test_blocks_are_quantised_each_alone(code: torch.dtype, block: tuple[int, int], shape: tuple[int, int]) -> None:
    values = _values(*shape)
    found = quantise_blocks(values, code, block)
    assert found.codes.shape == values.shape
    for row, col in {(r // block[0], c // block[1]) for r in range(shape[0]) for c in range(shape[1])}:
        cut = (slice(row * block[0], (row + 1) * block[0]), slice(col * block[1], (col + 1) * block[1]))
        mine = values[cut]
        scale = 2.0 ** math.floor(math.log2(LAYOUTS[code][2] / mine.abs().max().item()))
        assert found.scale_inv[row, col].item() == 1 / scale
        assert torch.equal(found.codes[cut].float(), cast(mine * scale, code).float())
        assert torch.equal(found.dequantise()[cut], found.codes[cut].float() / scale)
    assert torch.equal(found.t().dequantise(), found.dequantise().t())


@pytest.mark.parametrize("code", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (5, 70)])
def test_mx_blocks_of_32_in_a_row(code: torch.dtype, shape: tuple[int, int]) -> None:
    values = _values(*shape)
    found = quantise_mx(values, code)
    assert found.scale_inv.dtype is torch.float8_e8m0fnu
    for row in range(shape[0]):
        for block in range(-(-shape[1] // 32)):
            cut = slice(32 * block, 32 * block + 32)
            mine = values[row, cut]
            limit = np.float32(mine.abs().max().item()) * np.float32(1 / LAYOUTS[code][2])
            scale = 2.0 ** math.ceil(math.log2(limit))
            assert found.scale_inv[row, block].float().item() == scale
            assert torch.equal(found.codes[row, cut].float(), cast(mine / scale, code).float())
            assert torch.equal(found.dequantise()[row, cut], found.codes[row, cut].float() * scale)


@pytest.mark.parametrize("quantise", [lambda x: quantise_blocks(x, E4M3, (1, 128)), lambda x: quantise_mx(x, E4M3)])
def test_zeros_small_numbers_and_numbers_that_are_not(quantise) -> None:  # type: ignore[no-untyped-def]
    zeros = quantise(torch.zeros(2, 128))
    assert not zeros.codes.float().any() and not zeros.dequantise().any()
    tiny = torch.full((1, 128), 2.0**-140)
    assert quantise(tiny).dequantise().isfinite().all()
    values = torch.ones(1, 128)
    values[0, 3] = math.nan
    found = quantise(values).dequantise()
    assert found[0, 3].isnan() and found.nan_to_num(1.0).eq(1).all()  # the others are as they would be
    assert largest(torch.tensor([[math.nan, -2.0]])) == 2
    assert largest(torch.zeros(0, 4)) == 0


def test_the_callers_matrix_is_left_as_it_is() -> None:
    values = _values(128, 128)
    kept = values.clone()
    for block in ((1, 128), (128, 128)):
        quantise_blocks(values, E4M3, block)
    quantise_mx(values, E4M3)
    assert torch.equal(values, kept)


# --- delayed scaling


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("most_recent", [False, True])
@pytest.mark.parametrize("margin", [0, 2])
def test_a_history_against_a_queue(length: int, most_recent: bool, margin: int) -> None:
    codes = [E4M3, E5M2]
    seen: list[list[float]] = [[], []]
    history, scales = torch.zeros(length, 2), torch.ones(2)
    for step in range(7):
        amaxes = [2.0 ** ((step * 5) % 4), 0.0 if step in (0, 4) else 3.0 + step]
        history[0] = torch.tensor(amaxes)
        before = scales.tolist()
        history, scales = next_scales(history, scales, codes, margin=margin, most_recent=most_recent)
        for i, code in enumerate(codes):
            seen[i] = (seen[i] + [amaxes[i]])[-length:]
            amax = seen[i][-1] if most_recent else max(seen[i])
            wanted = np.float32(LAYOUTS[code][2] * 2.0**-margin) / np.float32(amax) if amax else before[i]
            assert scales[i].item() == wanted
        assert not history[0].any()
        if length > 1:
            assert history[-1].tolist() == amaxes  # where Transformer Engine has the newest


def test_a_history_forgets_infinities_and_keeps_the_scale() -> None:
    history = torch.zeros(2, 1)
    history[0] = math.inf
    history, scales = next_scales(history, torch.tensor([5.0]), [E4M3], margin=0, most_recent=False)
    assert scales.item() == 5
    history[0] = 7.0
    history, scales = next_scales(history, scales, [E4M3], margin=0, most_recent=True)
    assert scales.item() == 64
