from __future__ import annotations

import math

import numpy as np
import pytest

from tempo_megatron.demo.study.intervals import over_seeds


def test_mean_between_the_ends_and_the_same_each_time() -> None:
    values = [0.41, 0.52, 0.47, 0.55, 0.38, 0.44]
    found = over_seeds(values)
    assert found == over_seeds(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert min(values) <= found.low < found.mean < found.high <= max(values)
    assert found.seeds == 6


def test_with_few_seeds_it_is_what_they_span() -> None:
    for values in ([1.0, 3.0], [1.0, 2.0, 4.0], [1.0, 2.0, 3.0, 6.0]):
        found = over_seeds(values)
        assert (found.low, found.high) == (min(values), max(values))


def test_one_seed_has_no_interval_and_none_has_no_mean() -> None:
    one, none = over_seeds([0.5]), over_seeds([])
    assert (one.mean, one.seeds) == (0.5, 1) and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(none.mean) and none.seeds == 0
    assert not (one.is_above_zero or one.is_below_zero or none.is_above_zero)


@pytest.mark.parametrize("seeds", [5, 10])
def test_holds_the_truth_as_often_as_stated(seeds: int) -> None:
    """Over 300 studies with normal noise: 95 % of the intervals, up to 3.5 standard errors of that."""
    rng = np.random.default_rng(4)
    found = [over_seeds(rng.normal(size=seeds).tolist()) for _ in range(300)]
    assert np.mean([i.low <= 0 <= i.high for i in found]) == pytest.approx(0.95, abs=0.044)
