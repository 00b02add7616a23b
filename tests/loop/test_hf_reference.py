"""What transformers is asked for, and how much of it; its numbers are compared in ``test_doctor``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tempo_megatron.loop import hf_reference
from tempo_megatron.loop.hf_reference import reference_log_probs, rows_within_reach
from tests.loop.conftest import DemoInputs


def test_as_many_responses_as_take_the_time_and_the_memory(
    demo_inputs: DemoInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_inputs.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert rows_within_reach(model.config, [10, 20, 30]) == (3, "")
    monkeypatch.setattr(hf_reference, "MOST_WORK", 30 * parameters)
    assert rows_within_reach(model.config, [10, 20, 30]) == (2, "")
    assert rows_within_reach(model.config, [31, 1]) == (0, f"{parameters:,} parameters take too long on a CPU")
    little = SimpleNamespace(available=7 * parameters)
    monkeypatch.setattr(hf_reference.psutil, "virtual_memory", lambda: little)
    rows, why_not = rows_within_reach(model.config, [1])
    assert rows == 0
    assert "GiB of float32 weights are too many" in why_not


def test_each_token_is_scored_behind_its_prompt_at_the_temperature(demo_inputs: DemoInputs) -> None:
    prompts, responses = [[3, 4, 5], [6]], [[7, 1], [8, 9, 10]]
    found = reference_log_probs(demo_inputs.model, prompts, responses, 0.7)
    model = AutoModelForCausalLM.from_pretrained(demo_inputs.model, dtype=torch.float32)
    expected: list[float] = []
    for prompt, response in zip(prompts, responses, strict=True):
        for i, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:i]])).logits[0, -1].detach()
            expected.append(float((logits / 0.7).log_softmax(-1)[token]))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_folder_that_transformers_cannot_load_is_an_error(demo_inputs: DemoInputs) -> None:
    with pytest.raises((OSError, ValueError)):
        reference_log_probs(demo_inputs.model / "gone", [[1]], [[2]], 1.0)
