"""Ranges as rectangles, rectangles as a whole: against elements that are counted one by one."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.checkpoint.rectangles import Cover, Rectangle, View, fingerprint, rectangles

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def elements(part: Rectangle) -> list[tuple[int, ...]]:
    axes = (range(at, at + size) for at, size in zip(part.offset, part.shape, strict=True))
    return list(product(*axes))


def everything(shape: tuple[int, ...]) -> Rectangle:
    return Rectangle((0,) * len(shape), shape)


def cuts(data: st.DataObject, numel: int) -> list[tuple[int, int]]:
    at = sorted(data.draw(st.lists(st.integers(0, numel), max_size=4)))
    return list(zip([0, *at], [*at, numel], strict=True))


@given(SHAPES, st.data())
def test_a_range_is_a_few_rectangles(shape: tuple[int, ...], data: st.DataObject) -> None:
    every = elements(everything(shape))
    start = data.draw(st.integers(0, len(every)))
    stop = data.draw(st.integers(start, len(every)))
    found = rectangles(shape, start, stop)
    assert [element for part in found for element in elements(part)] == every[start:stop]
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert sum(part.numel for part in found) == stop - start


def test_as_few_as_there_are() -> None:
    assert rectangles((4, 6), 0, 24) == [Rectangle((0, 0), (4, 6))]
    assert rectangles((4, 6), 6, 18) == [Rectangle((1, 0), (2, 6))]
    assert rectangles((4, 6), 8, 11) == [Rectangle((1, 2), (1, 3))]
    assert rectangles((4, 6), 5, 20) == [
        Rectangle((0, 5), (1, 1)),
        Rectangle((1, 0), (2, 6)),
        Rectangle((3, 0), (1, 2)),
    ]
    assert rectangles((), 0, 1) == [Rectangle((), ())]
    assert rectangles((3,), 2, 2) == []


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), st.data())
def test_views_of_a_tensor_are_cut_as_it_is(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Slices of it, with their axes in any order: each element of the range is found where the view has it."""
    whole = torch.arange(prod(shape)).reshape(shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    at = data.draw(st.integers(0, shape[axis] - 1))
    part = whole.narrow(axis, at, data.draw(st.integers(1, shape[axis] - at)))
    part = part.permute(data.draw(st.sampled_from(list(permutations(range(len(shape)))))))
    view = View(part.storage_offset(), tuple(part.shape), part.stride())
    for start, stop in cuts(data, whole.numel()):
        own = whole.flatten()[start:stop].clone()
        found = {}
        for (offset, sizes), place in view.within(start, stop):
            values = own.as_strided(sizes, view.strides, place - start)
            found |= dict(zip(elements(Rectangle(offset, sizes)), values.flatten().tolist(), strict=True))
        wanted = {i: int(part[i]) for i in elements(everything(tuple(part.shape))) if start <= int(part[i]) < stop}
        assert found == wanted


def test_a_view_without_an_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a view of shape \(2, 3\) with strides \(1, 1\) has no order"):
        View(0, (2, 3), (1, 1)).within(0, 4)
    with pytest.raises(ValueError, match="has no order"):
        View(0, (3,), (0,)).within(0, 1)
    assert View(0, (0, 3), (3, 1)).within(0, 0) == []


@given(SHAPES, st.data())
def test_ranges_of_all_ranks_are_the_whole(shape: tuple[int, ...], data: st.DataObject) -> None:
    found = Cover(shape, 0, 0)
    for start, stop in cuts(data, prod(shape)):
        found = found.plus(Cover.of(shape, rectangles(shape, start, stop)))
    assert found.fault is None


@given(SHAPES.filter(lambda shape: prod(shape) > 1), st.data())
def test_what_is_not_the_whole_is_told(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Rectangles at random: they are the whole exactly when each element is there once."""
    parts = []
    for start, stop in cuts(data, prod(shape)):
        parts += rectangles(shape, start, stop)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(parts) - 1))
        match data.draw(st.sampled_from(["left out", "twice", "elsewhere"])):
            case "left out":
                parts[place] = Rectangle(parts[place].offset, (0,) * len(shape))
            case "twice":
                parts.append(parts[place])
            case "elsewhere":
                moved = tuple(at + data.draw(st.integers(0, 2)) for at in parts[place].offset)
                parts[place] = Rectangle(moved, parts[place].shape)
    counted = Counter(element for part in parts for element in elements(part))
    is_whole = counted == Counter(elements(everything(shape)))
    assert (Cover.of(shape, parts).fault is None) == is_whole
    assert (fingerprint(parts) == fingerprint([everything(shape)])) == is_whole


def test_faults_are_told_with_their_numbers() -> None:
    whole = Cover.of((2, 3), [Rectangle((0, 0), (2, 3))])
    assert whole.fault is None
    assert Cover((2, 3), 0, 0).fault == "parts have 0 elements of 6"
    assert whole.plus(whole).fault == "parts have 12 elements of 6"
    rows = [Rectangle((1, 0), (1, 3))] * 2
    told = "parts have 6 elements of 6, but some twice or beyond it and others not at all"
    assert Cover.of((2, 3), rows).fault == told
    assert whole.plus(Cover.of((3, 2), [])).fault == "parts are of tensors of different shapes"
