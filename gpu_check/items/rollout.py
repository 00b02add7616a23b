"""vLLM beside a trainer that holds most of the card; weights that change twice; both sides' log-probabilities."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch

from gpu_check.check import Check
from gpu_check.items.device import join, require_gpu, working_dtype
from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.config.schema import ParallelConfig, RoleConfig
from tempo_megatron.model.weights import load_hf_weights
from tempo_megatron.parallel.device import device, use_cuda
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine
from tempo_megatron.training.engine import MegatronEngine
from tempo_megatron.training.microbatch import Sequences
from tests.rollout.update_cases import config_of, random_tensors

#: Mean |log p of vLLM - log p of the trainer|.
BOUNDS = {"bfloat16": 0.02, "float32": 1e-4}
#: The same with FP8: the run's own gate (``rollout.max_log_prob_diff: auto``).
FP8_BOUND = 0.5
#: Whole blocks of 128 in every projection.
FP8_SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
FP8_SIZES |= {"intermediate_size": 1024}
#: Of the card, what is left to vLLM beside its weights and KV cache.
LEFT = 0.1
VERSIONS, PROMPTS, SAMPLES, TOKENS, LENGTH = 3, 8, 4, 40, 64


def run(check: Check) -> None:
    join()
    _sampled(check, "qwen3", ModelParallelGroups(ParallelConfig(), 600))


def families(check: Check) -> None:
    """All but that of ``run``, one engine after the other."""
    join()
    groups = ModelParallelGroups(ParallelConfig(), 600)
    for family in ("llama-tied", "qwen2", "olmo3", "qwen3-moe"):
        _sampled(check, family, groups)


def fp8(check: Check) -> None:
    """Quantised in the update; beside what the same rounded weights give in the trainer's dtype."""
    require_gpu("vLLM's FP8 kernels are those of GPUs")
    join()
    groups = ModelParallelGroups(ParallelConfig(), 600)
    for weights in ("fp8", "fp8-emulated"):
        _sampled(check, "qwen3", groups, weights=weights, changes=FP8_SIZES)


def _sampled(
    check: Check,
    family: str,
    groups: ModelParallelGroups,
    *,
    weights: Literal["trained", "fp8", "fp8-emulated"] = "trained",
    changes: Mapping[str, int] | None = None,
) -> None:
    """A first load and two reloads, each with other weights."""
    dtype, kv_gib = working_dtype(), 2.0 if use_cuda() else 0.0625
    config = config_of(family, **(changes or {}))
    folder = check.folder / f"{family}-{weights}"
    config.save_pretrained(folder)
    role = RoleConfig(init="-", dtype=dtype, max_tokens_per_microbatch=512)
    actor = MegatronEngine("actor", role, config, groups, seed=0, trainable=False)
    settings = RolloutConfig(
        dtype=dtype,
        weights=weights,
        kv_cache_gib=kv_gib,
        max_num_seqs=32,
        max_num_batched_tokens=256,
        temperature=1.0,
        top_p=1.0,
    )
    bound = BOUNDS[dtype] if weights == "trained" else FP8_BOUND
    with _filled(check, kv_gib):
        rollout = RolloutEngine(folder, settings, max_model_len=LENGTH, seed=0, stop_token_ids=[])
        for version in range(VERSIONS):
            tensors = random_tensors(config, version)
            load_hf_weights(actor.models, config, "actor", actor.groups, tensors.__getitem__)
            rollout.update_weights(actor.weight_source(), version)
            difference = _difference(actor, rollout, version)
            kind = dtype if weights == "trained" else f"{dtype}, {weights}"
            what = f"{family}, {kind}, weights {version}: difference of log-probabilities"
            check.figure(f"{what}, mean", float(difference.mean()), target=f"<= {bound}")
            check.figure(f"{what}, largest", float(difference.max()))
        rollout.close()


def _difference(actor: MegatronEngine, rollout: RolloutEngine, version: int) -> torch.Tensor:
    """``[tokens]`` |log p of vLLM - log p of the trainer| of sampled responses."""
    prompts = [[5 + i, 6, 7 + i] for i in range(PROMPTS)]
    requests = [GenerationRequest(prompt, 100 * i, SAMPLES, TOKENS) for i, prompt in enumerate(prompts)]
    found = rollout.generate(requests, version)
    rows = Sequences.of([prompt for prompt in prompts for _ in range(SAMPLES)], [r.token_ids for r in found])
    theirs = torch.tensor([log_prob for response in found for log_prob in response.log_probs])
    return (actor.forward(rows)["log_probs"].values - theirs).abs()


@contextmanager
def _filled(check: Check, kv_gib: float) -> Iterator[None]:
    """All of the card but the KV cache and ``LEFT`` is held for the block; nothing on the CPU."""
    if not use_cuda():
        check.note("memory of a trainer beside vLLM: there is no card to fill")
        yield
        return
    free, total = torch.cuda.mem_get_info()
    held = torch.zeros(int(free - kv_gib * 2**30 - LEFT * total), dtype=torch.uint8, device=device())
    check.figure("held beside vLLM", held.nbytes / 2**30, "GiB")
    try:
        yield
    finally:
        del held
        gc.collect()
        torch.cuda.empty_cache()
