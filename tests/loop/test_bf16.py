"""EM runs in bfloat16, with recomputation: stopped, taken back by the guard, and beside a rollout of another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tempo_megatron.telemetry.metrics import deterministic_view, read_metrics
from tests.loop.cases import Case, make_inputs, run_cases, small_tempo
from tests.loop.test_guard import GUARDED
from tests.loop.test_resume import assert_same_from, assert_same_weights

DTYPES = ("actor.dtype", "critic.dtype", "rollout.dtype")
#: Mean |log p(vLLM) - log p(Megatron)| of the untrained model; and of a token. Seen: 0.0042, 0.018.
MEAN, LARGEST = 8e-3, 0.04


def in_bf16(*keys: str, recompute: str = "none", **changes: Any) -> dict[str, Any]:
    """``keys`` in bfloat16, the others in float32; the gate of the first step as it is by default."""
    dtypes = {key: "bfloat16" if key in keys else "float32" for key in DTYPES}
    recomputed = {"actor.recompute": recompute, "critic.recompute": recompute}
    return {**dtypes, **recomputed, "rollout.max_log_prob_diff": "auto", "checkpoint.every": 1, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bf16")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    inputs = make_inputs(folder / "inputs")

    def settings(*keys: str, **changes: Any) -> dict[str, Any]:
        return small_tempo(inputs, **in_bf16(*keys, **changes))

    back = {**GUARDED, "algorithm.guard.action": "rollback", "algorithm.guard.max_rollbacks": 2}
    cases = [
        Case("whole", settings(*DTYPES)),
        Case("full", settings(*DTYPES, recompute="full")),
        Case("selective", settings(*DTYPES, recompute="selective")),
        Case("stopped", settings(*DTYPES, recompute="full"), stops=True),
        Case("back", settings(*DTYPES, recompute="full", **back)),
        Case("narrow", settings(*DTYPES, **{"rollout.max_log_prob_diff": 1e-5}), ends_in_error=True),
        Case("rollout alone", settings("rollout.dtype")),
        Case("trainer alone", settings("actor.dtype", "critic.dtype")),
        Case("float32", settings()),
    ]
    return run_cases(cases, 2, folder, 400)


def mismatch(folder: Path, name: str) -> list[tuple[float, float]]:
    """Mean and largest of each step."""
    records = read_metrics(folder / name / "metrics.jsonl")
    return [(r["mismatch/mean_abs"], r["mismatch/max_abs"]) for r in records if "mismatch/mean_abs" in r]


@pytest.mark.slow(60)
@pytest.mark.timeout(600)
def test_a_run_that_is_stopped_has_the_same_bits(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """At every boundary, recomputing: its float32 masters are in the checkpoints, not only what was rounded of them."""
    assert_same_from(0, folder / "full", folder / "stopped")
    assert_same_weights(results["full"]["weights"], results["stopped"]["weights"])
    left = results["stopped"]["left_at"]
    assert any(at.endswith("+mstep") for at in left) and any(at.endswith("+estep") for at in left)


@pytest.mark.slow(60)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_bit(folder: Path, results: dict[str, dict[str, Any]], recompute: str) -> None:
    """The same products of the same numbers, one thread a rank."""
    whole, again = (
        [deterministic_view(r) for r in read_metrics(folder / n / "metrics.jsonl")] for n in ("whole", recompute)
    )
    assert whole == again
    assert_same_weights(results["whole"]["weights"], results[recompute]["weights"])


@pytest.mark.slow(60)
@pytest.mark.timeout(600)
def test_the_guard_takes_back_to_the_bit(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    start = AutoModelForCausalLM.from_pretrained(folder / "inputs" / "model").state_dict()
    final = {k.removeprefix("actor."): v for k, v in results["back"]["weights"].items() if k.startswith("actor.")}
    assert final and all(torch.equal(final[k].float(), start[k].bfloat16().float()) for k in final)
    records = read_metrics(folder / "back" / "metrics.jsonl")
    assert [r["guard/rollbacks"] for r in records] == [0, 1, 1, 1]
    assert all("critic/loss" in r for r in records), "E-steps go on"


@pytest.mark.slow(60)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["whole", "rollout alone", "trainer alone"])
def test_the_mismatch_is_that_of_bfloat16(folder: Path, results: dict[str, dict[str, Any]], name: str) -> None:
    """Far above float32's, far below the gate's 0.1, whichever of the two is rounded."""
    means, largest = zip(*mismatch(folder, name), strict=True)
    assert 2e-4 < min(means) <= max(means) < MEAN and max(largest) < LARGEST
    exact, _ = zip(*mismatch(folder, "float32"), strict=True)
    assert max(exact) < 1e-5


@pytest.mark.slow(60)
@pytest.mark.timeout(600)
def test_the_gate_is_on(results: dict[str, dict[str, Any]]) -> None:
    assert "log-probabilities" in results["narrow"]["error"]
