"""The ledger: what is where in which phase, verdicts, and that it is a pure function of what it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.config.residency import NEEDS
from tempo_megatron.config.schema import Config
from tempo_megatron.planner.hardware import CARDS, Cluster
from tempo_megatron.planner.ledger import (
    CPU_CACHE,
    FILLED,
    Ledger,
    Phase,
    certain_ledger,
    plan_ledger,
    with_kv_cache,
)
from tempo_megatron.planner.rollout import kv_cache
from tempo_megatron.planner.sizes import ModelSizes

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs" / "models"
NODE = Cluster(1, 8, CARDS["h100-80gb"], host_memory=1 << 41)


def values(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


def config(**changes: Any) -> Config:
    parallel = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    role = {"init": "-", "parallel": parallel, "recompute": "full"}
    given = {
        "stage": "tempo",
        "output_dir": "-",
        "steps": 1,
        "actor": role,
        "critic": role,
        "data": {"labeled_prompts_per_step": 64, "unlabeled_prompts_per_step": 64},
        "rollout": {"kv_cache_gib": 16.0, "tensor_parallel_size": 2},
        **changes,
    }
    return Config.model_validate(given)


def ledger(model: str = "Qwen3-8B-Base", cluster: Cluster = NODE, **changes: Any) -> Ledger:
    return plan_ledger(config(**changes), {"actor": values(model), "critic": values(model)}, cluster)


def parts(phase: Phase) -> set[str]:
    return {item.name for item in phase.items if item.exact}


def test_fp8_is_counted_without_and_said_to_be() -> None:
    plain = ledger()
    critic = config().critic
    assert critic is not None
    fp8 = {**critic.model_dump(), "fp8": {"recipe": "current"}}
    found = ledger(critic=fp8)
    assert found.phases == plain.phases
    assert set(found.unmodelled) - set(plain.unmodelled) == {"critic.fp8: all is counted as in the role's dtype"}
    # emulated layers are those of the torch spec
    emulated = ledger(critic={**fp8, "fp8": {"recipe": "current", "emulated": True}})
    assert emulated.phases == ledger(critic={**critic.model_dump(), "layer_spec": "torch"}).phases != plain.phases


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
@pytest.mark.parametrize("sleep", [False, True], ids=["awake", "sleeps"])
def test_phases_hold_what_residency_says(offload: str, sleep: bool) -> None:
    """What a phase needs is there; what may leave and is not needed is not."""
    every = {part for needs in NEEDS.values() for part in needs}
    of_rollout = {part for part in every if part.startswith("rollout")}
    kept = {"none": every, "optimizer": {part for part in every if part.endswith("weights")}, "all": set()}
    stays = (kept[offload] - of_rollout) | (set() if sleep else of_rollout)
    found = ledger(residency={"offload": offload, "sleep": sleep})
    for phase in found.phases:
        if phase.name in NEEDS:
            assert parts(phase) == stays | NEEDS[phase.name], phase.name


def test_the_same_question_has_the_same_answer_whatever_the_model_is_given_as() -> None:
    sizes = ModelSizes.of(values("Qwen3-8B-Base"))
    assert plan_ledger(config(), {"actor": sizes, "critic": sizes}, NODE) == ledger()


def test_what_leaves_is_pinned_in_powers_of_two_on_the_host() -> None:
    found = ledger(residency={"offload": "optimizer"})
    (item,) = [item for item in found.host if item.name == "actor.optimizer, away (pinned)"]
    size = found.states["actor"].optimizer
    assert item.bytes.low == item.bytes.high == 8 * (1 << (size - 1).bit_length()) >= 8 * size


def test_the_distributed_optimizer_shares_its_states_over_replicas() -> None:
    one, two = ledger(), ledger(cluster=Cluster(4, 8, CARDS["h100-80gb"]))
    assert two.states["actor"].weights == pytest.approx(one.states["actor"].weights, rel=1e-4)
    assert two.states["actor"].optimizer == pytest.approx(one.states["actor"].optimizer / 4, rel=1e-3)


def test_weights_gradients_masters_and_moments_of_a_published_model() -> None:
    """8,190,735,360 parameters over TP 4 x DP 2; norms are on every rank, and buffers are padded."""
    state, numbers = ledger().states["actor"], 8_190_735_360 / 4
    assert state.weights == pytest.approx(2 * numbers, rel=1e-3)
    assert state.gradients == pytest.approx(4 * numbers, rel=1e-3)
    assert state.optimizer == pytest.approx(12 * numbers / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("memory", "verdict"), [(10**12, "fits"), (1, "does not fit")], ids=["a large card", "a small one"]
)
def test_verdicts(memory: int, verdict: str) -> None:
    found = ledger(cluster=NODE.with_memory(memory))
    assert found.verdict == verdict
    between = (found.fullest.total.low + found.fullest.total.high) // 2
    assert ledger(cluster=NODE.with_memory(between)).verdict == "may not fit"


def test_recomputation_and_smaller_micro_batches_take_less() -> None:
    def m_step(**changes: Any) -> int:
        role = {"init": "-", "parallel": {"tensor_model_parallel_size": 4, "sequence_parallel": True}, **changes}
        (phase,) = [p for p in ledger(actor=role).phases if p.name == "m_step"]
        return phase.total.high

    none, selective, full = (m_step(recompute=level) for level in ("none", "selective", "full"))
    assert none > selective > full
    assert full > m_step(recompute="full", max_tokens_per_microbatch=18432)


def test_the_fullest_rank_is_of_the_stage_that_holds_most() -> None:
    """The first stage has the embedding and most micro-batches in flight, the last the logits."""
    role = {"init": "-", "parallel": {"pipeline_model_parallel_size": 4}, "recompute": "none"}
    found = {phase.name: phase for phase in ledger(actor=role, critic=role).phases}
    assert found["m_step"].where.startswith("stage 0 of 4")
    assert found["m_step"].total.high > found["log_probs"].total.high


def test_a_cache_is_judged_by_sequences_of_full_length() -> None:
    """Qwen3-8B: 8 KV heads of 128, 36 layers, bfloat16: 147,456 bytes a token, in blocks of 16."""
    sizes, rollout = ModelSizes.of(values("Qwen3-8B-Base")), config(rollout={"kv_cache_gib": 1.0}).rollout
    cache = kv_cache(sizes, rollout, 4096, rollout.kv_cache_bytes, on_cpu=False)
    assert cache.blocks == 2**30 // (16 * 147_456)
    assert cache.sequences == pytest.approx((cache.blocks - 1) / 256)
    assert cache.needed_bytes == 257 * 16 * 147_456


def test_layers_with_a_window_keep_no_more_than_it() -> None:
    sizes = ModelSizes.of(values("Olmo-3-1025-7B"))
    rollout = config(rollout={"max_num_batched_tokens": 1024}).rollout
    long, longer = (kv_cache(sizes, rollout, n, 0, on_cpu=False).sequence_blocks for n in (16384, 32768))
    assert longer - long == 16384 // 16  # of the one group in four that attends to everything


AUTO: dict[str, Any] = {"rollout": {"tensor_parallel_size": 2}}


@pytest.mark.parametrize("sleep", [False, True], ids=["awake", "sleeps"])
def test_a_cache_of_its_own_size_fills_what_is_left(sleep: bool) -> None:
    """Of the phases that it is in, and no more than what all sequences can use."""
    found = ledger(**AUTO, residency={"offload": "optimizer", "sleep": sleep})
    with_cache = [phase for phase in found.phases if "rollout.kv_cache" in parts(phase)]
    assert len(with_cache) < len(found.phases) if sleep else len(with_cache) == len(found.phases)
    assert found.kv is not None and 1 < found.kv.sequences < 256
    room = FILLED * NODE.card.memory - max(phase.total.high for phase in with_cache)
    assert 0 <= room < found.kv.bytes_per_block + 2
    assert found.verdict == "fits"


def test_a_cache_of_its_own_size_has_room_for_all_sequences_where_there_is_and_for_one_always() -> None:
    large, small = ledger(**AUTO, cluster=NODE.with_memory(10**12)).kv, ledger(**AUTO, cluster=NODE.with_memory(1)).kv
    assert large is not None and small is not None
    assert large.sequences == 256
    assert small.sequences == 1


def test_on_a_cpu_it_stays_small() -> None:
    cluster = Cluster(1, 8, CARDS["cpu"]).with_memory(10**12)
    cache = ledger(**AUTO, cluster=cluster).kv
    assert cache is not None
    assert cache.bytes > CPU_CACHE and cache.sequences == 1
    few = ledger(
        data={"labeled_prompts_per_step": 64, "max_response_tokens": 64, "max_prompt_tokens": 64},
        **AUTO,
        cluster=cluster,
    ).kv
    assert few is not None and few.bytes == pytest.approx(CPU_CACHE, rel=0.01)


@pytest.mark.parametrize("cluster", [NODE, Cluster(1, 8, CARDS["cpu"]).with_memory(10**12)], ids=["gpu", "cpu"])
def test_whoever_asks_gets_the_same_size(cluster: Cluster) -> None:
    """The plan, what is refused, and the engine."""
    given = {"actor": values("Qwen3-8B-Base"), "critic": values("Qwen3-8B-Base")}
    auto = config(**AUTO)
    settled = with_kv_cache(auto, given, cluster)
    plan = plan_ledger(auto, given, cluster)
    assert plan_ledger(settled, given, cluster) == plan
    assert certain_ledger(auto, given, cluster).kv == plan.kv
    assert with_kv_cache(settled, given, cluster) == settled
    with pytest.raises(ValueError, match="auto must be made a number"):
        _ = auto.rollout.kv_cache_bytes


def test_a_model_without_a_critic_that_is_evaluated_has_a_cache_too() -> None:
    given, evaluation = {"actor": values("Qwen3-8B-Base")}, {"critic": None, "data": {}, **AUTO}
    sizes = {stage: with_kv_cache(config(stage=stage, **evaluation), given, NODE) for stage in ("sft", "tempo")}
    assert all(found.rollout.kv_cache_bytes > 1 << 30 for found in sizes.values())


def test_the_short_form_has_what_is_certain_and_no_more() -> None:
    given = {"actor": values("Qwen3-8B-Base"), "critic": values("Qwen3-8B-Base")}
    for short, whole in zip(certain_ledger(config(), given, NODE).phases, ledger().phases, strict=True):
        assert short.certain == whole.certain <= whole.total.low


def test_no_torch_is_loaded_and_a_large_job_takes_a_moment() -> None:
    program = """
import json, sys, time
from pathlib import Path
from tests.planner.test_ledger import CARDS, Cluster, certain_ledger, config, values
given = values("Qwen3-235B-A22B")
parallel = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "pipeline_model_parallel_size": 8,
            "expert_model_parallel_size": 16}
role = {"init": "-", "parallel": parallel, "recompute": "full"}
start = time.process_time()
certain_ledger(config(actor=role, critic=role), {"actor": given, "critic": given}, Cluster(64, 8, CARDS["h100-80gb"]))
heavy = [name for name in ("torch", "megatron", "vllm", "transformers") if name in sys.modules]
print(json.dumps([time.process_time() - start, heavy]))
"""
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    seconds, loaded = json.loads(told.stdout)
    assert loaded == []
    assert seconds < 1
