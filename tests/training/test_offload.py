"""An engine whose weights, gradients and optimizer leave between steps trains as one that stays, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launching import launch_ranks


@pytest.fixture(scope="module", params=[1, 2])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("offload")
    result = launch_ranks("tests.training.offload_worker", folder, nproc=request.param, timeout_s=200).check()
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(300)
def test_moved_engines_train_as_ones_that_stay(told: list[dict[str, Any]]) -> None:
    for case in told[:-1]:
        assert all(case["same"]), case["case"]
        assert all(a == b and a > 0 for a, b in case["norms"]), case["case"]


def test_every_byte_is_a_parts(told: list[dict[str, Any]]) -> None:
    """By the number of parameters: weights, float32 gradients, two moments, a master where weights are bfloat16."""
    for case in told[:-1]:
        (_, _, dtype, distributed), numbers = case["case"], case["parameters"]
        width = 4 if dtype == "float32" else 2
        shares = case["world"] if distributed else 1
        states = (8 if dtype == "float32" else 12) * numbers / shares
        assert case["bytes"] == case["bytes_after"]
        size = {name.split(".")[1]: value for name, value in case["bytes"].items()}
        # buffers are padded, and a critic's head is float32
        assert size["weights"] == pytest.approx(width * numbers, rel=0.02), case["case"]
        assert size["gradients"] == pytest.approx(4 * numbers, rel=0.02), case["case"]
        assert size["optimizer"] == pytest.approx(states, rel=0.02 if shares == 1 else 0.35), case["case"]


def test_uses_of_what_is_away_are_refused_by_name(told: list[dict[str, Any]]) -> None:
    asleep = "which is asleep, its contents are in host memory; it is woken by wake() of the part"
    assert told[-1]["faults"] == {
        "step without its optimizer": f"a step of the actor needs actor.optimizer, {asleep}",
        "step without its gradients": "a step of the actor needs actor.gradients, which is released, nothing of it was "
        "kept; it is woken by wake() of the part",
        "step without its weights": f"a step of the actor needs actor.weights, {asleep}",
        "stream from before a move": "a weight stream of the actor holds addresses of actor.weights from before it was "
        "moved; it must begin anew",
        "forward": f"a forward of the actor needs actor.weights, {asleep}",
        "stream": f"a weight stream of the actor needs actor.weights, {asleep}",
        "stream begun before": f"a weight stream of the actor needs actor.weights, {asleep}",
        "save": f"a checkpoint of the actor needs actor.weights, {asleep}",
        "load": f"loading the actor needs actor.weights, {asleep}",
        "save without the optimizer": f"a checkpoint of the actor needs actor.optimizer, {asleep}",
        "save while moving": "a checkpoint of the actor needs actor.weights, which is being moved; it is woken by "
        "wake() of the part",
    }
    assert told[-1]["left"] == []
