"""Layers of pipeline stages: every layer once, as even as can be, and as the layout says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.config.stages import chunk_sizes, stage_sizes


def pipeline(stages: int, chunks: int = 1, first: int | None = None, last: int | None = None) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


@pytest.mark.parametrize(
    ("layers", "layout", "sizes"),
    [
        (12, pipeline(1), [12]),
        (12, pipeline(4), [3, 3, 3, 3]),
        (3, pipeline(2), [2, 1]),
        (5, pipeline(4), [1, 2, 1, 1]),
        (94, pipeline(4), [23, 24, 24, 23]),  # Qwen3-235B
        (94, pipeline(8), [11, 12, 12, 12, 12, 12, 12, 11]),
        (94, pipeline(8, last=10), [12, 12, 12, 12, 12, 12, 12, 10]),
        (94, pipeline(4, first=22, last=22), [22, 25, 25, 22]),
        (94, pipeline(4, first=21), [21, 25, 24, 24]),
    ],
)
def test_stages(layers: int, layout: ParallelConfig, sizes: list[int]) -> None:
    assert stage_sizes(layers, layout) == sizes


@pytest.mark.parametrize(
    ("layers", "layout", "sizes"),
    [
        (8, pipeline(2, 2), [2, 2, 2, 2]),
        (7, pipeline(2, 2), [2, 2, 2, 1]),  # stages of 4 and 3
        (6, pipeline(2, 2, last=2), [2, 1, 2, 1]),
        (12, pipeline(2, 3), [2, 2, 2, 2, 2, 2]),
    ],
)
def test_chunks_in_the_order_of_the_model(layers: int, layout: ParallelConfig, sizes: list[int]) -> None:
    assert chunk_sizes(layers, layout) == sizes


@given(layers=st.integers(1, 100), stages=st.integers(1, 16), chunks=st.integers(1, 4))
def test_as_even_as_can_be(layers: int, stages: int, chunks: int) -> None:
    layout = pipeline(stages, chunks if stages > 1 else 1)
    by_stage, by_chunk = stage_sizes(layers, layout), chunk_sizes(layers, layout)
    assert sum(by_stage) == sum(by_chunk) == layers
    for sizes in (by_stage, by_chunk):
        assert max(sizes) - min(sizes) <= 1
    assert by_stage[0] <= max(by_stage[1:-1], default=layers)  # the embedding weighs on it
    assert by_stage[-1] <= by_stage[0]  # and the output layer more on the last


@given(data=st.data(), layers=st.integers(4, 100), stages=st.integers(2, 16))
def test_what_is_said_holds(data: st.DataObject, layers: int, stages: int) -> None:
    first, last = (data.draw(st.none() | st.integers(1, layers)) for _ in range(2))
    sizes = stage_sizes(layers, pipeline(stages, first=first, last=last))
    assert first in (None, sizes[0])
    assert last in (None, sizes[-1])
    said = [size for size in (first, last) if size is not None]
    if len(said) < stages:
        assert sum(sizes) == layers
        others = sizes[first is not None : len(sizes) - (last is not None)]
        assert max(others) - min(others) <= 1


@pytest.mark.parametrize("key", ["num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"])
def test_one_stage_is_all_layers(key: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}: 3 needs pipeline_model_parallel_size > 1"):
        ParallelConfig(**{key: 3})
