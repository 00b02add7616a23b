"""Commands as a user calls them, some with a fault in one of the engines; launched by ``test_doctor``.

``doctor_worker CASES.json RESULTS.json``: a list of ``{"name", "words", "fault"}``; name -> exit code and output.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron import cli
from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.rollout import engine as rollout_engine  # noqa: E402
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SampledResponse  # noqa: E402
from tempo_megatron.training import engine as training_engine  # noqa: E402
from tests.loop import em_runs  # noqa: E402  (whose vLLM engines the cases share)


def trainer_temperature(patch: pytest.MonkeyPatch) -> None:
    right = training_engine.vocab_parallel_log_probs

    def wrong(*args: Any, temperature: float, **more: Any) -> Any:
        return right(*args, temperature=1.25 * temperature, **more)

    patch.setattr(training_engine, "vocab_parallel_log_probs", wrong)


def rollout_temperature(patch: pytest.MonkeyPatch) -> None:
    right = RolloutEngine._sampling_params

    def wrong(self: RolloutEngine, request: GenerationRequest) -> Any:
        parameters = right(self, request)
        parameters.temperature = 0.7
        return parameters

    patch.setattr(RolloutEngine, "_sampling_params", wrong)


def prompts_without_first_token(patch: pytest.MonkeyPatch) -> None:
    right = RolloutEngine._add

    def wrong(self: RolloutEngine, index: int, request: GenerationRequest) -> None:
        right(self, index, replace(request, prompt_token_ids=request.prompt_token_ids[1:]))

    patch.setattr(RolloutEngine, "_add", wrong)


def prompts_behind_token_0(patch: pytest.MonkeyPatch) -> None:
    right = RolloutEngine._add

    def wrong(self: RolloutEngine, index: int, request: GenerationRequest) -> None:
        right(self, index, replace(request, prompt_token_ids=[0, *request.prompt_token_ids]))

    patch.setattr(RolloutEngine, "_add", wrong)


def _change_log_probs(patch: pytest.MonkeyPatch, change: Callable[[list[float]], list[float]]) -> None:
    right = rollout_engine._response

    def wrong(*args: Any) -> SampledResponse:
        found = right(*args)
        return replace(found, log_probs=change(found.log_probs))

    patch.setattr(rollout_engine, "_response", wrong)


def next_tokens_log_probs(patch: pytest.MonkeyPatch) -> None:
    _change_log_probs(patch, lambda log_probs: [*log_probs[1:], log_probs[0]])


def growing_difference(patch: pytest.MonkeyPatch) -> None:
    _change_log_probs(patch, lambda log_probs: [x + 0.02 * (-1) ** i * i for i, x in enumerate(log_probs)])


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    em_runs.spoil_updates(patch, 1)


def other_weights(patch: pytest.MonkeyPatch) -> None:
    em_runs.spoil_updates(patch, 99)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    fault.__name__: fault
    for fault in (
        trainer_temperature,
        rollout_temperature,
        prompts_without_first_token,
        prompts_behind_token_0,
        next_tokens_log_probs,
        growing_difference,
        stale_weights,
        other_weights,
    )
}


def run(case: dict[str, Any]) -> dict[str, Any]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        if case["fault"] is not None:
            FAULTS[case["fault"]](patch)
        code = cli.main(case["words"])
    em_runs.close_groups()
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


if __name__ == "__main__":  # the processes that read data import this file, too
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({case["name"]: run(case) for case in cases}))
