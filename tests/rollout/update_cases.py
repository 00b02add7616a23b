"""Pairs of layouts, trainer and rollout, and models for them that vLLM runs on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tempo_megatron.model.hf_tensors import expected_tensors
from tests.model.parity_cases import Layout

RANKS = 4
#: (trainer's layout, tensor-parallel size of the rollout); data parallelism is what remains.
DENSE = [
    ("", 1),
    ("", 4),
    ("tp2 sp", 2),
    ("tp2", 4),
    ("tp4 sp", 1),
    ("tp4 sp distopt", 2),
    ("pp2", 2),
    ("pp4", 1),
    ("cp4", 2),
    ("tp2 cp2", 4),
    ("tp2 pp2", 2),
    ("tp2 pp2 vpp2 sp distopt", 1),
    ("pp2 vpp2 cp2", 4),
    ("pp4 first2 last1 layers6", 2),
    ("pp2 layers5", 4),
    ("tp4 kv4", 2),
    ("tp2 pp2 kv1", 4),
]
EXPERTS = [
    ("", 1),
    ("", 4),
    ("ep4", 1),
    ("ep4", 2),
    ("ep2", 4),
    ("ep2 distopt", 2),
    ("cp2 ep2", 2),
    ("pp2 ep2", 4),
    ("pp2 vpp2 ep2", 2),
    ("pp2 ep2 layers5", 1),
    ("tp2 sp ep2", 2),
    ("tp2 sp ep2", 4),
    ("tp2 sp etp2", 1),
    ("tp2 sp ep2 etp2", 2),
    ("tp2 pp2 sp kv1", 4),
    ("tp4 sp ep4", 2),
]
_SHAPE = {
    "vocab_size": 90,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_NO_WINDOW = {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 2}
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 100.0},
}
FAMILIES: dict[str, tuple[type[hf.PretrainedConfig], dict[str, Any]]] = {
    "qwen3": (hf.Qwen3Config, {"tie_word_embeddings": False}),
    "llama": (hf.LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (hf.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (hf.Qwen2Config, {**_NO_WINDOW, "tie_word_embeddings": False}),
    "qwen2-tied": (hf.Qwen2Config, {**_NO_WINDOW, "tie_word_embeddings": True}),
    "olmo3": (
        hf.Olmo3Config,
        {"sliding_window": 4, "rope_parameters": _ROPES, "tie_word_embeddings": False, "num_key_value_heads": 4},
    ),
    "qwen3-moe": (
        hf.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "tie_word_embeddings": True},
    ),
}


@dataclass(frozen=True)
class UpdateCase:
    """A model's trainer in ``layout`` and replicas of ``rollout`` ranks; with ``experts`` these deal whole experts."""

    family: str
    layout: str
    rollout: int
    experts: bool = False


def all_cases() -> Iterator[UpdateCase]:
    for family in FAMILIES:
        pairs = EXPERTS if family == "qwen3-moe" else DENSE
        for layout, rollout in pairs:
            if _fits(family, layout, rollout):
                yield UpdateCase(family, layout, rollout)
    for layout, rollout in (("ep4", 2), ("tp2 sp ep2", 2), ("tp2 pp2 sp", 4), ("ep2", 4)):
        yield UpdateCase("qwen3-moe", layout, rollout, experts=True)


#: Those of ``make test``: every kind of cut, every size of a replica, and few engines, for one takes longer to build
#: than updates are checked.
ROTATION = [
    UpdateCase("qwen2-tied", "", 1),
    UpdateCase("qwen2-tied", "tp4 sp", 1),
    UpdateCase("olmo3", "tp2 sp", 2),
    UpdateCase("olmo3", "cp4", 2),
    UpdateCase("olmo3", "tp2 pp2", 2),
    UpdateCase("llama-tied", "pp2 vpp2 cp2", 4),
    UpdateCase("llama-tied", "tp2 pp2 kv1", 4),
    UpdateCase("qwen3-moe", "pp2 vpp2 ep2", 2),
    UpdateCase("qwen3-moe", "tp2 sp ep2 etp2", 2),
    UpdateCase("qwen3-moe", "ep4", 2, experts=True),
]


def _fits(family: str, layout: str, rollout: int) -> bool:
    """OLMo-3 has a norm over all heads of k, which copies of them could not follow."""
    kv = Layout(layout).model_changes.get("num_key_value_heads", 4)
    return family != "olmo3" or max(rollout, Layout(layout).parallel.tensor_model_parallel_size) <= kv


@cache
def config_of(family: str, **changes: int) -> hf.PretrainedConfig:
    config_class, own = FAMILIES[family]
    architecture = config_class.__name__.replace("Config", "ForCausalLM")
    return config_class(**{**_SHAPE, **own, **changes}, architectures=[architecture])


def random_tensors(config: hf.PretrainedConfig, seed: int) -> dict[str, Tensor]:
    """Of a whole model, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in expected_tensors(config, "actor").items():
        values = torch.randn(shape, generator=generator) * 0.1
        found[name] = values + 1 if name.endswith("norm.weight") else values
    return found
