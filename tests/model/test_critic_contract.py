"""The critic's contract, against plain torch over transformers' model (critic_oracle), on every kind of layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import launch_ranks

TOLERANCE = 1e-5
#: of how far a weight has moved in three steps, which is 1e-3 of its size: float32 leaves five digits of that less
MOVED = 5e-4
RATES = pytest.approx([0.0, 0.004, 0.0035])
#: world size -> number of cases of each kind
CASES = {
    1: {"training": 4, "resumed": 2},
    2: {"training": 11, "resumed": 4, "tied": 3, "heads": 1, "two layouts": 2},
    4: {"training": 2, "resumed": 1, "tied": 1, "two layouts": 1},
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("nproc", CASES)
def test_contract(tmp_path: Path, nproc: int) -> None:
    result = launch_ranks("tests.model.critic_contract_worker", tmp_path, nproc=nproc, timeout_s=280).check()
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    kinds = [line["kind"] for line in lines]
    assert {kind: kinds.count(kind) for kind in kinds} == CASES[nproc]
    for line in lines:
        CHECKS[line["kind"]](line)


def check_training(line: dict[str, Any]) -> None:
    """Packing, micro-batches, data, context and pipeline parallelism leave every number as it is."""
    assert line["values"] < TOLERANCE, line  # column t is V(x, y_<t), column T_i the value after the last token
    assert line["values_of_step"] < TOLERANCE, line
    assert line["loss"] < TOLERANCE, line  # a sum over everything, divided by a count of everything
    assert line["grad_norm"] < TOLERANCE, line  # of all parameters, the head's among them
    assert line["clipped"], line
    assert line["rates"] == RATES, line
    assert line["head"].keys() == {"score.weight", "score.bias"}, line
    assert max(line["head"].values()) < MOVED, line
    assert line["backbone"] < MOVED, line
    assert line["tensors"] >= 40, line


def check_tied(line: dict[str, Any]) -> None:
    assert line["reductions"] == {"actor": 1, "critic": 0}, line
    assert line["tie_word_embeddings"] is True, line
    assert line["heads"] == ["score.bias", "score.weight"], line


def check_two_layouts(line: dict[str, Any]) -> None:
    for key in ("log_probs", "values", "loss"):
        assert line[key] < TOLERANCE, line


def check_resumed(line: dict[str, Any]) -> None:
    """The head is float32 in a bfloat16 critic, from the HF folder and back, and keeps its own moments."""
    dtype = line["case"].split()[-1]
    assert line["dtypes"] == {"head": ["torch.float32"], "backbone": [f"torch.{dtype}"]}, line
    assert line["head_needs_float32"] and line["head_unrounded"], line
    assert all(0 < moved < 0.01 for moved in line["head_moved"].values()), line
    assert line["exported"] and line["restored"], line
    assert line["moved"] and line["continued"] and line["schedule_continued"], line
    assert line["rates"] == RATES, line


def check_heads(line: dict[str, Any]) -> None:
    assert line["whole"] == "no error"
    assert line["fresh"] == {"folder": True, "checkpoint": True}
    policy, both = (f"/run-{name}/checkpoints/step_00000001" for name in ("policy", "both"))
    norm = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"

    def without(checkpoint: str, role: str, key: str) -> str:
        folder = f"{checkpoint}-without-{role}-{key}/{role}"
        return f"{folder}: tensor {key} is missing; the checkpoint is not whole or of another model"

    assert line["refused"] == {
        "folder": "critic.init: /llama-tied-actor has no value head (score.weight); "
        "set critic.init_head=true to start with a fresh one",
        "checkpoint": f"critic.init: {policy} holds no critic (roles: ['actor']); "
        "set critic.init_head=true to start one with a fresh value head from its actor",
        "folder without norm": "critic.init: /policy-without-norm/model.safetensors: "
        "tensor model.layers.2.input_layernorm.weight is missing; config.json asks for it",
        "checkpoint without norm": without(policy, "actor", norm),
        "critic without head": without(both, "critic", "output_layer.weight"),
        "resume without bias": without(both, "critic", "output_layer.bias"),
        "resume without moments": without(both, "critic", "optimizer.state.exp_avg.output_layer.bias"),
    }


CHECKS = {
    "training": check_training,
    "tied": check_tied,
    "two layouts": check_two_layouts,
    "resumed": check_resumed,
    "heads": check_heads,
}
