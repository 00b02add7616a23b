"""Every method, packed, data- and tensor-parallel, against the plain re-computation of ``plain_oracle``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForTokenClassification

from tempo_megatron.algorithm.rewards import RandomReward
from tempo_megatron.config.load import load_config
from tempo_megatron.loop.batching import minibatches
from tests.launching import ROOT
from tests.loop.cases import Case, make_inputs, run_cases, small_tempo
from tests.loop.plain_oracle import Replay

TOLERANCE = 2e-5
SFT_STEPS = 240
STEPS = 2

NO_CRITIC = {"critic": "null"}
D_U_ALONE = {**NO_CRITIC, "data.labeled_prompts_per_step": 0}

#: Each method, with the settings of the algorithm spread over them.
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"stage": "ppo", "data.unlabeled_prompts_per_step": 0, "algorithm.estep.order": "after_values"},
    "grpo": {**NO_CRITIC, "stage": "grpo", "data.unlabeled_prompts_per_step": 0, "algorithm.mstep.loss": "gspo"},
    "tempo-paper": {"algorithm.preset": "paper", "algorithm.mstep.advantage": "scale"},
    "tempo-anchored": {"algorithm.mstep.minibatches": 2, "algorithm.mstep.loss_agg": "token-mean"},
    "tempo-reference": {
        "algorithm.preset": "reference",
        "algorithm.filter.enabled": "false",
        "algorithm.estep.loss_agg": "token-mean",
        "algorithm.mstep.loss": "gspo",
        "algorithm.mstep.clip_low": 3e-4,
        "algorithm.mstep.clip_high": 5e-4,
        "algorithm.mstep.minibatches": 2,
    },
    "tempo-group": {"algorithm.mstep.estimator": "group"},
    "tempo-sigmoid": {
        "critic.head": "sigmoid",
        "algorithm.mstep.dual_clip": 3.0,
        "checkpoint.export_hf": "true",
    },
    "frozen": {"critic.optimizer.lr": 0.0},
    "ttrl": {**D_U_ALONE, "stage": "ttrl"},
    "ttrl-all-rows": {**NO_CRITIC, "stage": "ttrl", "algorithm.mstep.advantage": "none"},
    "empo": {**D_U_ALONE, "stage": "empo", "algorithm.filter.enabled": "true"},  # which is about D_L
    "oracle": {**D_U_ALONE, "stage": "oracle"},
    "random": {**D_U_ALONE, "stage": "random"},
}
LAYOUTS = {
    "dp2": {},
    "tp2": {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": "true"},
}


@dataclass
class Runs:
    """Results by case name, and what the replay needs."""

    folder: Path
    critic: Path
    truth: dict[str, str]
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("methods")
    inputs = make_inputs(folder / "inputs")
    answers = pq.read_table(inputs.folder / "data" / "eval_du.parquet", columns=["id", "answer"]).to_pylist()
    runs = Runs(folder, inputs.folder / "critic", {r["id"]: r["answer"].split("|")[0] for r in answers})
    shutil.copytree(runs.critic, folder / "sigmoid-critic")
    config_file = folder / "sigmoid-critic" / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "value_head_activation": "sigmoid"}))
    sft = {  # an untrained model is never right
        "actor.init": inputs.folder / "model",
        "data.train_files": f"[{inputs.folder / 'data' / 'sft.parquet'}]",
        "steps": SFT_STEPS,
        "data.sft_batch_size": 128,
        "checkpoint.export_hf": "true",
    }
    cases = [Case("sft", sft, "configs/demo/sft.yaml")]
    for layout, changes in LAYOUTS.items():
        for method, settings in METHODS.items():
            own = small_tempo(
                inputs,
                **{
                    "actor.init": folder / "sft",
                    "rollout.samples_per_prompt": 6,
                    "actor.max_tokens_per_microbatch": 160,
                    "critic.max_tokens_per_microbatch": 192,
                    "data.labeled_prompts_per_step": 4,
                    "steps": STEPS,
                    # Adam turns the rounding of a gradient near 0 into a whole step unless eps is above it
                    "actor.optimizer.eps": 1e-3,
                    "critic.optimizer.eps": 1e-3,
                    **settings,
                },
            )
            roles = ["actor"] if "critic" in settings else ["actor", "critic"]
            own |= {f"{role}.{key}": value for role in roles for key, value in changes.items()}
            if settings.get("critic") == "null":
                own = {k: v for k, v in own.items() if not k.startswith("critic.")}
            if settings.get("critic.head") == "sigmoid":
                own["critic.init"] = folder / "sigmoid-critic"
            if settings.get("stage") == "oracle":
                own["data.oracle_files"] = f"[{inputs.folder / 'data' / 'eval_du.parquet'}]"
            runs.overrides[f"{method}-{layout}"] = own
            cases.append(Case(f"{method}-{layout}", own))
    runs.results = run_cases(cases, 2, folder, 500)
    return runs


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_method_equals_its_plain_recomputation(runs: Runs, method: str, layout: str) -> None:
    name = f"{method}-{layout}"
    result, overrides = runs.results[name], runs.overrides[name]
    arguments = [f"{k}={v}" for k, v in {"output_dir": runs.folder / name, **overrides}.items()]
    config = load_config(ROOT / "configs/demo/tempo.yaml", arguments)
    replay = Replay(config, runs.folder / "sft" / "hf" / "actor", runs.critic, runs.truth)
    before = {k: v.detach().clone() for k, v in replay.actor.module.state_dict().items()}
    assert len(result["samples"]) == STEPS
    for step, samples in enumerate(result["samples"], start=1):
        labeled = samples["labeled"]
        if labeled.any():
            assert 0 < float(samples["outcome"][labeled].mean()) < 1, "nothing to tell right from wrong"
        chosen = ~labeled if config.algorithm.mstep.rows == "unlabeled" and replay.has_d_u else labeled >= 0
        group = samples["group"][chosen]
        parts = minibatches(_Rows(group), config.algorithm.mstep.minibatches, 1, config.seed * 1_000_003 + step)
        coins = None
        if config.stage == "random":
            nothing = torch.full((len(group),), torch.nan)
            rows = SimpleNamespace(labeled=labeled, outcome=nothing, weights_version=samples["version"])
            coins = RandomReward(config.seed)(rows, None)  # type: ignore[arg-type]
        replay.step(samples, list(parts), coins)
    moved = 0.0
    for role, model in (("actor", replay.actor), ("critic", replay.critic)):
        if model is None:
            continue
        for key, tensor in model.module.state_dict().items():
            found = result["weights"].get(f"{role}.{key}")
            if found is None:
                assert key == "lm_head.weight" or key.endswith("inv_freq"), key
                continue
            assert (found - tensor).abs().max() < TOLERANCE, (role, key)
            if role == "actor":
                moved = max(moved, float((tensor - before[key]).abs().max()))
    assert moved > 20 * TOLERANCE, "the policy has hardly moved: the comparison would say nothing"


class _Rows:
    """As much of a batch as dealing mini-batches takes."""

    def __init__(self, group: torch.Tensor) -> None:
        self.group = group

    def __len__(self) -> int:
        return len(self.group)


@pytest.mark.timeout(600)
def test_all_methods_meet_the_same_prompts_with_the_same_seeds(runs: Runs) -> None:
    """The first step's samples come from the same policy: methods that draw the same prompts sample the same."""

    def of(name: str, labeled: bool) -> list[tuple[str, list[int]]]:
        s = runs.results[f"{name}-dp2"]["samples"][0]
        return [
            (i, t) for i, t, own in zip(s["ids"], s["tokens"], s["labeled"].tolist(), strict=True) if own == labeled
        ]

    for name in ("frozen", "ttrl", "empo", "oracle", "random", "tempo-paper"):
        assert of(name, False) == of("tempo-anchored", False)
    for name in ("ppo", "grpo", "ttrl-all-rows"):
        assert of(name, True) == of("tempo-anchored", True)


@pytest.mark.timeout(600)
def test_frozen_critic_does_not_move(runs: Runs) -> None:
    weights = runs.results["frozen-dp2"]["weights"]
    start = AutoModelForTokenClassification.from_pretrained(runs.critic, num_labels=1).state_dict()
    assert all(torch.equal(weights[f"critic.{key}"], start[key]) for key in start)


@pytest.mark.timeout(600)
def test_a_sigmoid_head_is_told_wherever_the_critic_goes(runs: Runs) -> None:
    """Read without it its values would be logits."""
    run = runs.folder / "tempo-sigmoid-dp2"
    (checkpoint,) = (run / "checkpoints").iterdir()
    for folder in (run / "hf" / "critic", checkpoint / "hf-critic"):
        assert json.loads((folder / "config.json").read_text())["value_head_activation"] == "sigmoid", folder
    (plain,) = (runs.folder / "ppo-dp2" / "checkpoints").iterdir()
    assert "value_head_activation" not in json.loads((plain / "hf-critic" / "config.json").read_text())
