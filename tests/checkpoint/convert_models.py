"""Tiny HF folders, with tokenizer and generation config, that every layout of the converters' tests divides."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from tempo_megatron.demo.model import make_tokenizer
from tests.model.parity_cases import off_constants

FAMILIES = ("qwen3", "qwen2", "llama-tied", "olmo3", "qwen3-moe")


def config_of(family: str) -> hf.PretrainedConfig:
    """Four layers, head_dim other than hidden / heads, an odd vocabulary (padded under tensor parallelism)."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "vocab_size": 37,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    rope = {"rope_theta": 100.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **rope}
    if family == "qwen3":
        return hf.Qwen3Config(**shape, tie_word_embeddings=False)
    if family == "qwen2":
        return hf.Qwen2Config(**shape, tie_word_embeddings=False)
    if family == "llama-tied":
        return hf.LlamaConfig(**shape, tie_word_embeddings=True)
    if family == "olmo3":
        ropes = {"sliding_attention": {"rope_type": "default", **rope}, "full_attention": yarn}
        return hf.Olmo3Config(**shape, sliding_window=4, rope_parameters=ropes, tie_word_embeddings=False)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return hf.Qwen3MoeConfig(**shape, **experts, tie_word_embeddings=False)


def write_folder(folder: Path, family: str, role: str = "actor", dtype: torch.dtype = torch.float32) -> Path:
    """Random weights, norms and biases away from their initial values.

    An actor lies in shards with an index; a critic in one file, with ``score``, or with ``v_head`` for OLMo-3, of
    which transformers has no token classification class.
    """
    torch.manual_seed(3)
    config = config_of(family)
    config.num_labels = 1
    v_head = role == "critic" and family == "olmo3"
    auto = hf.AutoModelForTokenClassification if role == "critic" and not v_head else hf.AutoModelForCausalLM
    model = auto.from_config(config)
    off_constants(model)
    tensors = dict(model.to(dtype).state_dict())
    if v_head:
        tensors["v_head.summary.weight"] = torch.randn(1, config.hidden_size, dtype=dtype)
        tensors["v_head.summary.bias"] = torch.randn(1, dtype=dtype)
    model.save_pretrained(folder, state_dict=tensors, max_shard_size="30KB" if role == "actor" else "1GB")
    make_tokenizer().save_pretrained(folder)
    hf.GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=1).save_pretrained(folder)
    return folder
