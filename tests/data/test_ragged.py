"""Rows in one flat tensor against lists of lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.data.ragged import Ragged

ROWS = st.lists(st.lists(st.integers(-9, 9), max_size=5), max_size=8)


@given(ROWS, st.data())
def test_picked_rows_are_those_of_lists(rows: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.of_rows(rows, torch.int32)
    assert (len(ragged), ragged.tolist(), ragged.values.dtype) == (len(rows), rows, torch.int32)
    assert ragged.lengths.tolist() == list(map(len, rows)) and ragged.nbytes == 4 * sum(map(len, rows))
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9) if rows else st.just([]))
    first = data.draw(st.integers(0, len(rows)))
    for chosen in (index, list(range(first, len(rows)))):
        assert ragged.rows(torch.tensor(chosen, dtype=torch.int64)).tolist() == [rows[i] for i in chosen]
    assert [ragged[i].tolist() for i in range(len(rows))] == rows
    assert Ragged.concat([ragged, ragged]).tolist() == rows + rows
    assert ragged.without_last().tolist() == [row[:-1] for row in rows]


@given(ROWS, st.data())
def test_tables_and_facts(rows: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.of_rows(rows, torch.float32)
    width = max(map(len, rows), default=0)
    padded = [row + [0] * (width - len(row)) for row in rows]
    assert ragged.padded().tolist() == padded
    assert ragged.padded(range(len(rows)), width + 2).tolist() == [[*row, 0, 0] for row in padded]
    facts = torch.arange(len(rows))
    assert ragged.like(ragged.spread(facts)).tolist() == [[i] * len(row) for i, row in enumerate(rows)]
    held = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    kept = ragged.only(torch.tensor(held, dtype=torch.bool))
    assert kept.tolist() == [row if h else [] for row, h in zip(rows, held, strict=True)]
    mask = torch.tensor(held, dtype=torch.bool)
    assert ragged.rows(mask.nonzero().flatten()).among(mask).tolist() == kept.tolist()
    target = Ragged.of_lengths(torch.zeros(len(ragged.values)), ragged.lengths)
    order = list(range(len(rows)))[::-1]
    target.put(order, ragged.padded(order, width))
    assert torch.equal(target.values, ragged.values)


@given(st.lists(st.text(max_size=5), max_size=5))
def test_texts_are_bytes(texts: list[str]) -> None:
    ragged = Ragged.of_texts(texts)
    assert (ragged.texts(), ragged.values.dtype) == (texts, torch.uint8)
    assert Ragged.empty(2, torch.uint8).texts() == ["", ""]


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="offsets end at 3, but there are 2 values"):
        Ragged.of_lengths(torch.zeros(2), torch.tensor([1, 2]))
    with pytest.raises(IndexError, match="row 1 of 1"):
        Ragged.of_rows([[1]], torch.int32)[1]
