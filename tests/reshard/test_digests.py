from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempo_megatron.reshard.digests import Weights, added_up, digest, equal
from tempo_megatron.reshard.regions import Region

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def _values(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _whole(values: Tensor) -> Tensor:
    return digest(values, Region(0, 0, *values.shape), Weights(CPU)).to(torch.int64)


def _by_definition(values: Tensor) -> int:
    bits = values.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.element_size()]).tolist()
    weights = Weights(CPU)
    a, b = weights.cols(0, len(bits[0])).tolist(), weights.rows(0, len(bits)).tolist()
    return sum(x * a[j] * b[i] for i, row in enumerate(bits) for j, x in enumerate(row)) % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (6, 9), (300, 513)])
def test_it_is_the_sum_that_it_is_defined_as(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = _values(*shape, dtype)
    assert int(_whole(values)) % 2**32 == _by_definition(values)


@given(st.sampled_from(DTYPES), st.integers(1, 12), st.integers(1, 12), st.data())
def test_parts_add_up_however_it_is_cut(dtype: torch.dtype, rows: int, cols: int, data: st.DataObject) -> None:
    values, weights = _values(rows, cols, dtype), Weights(CPU)
    row, col = data.draw(st.integers(0, rows)), data.draw(st.integers(0, cols))
    parts = [
        Region(r, c, height, width)
        for r, height in ((0, row), (row, rows - row))
        for c, width in ((0, col), (col, cols - col))
        if height and width
    ]
    (total,) = added_up([(0, digest(part.of(values), part, weights)) for part in parts], 1, CPU)
    assert equal(total, _whole(values).to(torch.int64))


@given(st.sampled_from(DTYPES), st.integers(1, 20), st.integers(1, 20), st.data())
def test_one_changed_bit_is_seen(dtype: torch.dtype, rows: int, cols: int, data: st.DataObject) -> None:
    values = _values(rows, cols, dtype)
    changed = values.clone()
    bits = changed.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[changed.element_size()])
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    bits[row, col] ^= 1 << data.draw(st.integers(0, 8 * changed.element_size() - 2))
    assert not equal(_whole(values), _whole(changed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_in_each_others_place_are_seen(dtype: torch.dtype) -> None:
    values = _values(16, 16, dtype)
    swaps = [values.t().contiguous(), values.flip(0), values.roll(1, 1), values.view(-1).roll(1).view(16, 16)]
    rows = values.clone()
    rows[[2, 3]] = values[[3, 2]]
    for other in (*swaps, rows):
        assert not equal(_whole(values), _whole(other))


def test_a_slice_of_a_wider_matrix_is_read_as_it_lies() -> None:
    wide = _values(8, 64, torch.float32)
    region = Region(2, 16, 4, 32)
    weights = Weights(CPU)
    assert digest(region.of(wide), region, weights) == digest(region.of(wide).contiguous(), region, weights)
