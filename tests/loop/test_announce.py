"""What a run says before and after, from settings and files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.config.schema import Config, EvalSet
from tempo_megatron.data.prompts import PromptRecord
from tempo_megatron.data.sampler import PromptSampler
from tempo_megatron.locate import InitSource
from tempo_megatron.loop.announce import outcome, plan
from tempo_megatron.loop.data import EvalPrompts, Pool, PromptData, SftData
from tempo_megatron.telemetry.run_folder import Finished, load_run

LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


def config(**changes: Any) -> Config:
    settings = {
        "stage": "tempo",
        "output_dir": "runs/x",
        "steps": 5,
        "actor": {"init": "a", "parallel": LAYOUT},
        "critic": {"init": "c"},
        "data": {"labeled_prompts_per_step": 3, "unlabeled_prompts_per_step": 4},
        "checkpoint": {"every": 2, "export_hf": True},
    }
    return Config.model_validate(settings | changes)


def pool(n: int) -> Pool:
    records = [PromptRecord(str(i), "s", [{"role": "user", "content": "?"}], None, "int", False) for i in range(n)]
    return Pool(records, [[1]] * n, PromptSampler(n, 0))


def told(settings: Config, data: PromptData | SftData, resumption: tuple[str, ...] = ()) -> str:
    sources = {"actor": InitSource("hf", Path("models/a"), Path("models/a"))}
    roles = {"actor": (settings.actor, sources["actor"])}
    if settings.critic is not None:
        source = InitSource("checkpoint", Path("runs/c/step_1"), Path("runs/c/step_1/hf"))
        roles["critic"] = (settings.critic, source)
    return "\n".join(plan(settings, roles, data, 8, resumption))


def test_the_plan_says_goal_models_layouts_data_and_what_may_hold_the_policy() -> None:
    sets = [EvalPrompts(EvalSet(name="D_U", files=["d"], samples_per_prompt=16), pool(9).records, [[1]] * 9)]
    shown = told(
        config(evaluation={"every": 2}),
        PromptData(pool(7), pool(11), {}, sets),
        ("resume: goes on from runs/x/step_4",),
    )
    for part in (
        "will make 5 policy updates of tempo on 8 ranks, seed 0, in runs/x",
        "resume: goes on from runs/x/step_4",
        "actor: models/a (HF folder), bfloat16, TP2 x PP2 x DP2",
        "critic: runs/c/step_1 (checkpoint), bfloat16, DP8",
        "data: D_L 7 prompts, 3 a step; D_U 11 prompts, 4 a step; 8 responses to each",
        "evaluation: D_U (9 prompts x 16); at the start, every 2 updates, at the end",
        "gate: no policy update before the critic's AUROC is 0.95; guard: hold where the policy collapses",
        "checkpoints: every 2 steps and at the end; then HF folders",
    ):
        assert part in shown


def test_what_a_stage_does_not_have_is_not_told() -> None:
    sft = config(stage="sft", critic=None, checkpoint={})
    shown = told(sft, SftData([[1]] * 20, [[1]] * 20))
    assert "will make 5 optimizer steps of sft" in shown
    assert "data: 20 demonstrations, 256 a step" in shown
    assert "checkpoints: at the end" in shown
    for word in ("critic", "gate", "guard", "evaluation", "HF folders", "resume"):
        assert f"{word}:" not in shown
    unlabeled = config(stage="ttrl", critic=None, data={"unlabeled_prompts_per_step": 4})
    shown = told(unlabeled, PromptData(None, pool(11), {}, []))
    assert "data: D_U 11 prompts, 4 a step" in shown
    assert "gate:" not in shown
    assert "evaluation: none" in shown


@pytest.mark.parametrize("with_evaluations", [True, False])
def test_the_outcome_says_what_and_where_and_what_must_not_be_missed(tmp_path: Path, with_evaluations: bool) -> None:
    rows: list[dict[str, Any]] = [{"step": 0}, {"step": 9}]
    if with_evaluations:
        rows[0] |= {"eval/D_U/mean@4": 0.37, "eval/D_U/critic_auroc": 0.795}
        rows[1] |= {"eval/D_U/mean@4": 0.79, "eval/D_U/critic_auroc": 0.565}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    newest = tmp_path / "checkpoints" / "step_00000009"
    newest.mkdir(parents=True)
    (newest / "manifest.json").touch()
    memory = {
        "move": {"peak": 1.5, "actor.weights": 0.25},
        "m_step": {"peak": 1.25, "actor.weights": 0.25, "actor.optimizer": 0.5},
    }
    lines = outcome(config(), load_run(tmp_path), Finished(9, 5), 75.0, 1.5, memory)
    assert lines[0] == "done: 5 policy updates in 9 steps, 1:15 since this start, 1.50 GiB at most on rank 0"
    assert f"checkpoint: {newest}" in lines
    assert f"HF folders: {tmp_path / 'hf'}" in lines
    if with_evaluations:
        assert lines[1] == ("D_U, step 0 to 9: mean@4 0.370 to 0.790 (+0.420), critic AUROC 0.795 to 0.565 (-0.230)")
        assert lines[2].startswith("warning: D_U: the critic tells right from wrong worse than it did")
    else:
        assert len(lines) == 3
    moving = outcome(config(residency={"sleep": True}), load_run(tmp_path), Finished(9, 5), 75.0, 1.5, memory)
    told = "memory in m_step: 1.25 GiB at most; resident 0.75 (actor.weights 0.25, actor.optimizer 0.50)"
    assert moving == [lines[0], told, *lines[1:]]
