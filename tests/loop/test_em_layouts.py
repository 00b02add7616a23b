"""The same run on other layouts gives the same samples and, within 1e-4 in fp32, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from tests.loop.cases import Case, make_inputs, run_cases, small_tempo

TOLERANCE = 1e-4


def layout(tp: int = 1, pp: int = 1, *, sp: bool = False, rollout_tp: int = 1) -> dict[str, Any]:
    return {
        **{
            f"{role}.parallel.{key}": value
            for role in ("actor", "critic")
            for key, value in (
                ("tensor_model_parallel_size", tp),
                ("pipeline_model_parallel_size", pp),
                ("sequence_parallel", str(sp).lower()),
            )
        },
        "rollout.tensor_parallel_size": rollout_tp,
        "checkpoint.export_hf": "true",
    }


#: The layouts that users name, with the further variations spread over them: sequence parallelism, a critic
#: with a layout of its own, a vLLM replica over two ranks.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp2": layout(),
        "pp2": layout(pp=2),
        "tp2-sp-critic-dp2": {
            **layout(tp=2, sp=True),
            "critic.parallel.tensor_model_parallel_size": 1,
            "critic.parallel.sequence_parallel": "false",
        },
        "tp2-rollout-tp2": layout(tp=2, rollout_tp=2),
    },
    4: {"tp2-pp2-sp": layout(tp=2, pp=2, sp=True)},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("layouts")
    inputs = make_inputs(folder / "inputs")
    found = run_cases([Case("single", small_tempo(inputs, **layout()))], 1, folder, 150)
    for nproc, layouts in LAYOUTS.items():
        cases = [Case(name, small_tempo(inputs, **changes)) for name, changes in layouts.items()]
        found |= run_cases(cases, nproc, folder, 280)
    for name, result in found.items():
        result["hf"] = folder / name / "hf"
    return found


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", [name for layouts in LAYOUTS.values() for name in layouts])
def test_layout_equals_single_rank(results: dict[str, dict[str, Any]], name: str) -> None:
    single, other = results["single"], results[name]
    assert len(single["samples"]) == 2
    for a, b in zip(single["samples"], other["samples"], strict=True):
        assert a["prompts"] == b["prompts"]
        assert a["tokens"] == b["tokens"]
        assert (a["log_probs"] - b["log_probs"]).abs().max() < TOLERANCE
    for role in ("actor", "critic"):
        assert len(single["seen"][role]) == len(other["seen"][role]) >= 2
        for a, b in zip(single["seen"][role], other["seen"][role], strict=True):
            assert a.keys() == b.keys()
            for key in a:
                x, y = torch.as_tensor(a[key]), torch.as_tensor(b[key])
                assert (x - y).abs().max() <= TOLERANCE * max(1.0, float(x.abs().max())), (role, key)


@pytest.mark.timeout(700)
def test_single_rank_rollout_agrees_with_trainer(results: dict[str, dict[str, Any]]) -> None:
    """vLLM's against Megatron's log-probabilities, before and after an update."""
    run = results["single"]
    for batch, seen in zip(run["samples"], run["seen"]["actor"], strict=True):
        difference = (batch["log_probs"] - seen["log_probs"]).abs().max()
        assert difference < TOLERANCE
    assert not torch.equal(run["seen"]["actor"][0]["log_probs"], run["seen"]["actor"][1]["log_probs"])
    assert run["seen"]["actor"][0]["grad_norm"] > 1e-3


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", ["single", "tp2-sp-critic-dp2"])
def test_exported_folders_load_in_transformers(results: dict[str, dict[str, Any]], name: str) -> None:
    for role, auto in (("actor", AutoModelForCausalLM), ("critic", AutoModelForTokenClassification)):
        folder = results[name]["hf"] / role
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None
        state = model.state_dict()
        weights = {k.removeprefix(f"{role}."): v for k, v in results[name]["weights"].items() if k.startswith(role)}
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], weights[key]) for key in weights)
