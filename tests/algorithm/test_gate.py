from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tempo_megatron.algorithm.gate import CalibrationGate
from tempo_megatron.config.algorithm import GateConfig
from tempo_megatron.errors import RunError


def gate(**keys: Any) -> CalibrationGate:
    defaults: dict[str, Any] = {"auroc": 0.9, "close_below": 0.7, "smoothing": 0.0, "min_steps": 0, "max_steps": 50}
    return CalibrationGate(GateConfig(**{**defaults, **keys}))


def watch(gate: CalibrationGate, aurocs: list[float]) -> list[bool]:
    states = []
    for auroc in aurocs:
        gate.observe(auroc, minority=100)
        states.append(gate.is_open)
    return states


def test_opens_at_the_threshold_and_closes_only_below_the_lower_one():
    g = gate()
    assert not g.is_open
    assert watch(g, [0.89, 0.9, 0.7, 0.69, 0.8, 0.95]) == [False, True, True, False, False, True]


def test_the_average_starts_at_the_first_observation_and_weighs_the_past():
    g = gate(smoothing=0.7, auroc=0.95)
    assert g.average is None
    assert watch(g, [0.6, 1.0, 1.0]) == [False] * 3
    assert g.average == pytest.approx(0.7 * (0.7 * 0.6 + 0.3) + 0.3)
    assert watch(g, [1.0] * 6)[-1]


def test_waits_for_min_steps_after_every_closing():
    g = gate(min_steps=3)
    assert watch(g, [1.0, 1.0, 1.0]) == [False, False, True]
    assert watch(g, [0.5, 1.0, 1.0, 1.0]) == [False, False, False, True]


def test_one_class_counts_but_leaves_the_average():
    g = gate(min_steps=3)
    assert watch(g, [0.95, math.nan]) == [False, False]
    assert g.average == 0.95
    assert watch(g, [math.nan]) == [True]
    assert watch(g, [math.nan]) == [True]


def test_gives_up_after_more_than_max_steps_naming_the_keys():
    g = gate(max_steps=2)
    watch(g, [0.5, 0.6])
    with pytest.raises(RunError) as error:
        g.observe(0.65, minority=100)
    message = str(error.value)
    assert "algorithm.gate.max_steps: 2" in message and "algorithm.gate.auroc: 0.9" in message and "0.650" in message
    assert "\n" not in message


def test_giving_up_without_any_auroc_says_so():
    g = gate(max_steps=1)
    g.observe(math.nan, minority=100)
    with pytest.raises(RunError, match=r"undefined \(no step had algorithm.gate.min_per_class"):
        g.observe(math.nan, minority=100)


def test_steps_in_a_row_start_anew_when_it_closes_again():
    g = gate(max_steps=2)
    assert watch(g, [0.5, 0.5, 1.0]) == [False, False, True]
    assert watch(g, [0.5, 0.5, 0.5]) == [False] * 3
    with pytest.raises(RunError):
        g.observe(0.5, minority=100)


def test_a_disabled_gate_is_always_open_and_still_averages():
    g = gate(enabled=False, max_steps=1)
    assert g.is_open
    assert watch(g, [0.1, 0.2, 0.3, math.nan]) == [True] * 4
    assert g.average == 0.3


@pytest.mark.parametrize("auroc", [-0.1, 1.5, math.inf])
def test_refuses_what_is_no_auroc(auroc):
    with pytest.raises(ValueError, match="AUROC"):
        gate().observe(auroc, minority=100)


def test_a_resumed_gate_goes_on_like_the_one_that_was_saved():
    aurocs = [0.6, 0.95, 0.99, 0.99, 0.3, math.nan, 0.99, 0.99, 0.99, 0.2, 0.2, 0.99]
    for cut in range(len(aurocs) + 1):
        whole, first, second = (gate(smoothing=0.5, min_steps=2) for _ in range(3))
        watch(first, aurocs[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.is_open == first.is_open
        assert watch(whole, aurocs)[cut:] == watch(second, aurocs[cut:])
        assert whole.state_dict() == second.state_dict()


def test_auroc_of_few_samples_does_not_count() -> None:
    noisy = CalibrationGate(GateConfig(min_steps=0, max_steps=5, min_per_class=16))
    noisy.observe(0.99, minority=15)
    assert noisy.average is None and not noisy.is_open
    noisy.observe(0.99, minority=16)
    assert noisy.average == pytest.approx(0.99) and noisy.is_open
    noisy.observe(0.1, minority=3)
    assert noisy.average == pytest.approx(0.99) and noisy.is_open
