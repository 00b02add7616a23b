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
from tempo_megatron.checkpoint.load import read_trainer_state
from tempo_megatron.config.load import load_config
from tempo_megatron.loop.batching import minibatches
from tempo_megatron.telemetry.metrics import read_metrics
from tests.launching import ROOT
from tests.loop.cases import Case, Inputs, make_inputs, run_cases, small_tempo, teach
from tests.loop.plain_oracle import Replay

TOLERANCE = 2e-5
STEPS = 2

NO_CRITIC = {"critic": "null"}
D_U_ALONE = {**NO_CRITIC, "data.labeled_prompts_per_step": 0}

PENALTY = {"algorithm.reward_terms.length_penalty": "{coefficient: 0.5, buffer_tokens: 3}"}
FILTER = {"algorithm.filter.enabled": "true", "algorithm.filter.max_rounds": 20}
#: vLLM in bfloat16 beside a trainer in float32, so that there is something to correct; and hot enough for responses of
#: different lengths.
OTHER_SAMPLER = {
    **PENALTY,
    "rollout.dtype": "bfloat16",
    "rollout.temperature": 1.5,
    "rollout.max_log_prob_diff": 0.5,
    "algorithm.mstep.correction.cap": 1.0,
}

#: Each method, with the settings of the algorithm spread over them.
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"stage": "ppo", "data.unlabeled_prompts_per_step": 0, "algorithm.estep.order": "after_values"},
    "grpo": {**NO_CRITIC, "stage": "grpo", "data.unlabeled_prompts_per_step": 0, "algorithm.mstep.loss": "gspo"},
    "tempo-paper": {"algorithm.preset": "paper", "algorithm.mstep.advantage": "scale"},
    "tempo-anchored": {
        "algorithm.estep.minibatches": 3,
        "algorithm.estep.updates": 2,
        "algorithm.mstep.minibatches": 2,
        "algorithm.mstep.loss_agg": "token-mean",
    },
    "tempo-reference": {
        **FILTER,
        "algorithm.preset": "reference",
        "algorithm.estep.minibatches": 2,
        "algorithm.estep.loss_agg": "token-mean",
        "algorithm.mstep.loss": "gspo",
        "algorithm.mstep.clip_low": 3e-4,
        "algorithm.mstep.clip_high": 5e-4,
        "algorithm.mstep.minibatches": 2,
    },
    "tempo-group": {"algorithm.mstep.estimator": "group", "actor.recompute": "true", "critic.recompute": "true"},
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
#: Layout -> what is tried in it alone.
SPECIAL: dict[str, dict[str, dict[str, Any]]] = {
    "dp2": {
        "correction-token": {
            **OTHER_SAMPLER,
            "algorithm.mstep.correction.weights": "token",
            "algorithm.mstep.correction.mask_level": "sequence",
            "algorithm.mstep.correction.mask_low": 0.998,
            "algorithm.mstep.correction.mask_high": 1.002,
        },
    },
    "tp2": {
        "filter-actor": {**FILTER, "algorithm.filter.apply_to_critic": "false"},
        "correction-sequence": {
            **OTHER_SAMPLER,
            "algorithm.mstep.minibatches": 2,
            "algorithm.mstep.correction.weights": "sequence",
            "algorithm.mstep.correction.mask_level": "token",
            "algorithm.mstep.correction.mask_low": 0.995,
            "algorithm.mstep.correction.mask_high": 1.005,
        },
        "stopped": {**OTHER_SAMPLER, "rollout.max_log_prob_diff": 1e-4},
    },
}
#: Their policy's loss is that of another method that is tried in both layouts.
DP2_ALONE = ("frozen", "tempo-sigmoid", "ttrl", "ttrl-all-rows", "oracle", "random")
TRIED = {
    layout: {method: METHODS[method] for method in METHODS if layout == "dp2" or method not in DP2_ALONE}
    | SPECIAL[layout]
    for layout in LAYOUTS
}
NAMES = [f"{method}-{layout}" for layout in LAYOUTS for method in TRIED[layout] if method != "stopped"]


@dataclass
class Runs:
    """Results by case name, and what the replay needs."""

    folder: Path
    critic: Path
    truth: dict[str, str]
    truth_of_d_l: dict[str, str]
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def replay(self, name: str) -> Replay:
        arguments = [f"{k}={v}" for k, v in {"output_dir": self.folder / name, **self.overrides[name]}.items()]
        config = load_config(ROOT / "configs/demo/tempo.yaml", arguments)
        return Replay(config, self.folder / "sft" / "hf" / "actor", self.critic, self.truth)

    def records(self, name: str) -> list[dict[str, Any]]:
        return read_metrics(self.folder / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("methods")
    inputs = make_inputs(folder / "inputs")
    teach(inputs)
    runs = Runs(folder, inputs.folder / "critic", *(_answers(inputs, name) for name in ("eval_du", "train")))
    shutil.copytree(runs.critic, folder / "sigmoid-critic")
    config_file = folder / "sigmoid-critic" / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "value_head_activation": "sigmoid"}))
    sft = {
        "actor.init": inputs.folder / "model",
        "data.train_files": f"[{inputs.folder / 'data' / 'sft.parquet'}]",
        "steps": 1,
        "data.sft_batch_size": 16,
        "checkpoint.export_hf": "true",
    }
    cases = [Case("sft", sft, "configs/demo/sft.yaml")]
    for layout, changes in LAYOUTS.items():
        for method, settings in TRIED[layout].items():
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
            cases.append(Case(f"{method}-{layout}", own, ends_in_error=method == "stopped"))
    runs.results = run_cases(cases, 2, folder, 500)
    return runs


def _answers(inputs: Inputs, name: str) -> dict[str, str]:
    rows = pq.read_table(inputs.folder / "data" / f"{name}.parquet", columns=["id", "answer"]).to_pylist()
    return {r["id"]: r["answer"].split("|")[0] for r in rows if r["answer"] is not None}


@pytest.mark.slow(3)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_method_equals_its_plain_recomputation(runs: Runs, name: str) -> None:
    result, replay = runs.results[name], runs.replay(name)
    config, estep, mstep = replay.config, replay.config.algorithm.estep, replay.config.algorithm.mstep
    before = {k: v.detach().clone() for k, v in replay.actor.module.state_dict().items()}
    assert len(result["samples"]) == STEPS
    for step, samples in enumerate(result["samples"], start=1):
        labeled = samples["labeled"]
        if labeled.any():
            assert 0 < float(samples["outcome"][labeled].mean()) < 1, "nothing to tell right from wrong"
        chosen = samples["for_actor"] & (~labeled if mstep.rows == "unlabeled" and replay.has_d_u else True)
        group, seed = samples["group"], config.seed * 1_000_003 + step
        policy_parts = minibatches(group[chosen], mstep.minibatches, 1, seed)
        critic_parts = minibatches(group[samples["for_critic"]], estep.minibatches, estep.updates, seed)
        coins = None
        if config.stage == "random":
            nothing = torch.full((len(labeled),), torch.nan)
            rows = SimpleNamespace(labeled=labeled, outcome=nothing, weights_version=samples["version"])
            coins = RandomReward(config.seed)(rows, None)  # type: ignore[arg-type]
        replay.step(samples, critic_parts, policy_parts, coins)
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("correction")])
def test_there_was_something_to_correct_and_to_penalise(runs: Runs, name: str) -> None:
    """Of the weights that the replay takes part in: some are cut, some are masked, and most are neither."""
    for record in runs.records(name):
        assert record["reward/length_penalty/min"] < record["reward/length_penalty/max"] <= 0
        assert 0.05 < record["correction/truncated"] < 0.95
        assert 0.01 < record["correction/masked"] < 0.8
        assert record["correction/weight_mean"] < 1


@pytest.mark.timeout(600)
def test_a_sampler_with_other_probabilities_stops_the_run(runs: Runs) -> None:
    """By the mean over the first step's tokens; the like is not asked of a run that allows it."""
    result, replay = runs.results["stopped-tp2"], runs.replay("stopped-tp2")
    (replay.samples,) = result["samples"]
    rows = range(len(replay.samples["tokens"]))
    with torch.no_grad():
        trainer = torch.cat(replay.log_probs(rows))
    expected = float((trainer - torch.cat([replay.sampled(i) for i in rows])).abs().mean())
    assert expected > 1e-4
    assert result["error"].startswith("rollout.max_log_prob_diff: 0.0001, but the first rollouts' log-probabilities")
    assert f" differ by {expected:.3g} on average" in result["error"]
    assert runs.records("correction-sequence-tp2")[0]["mismatch/mean_abs"] > 1e-4
    assert not (runs.folder / "stopped-tp2" / "checkpoints").exists()


@pytest.mark.timeout(600)
def test_recomputation_runs_each_layer_again(runs: Runs) -> None:
    """Once without and once with a gradient; without ``recompute`` only with one."""
    for role in ("actor", "critic"):
        again, once = (runs.results[name]["layer_calls"][role] for name in ("tempo-group-dp2", "tempo-paper-dp2"))
        assert again["without"] == again["with gradient"] > 0
        assert once["without"] == 0 < once["with gradient"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["tempo-reference-dp2", "filter-actor-tp2"])
def test_the_filter_keeps_prompts_with_mixed_outcomes(runs: Runs, name: str) -> None:
    """Of all that was sampled, in the order of sampling, judged anew by the answers."""
    replay, dropped = runs.replay(name), 0
    for samples in runs.results[name]["samples"]:
        prompts = []  # (id, tokens, outcomes) of every labelled prompt
        for drawn in samples["rounds"]:
            replay.samples = drawn
            for g in dict.fromkeys(drawn["group"][drawn["labeled"]].tolist()):
                rows = [i for i in range(len(drawn["ids"])) if drawn["group"][i] == g]
                right = [replay.answer(i) == runs.truth_of_d_l[drawn["ids"][i]] for i in rows]
                prompts.append((drawn["ids"][rows[0]], [drawn["tokens"][i] for i in rows], right))
        mixed = [p for p in prompts if 0 < sum(p[2]) < len(p[2])]
        expected = mixed[: replay.config.data.labeled_prompts_per_step]
        assert len(expected) == replay.config.data.labeled_prompts_per_step
        dropped += len(prompts) - len(mixed)
        found: dict[int, tuple[str, list[list[int]]]] = {}
        for i in (samples["labeled"] & samples["for_actor"]).nonzero().flatten().tolist():
            found.setdefault(int(samples["group"][i]), (samples["ids"][i], []))[1].append(samples["tokens"][i])
        assert list(found.values()) == [(i, tokens) for i, tokens, _ in expected]
        hopeless = samples["labeled"] & ~samples["for_actor"]
        to_critic = replay.config.algorithm.filter.apply_to_critic
        assert int(hopeless.sum()) == (0 if to_critic else sum(len(p[1]) for p in prompts if p not in mixed))
        assert bool((samples["for_critic"] == samples["labeled"]).all())
    assert dropped, "there was nothing to filter"


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
@pytest.mark.parametrize(
    ("name", "moved", "critic_updates"),
    [("tempo-anchored", ["actor", "critic"], STEPS), ("frozen", ["actor"], STEPS), ("ttrl", ["actor"], 0)],
)
def test_a_checkpoint_says_whose_weights_should_have_moved(
    runs: Runs, name: str, moved: list[str], critic_updates: int
) -> None:
    """An E-step at rate 0 counts as one, and moves nothing."""
    (checkpoint,) = (runs.folder / f"{name}-dp2" / "checkpoints").iterdir()
    state = read_trainer_state(checkpoint)
    assert (state["moved"], state["policy_updates"], state["critic_updates"]) == (moved, STEPS, critic_updates)


@pytest.mark.timeout(600)
def test_a_sigmoid_head_is_told_wherever_the_critic_goes(runs: Runs) -> None:
    """Read without it its values would be logits."""
    run = runs.folder / "tempo-sigmoid-dp2"
    (checkpoint,) = (run / "checkpoints").iterdir()
    for folder in (run / "hf" / "critic", checkpoint / "hf-critic"):
        assert json.loads((folder / "config.json").read_text())["value_head_activation"] == "sigmoid", folder
    (plain,) = (runs.folder / "ppo-dp2" / "checkpoints").iterdir()
    assert "value_head_activation" not in json.loads((plain / "hf-critic" / "config.json").read_text())
