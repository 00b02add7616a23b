"""Models, layouts and micro-batches whose bytes are planned and measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import transformers as hf

from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, RoleConfig
from tempo_megatron.planner.peaks import Load, RolePeaks
from tempo_megatron.planner.sizes import ModelSizes
from tests.model.parity_cases import Layout

#: Wide enough for activations, and not weights, to be what a peak is made of.
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "vocab_size": 509,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_ROPES = {kind: {"rope_type": "default", "rope_theta": 100.0} for kind in ("sliding_attention", "full_attention")}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[type[hf.PretrainedConfig], dict[str, Any]]] = {
    "qwen3": (hf.Qwen3Config, {"tie_word_embeddings": False}),
    "qwen2-tied": (hf.Qwen2Config, {"tie_word_embeddings": True, "use_sliding_window": False}),
    "llama": (hf.LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (hf.LlamaConfig, {"tie_word_embeddings": True}),
    "olmo3": (hf.Olmo3Config, {"sliding_window": 64, "rope_parameters": _ROPES, "tie_word_embeddings": False}),
    "qwen3-moe": (hf.Qwen3MoeConfig, {**_EXPERTS, "tie_word_embeddings": False}),
}


@dataclass(frozen=True)
class PlanCase:
    """One role's engine on ``ranks`` ranks; ``layout`` as in ``tests.model.parity_cases``."""

    ranks: int
    layout: str
    family: str
    role: str
    dtype: str
    recompute: str = "none"
    tokens: int = 1024
    overlap: bool = False
    rotated: bool = False
    distributed: bool = True
    spec: Literal["torch", "te"] = "torch"

    @property
    def name(self) -> str:
        parts = [self.family, self.layout or "dp", self.role, self.dtype, self.recompute]
        parts += ["overlap"] * self.overlap + ["replicated"] * (not self.distributed)
        return " ".join(parts)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(prompt, response) tokens: for each shard two micro-batches of four sequences, twice the stages of them."""
        parallel = Layout(self.layout).parallel
        shards = self.ranks // parallel.model_parallel_size
        packs = 2 * parallel.pipeline_model_parallel_size
        return [(8, self.tokens // 4 - 8)] * (4 * shards * packs)

    @property
    def config(self) -> RoleConfig:
        kind = CriticConfig if self.role == "critic" else RoleConfig
        return kind(
            init="-",
            dtype=self.dtype,
            layer_spec=self.spec,
            parallel=Layout(self.layout).parallel,
            recompute=self.recompute,
            max_tokens_per_microbatch=self.tokens,
            optimizer=OptimizerConfig(lr=1e-3, distributed=self.distributed, overlap_grad_reduce=self.overlap),
        )

    @property
    def hf_config(self) -> hf.PretrainedConfig:
        return config_of(self.family, **Layout(self.layout).model_changes)

    @property
    def sizes(self) -> ModelSizes:
        return ModelSizes.of(self.hf_config.to_dict())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


#: Engines and activations: every layout, family, role, dtype and level of recomputation in some company.  `make test`
#: runs those that are `rotated`, `make plan-errors` all.
CASES = [
    PlanCase(1, "", "qwen3", "actor", "float32"),
    PlanCase(1, "", "qwen3", "critic", "bfloat16", "full", rotated=True),
    PlanCase(1, "", "llama-tied", "actor", "bfloat16", "selective"),
    PlanCase(1, "", "olmo3", "actor", "bfloat16", rotated=True),
    PlanCase(1, "", "qwen2-tied", "actor", "float32", "full"),
    PlanCase(1, "", "qwen3-moe", "actor", "float32"),
    PlanCase(1, "", "qwen3-moe", "critic", "bfloat16", "full", rotated=True),
    PlanCase(2, "", "qwen3", "critic", "bfloat16", rotated=True),
    PlanCase(2, "tp2", "llama", "actor", "float32", distributed=False, rotated=True),
    PlanCase(2, "tp2 sp", "olmo3", "critic", "float32"),
    PlanCase(2, "tp2 kv1", "qwen3", "actor", "float32"),
    PlanCase(2, "pp2", "llama-tied", "actor", "bfloat16", rotated=True),
    PlanCase(2, "pp2 layers5", "qwen3", "critic", "float32", "selective"),
    PlanCase(2, "pp2 vpp2", "qwen2-tied", "actor", "bfloat16", "full", overlap=True, rotated=True),
    PlanCase(2, "cp2", "qwen3", "actor", "bfloat16", rotated=True),
    PlanCase(2, "ep2", "qwen3-moe", "actor", "float32"),
    PlanCase(2, "tp2 sp ep2", "qwen3-moe", "actor", "bfloat16", "selective", rotated=True),
    PlanCase(2, "tp2 sp etp2", "qwen3-moe", "critic", "bfloat16"),
    PlanCase(4, "tp2 pp2 sp", "qwen3", "actor", "bfloat16", rotated=True),
    PlanCase(4, "tp2 cp2 sp", "llama", "critic", "bfloat16", "full"),
    PlanCase(4, "pp2 vpp2", "llama-tied", "actor", "float32"),
    PlanCase(4, "pp2 ep2", "qwen3-moe", "actor", "bfloat16"),
]

#: Tokens of the longest sequence of the replicas that are measured.
LONGEST = 64


@dataclass(frozen=True)
class RolloutCase:
    """Replicas of ``size`` ranks that get the weights of a trainer in ``layout``, on two ranks."""

    family: str
    size: int
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.family} {self.dtype}, {self.layout or 'dp'} to tp{self.size}"

    @property
    def config(self) -> RolloutConfig:
        return RolloutConfig(
            dtype=self.dtype,
            kv_cache_gib=0.0071,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            tensor_parallel_size=self.size,
            bucket_mib=1,
        )


#: Those of one engine stand together (families of ``tests.rollout.update_cases``).
ROLLOUT_CASES = [
    RolloutCase("qwen3", 1, "float32", ""),
    RolloutCase("qwen3", 1, "float32", "tp2 sp"),
    RolloutCase("qwen3", 1, "float32", "pp2"),
    RolloutCase("llama-tied", 2, "bfloat16", "tp2"),
    RolloutCase("llama-tied", 2, "bfloat16", "pp2 vpp2"),
    RolloutCase("llama-tied", 2, "bfloat16", "cp2"),
    RolloutCase("qwen3-moe", 1, "float32", "ep2"),
    RolloutCase("olmo3", 2, "float32", "tp2 sp"),
]


@cache
def config_of(family: str, **changes: int) -> hf.PretrainedConfig:
    config_class, own = FAMILIES[family]
    architecture = config_class.__name__.replace("Config", "ForCausalLM")
    return config_class(**{**_SHAPE, **own, **changes}, architectures=[architecture])


def planned_peaks(case: PlanCase, stage: int, routed: int = 0, *, on_cpu: bool = True) -> dict[str, int]:
    """Bytes of the forward, and of forward and backward, of a rank of a pipeline stage.

    Args:
        routed: tokens of a micro-batch that come to the rank's experts; 0: an even share.
    """
    parallel, sizes = case.config.parallel, case.sizes
    lengths = Counter(sum(row) for row in case.rows[:4])
    own = case.tokens // parallel.context_parallel_size
    if parallel.sequence_parallel:
        own //= parallel.tensor_model_parallel_size
    even = own * sizes.experts_per_token * parallel.expert_tensor_parallel_size
    load = Load(
        longest=max(lengths),
        microbatches=2 * parallel.pipeline_model_parallel_size,
        imbalance=routed / even if routed else 1.0,
    )
    peaks = RolePeaks(sizes, case.role, case.config, case.spec, on_cpu=on_cpu).of_stage(stage, load)
    return {"forward": peaks.forward, "backward": peaks.backward}
