"""Models, layouts and micro-batches whose bytes are planned and measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import transformers as hf

from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, RoleConfig
from tempo_megatron.planner.activations import ChunkRun, chunks_of_stage
from tempo_megatron.planner.layers import Pack
from tempo_megatron.planner.parameters import RoleLayout
from tempo_megatron.planner.schedule import stage_peaks
from tempo_megatron.planner.sizes import ITEMSIZE, ModelSizes
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
    """One role in one layout; ``rows``: (prompt, response) tokens of the sequences of a step."""

    ranks: int
    layout: str
    family: str
    role: str
    dtype: str
    recompute: str = "none"
    tokens: int = 1024
    overlap: bool = False
    distributed: bool = True

    @property
    def name(self) -> str:
        parts = [self.family, self.layout or "dp", self.role, self.dtype, self.recompute]
        parts += ["overlap"] * self.overlap + ["replicated"] * (not self.distributed)
        return " ".join(parts)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Two micro-batches for each data-parallel shard."""
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
            layer_spec="torch",
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


@cache
def config_of(family: str, **changes: int) -> hf.PretrainedConfig:
    config_class, own = FAMILIES[family]
    architecture = config_class.__name__.replace("Config", "ForCausalLM")
    return config_class(**{**_SHAPE, **own, **changes}, architectures=[architecture])


def planned_peaks(case: PlanCase, rank: int, imbalance: float = 1.0) -> dict[str, int]:
    """Bytes of the forward, and of forward and backward."""
    parallel = case.config.parallel
    stage = RoleLayout(parallel, case.ranks).place(rank).stage
    lengths = Counter(sum(row) for row in case.rows[:4])
    pack = Pack(case.tokens // parallel.context_parallel_size, tuple(sorted(lengths.items())), imbalance)
    chunks = [
        ChunkRun(case.sizes, case.role, case.config, "torch", chunk, pack, on_cpu=True).measure()
        for chunk in chunks_of_stage(case.sizes, case.config, stage)
    ]
    message = ITEMSIZE[case.dtype] * pack.tokens * case.sizes.hidden
    if parallel.sequence_parallel:
        message //= parallel.tensor_model_parallel_size
    peaks = stage_peaks(chunks, parallel, stage, 2 * parallel.pipeline_model_parallel_size, message)
    return {"forward": peaks.forward, "backward": peaks.backward}
