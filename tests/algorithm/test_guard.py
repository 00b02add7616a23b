from __future__ import annotations

import json

import pytest

from tempo_megatron.algorithm.guard import CollapseGuard, Watched
from tempo_megatron.config.algorithm import GuardConfig

HEALTHY: dict[str, float] = {"accuracy": 0.6, "readable": 0.9, "truncated": 0.05, "overclaim": 0.0, "entropy": 0.5}


def guard(**settings) -> CollapseGuard:
    return CollapseGuard(GuardConfig(**{"start_steps": 2, "smoothing": 0.5, "min_entropy": 0.1, **settings}))


def started(**settings) -> CollapseGuard:
    found = guard(**settings)
    for _ in range(2):
        found.observe(Watched(**HEALTHY))
    return found


def test_nothing_is_judged_before_the_start_is_known():
    watched = guard()
    watched.observe(Watched(**{**HEALTHY, "overclaim": 0.9}))
    assert watched.violations() == []
    watched.observe(Watched(**{**HEALTHY, "overclaim": 0.9}))
    assert [v.watch for v in watched.violations()] == ["overclaim"]


@pytest.mark.parametrize(
    ("watch", "value", "bound"),
    [
        ("accuracy", 0.2, 0.8 * 0.6),
        ("readable", 0.2, 0.8 * 0.9),
        ("truncated", 0.9, 0.05 + 0.2),
        ("overclaim", 0.6, 0.2),
        ("entropy", 0.0, 0.05),
        ("entropy", 9.0, 1.5),
    ],
)
def test_each_watch_has_its_bound(watch, value, bound):
    watched = started()
    assert watched.violations() == []
    for _ in range(6):
        watched.observe(Watched(**{**HEALTHY, watch: value}))
    (found,) = watched.violations()
    assert (found.watch, found.bound) == (watch, pytest.approx(bound))
    side = "below" if value < bound else "above"
    assert f"{watch} " in str(found) and side in str(found)
    for _ in range(12):
        watched.observe(Watched(**HEALTHY))
    assert watched.violations() == []  # recovered


def test_moving_average_and_reported_bounds():
    watched = started()
    watched.observe(Watched(accuracy=0.4))
    metrics = watched.metrics()
    assert metrics["guard/accuracy"] == pytest.approx(0.5)
    assert metrics["guard/accuracy_floor"] == pytest.approx(0.48)
    assert metrics["guard/entropy_ceiling"] == pytest.approx(1.5)
    assert "guard/overclaim_floor" not in metrics


def test_unwatched_and_unmeasured():
    watched = started(min_accuracy=None)
    for _ in range(9):
        watched.observe(Watched(accuracy=0.0))
    assert watched.violations() == []
    assert watched.metrics()["guard/readable"] == pytest.approx(0.9)


def test_state_is_json_and_goes_on_exactly():
    watched = started()
    watched.observe(Watched(accuracy=0.1))
    other = guard()
    other.load_state_dict(json.loads(json.dumps(watched.state_dict())))
    for g in (watched, other):
        g.observe(Watched(accuracy=0.2))
    assert watched.metrics() == other.metrics() and watched.violations() == other.violations()


def test_going_back_keeps_what_the_run_is_compared_with():
    watched = guard()
    before_any = json.loads(json.dumps(watched.state_dict()))
    for _ in range(2):
        watched.observe(Watched(**HEALTHY))
    for _ in range(9):
        watched.observe(Watched(accuracy=0.0))
    assert watched.violations()
    watched.go_back(before_any)
    assert watched.violations() == []
    assert watched.metrics()["guard/accuracy_floor"] == pytest.approx(0.48)
    watched.observe(Watched(accuracy=0.3))
    assert watched.metrics()["guard/accuracy"] == pytest.approx(0.45)  # from the start, not from nothing
