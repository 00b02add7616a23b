"""The tensors of a model's HF checkpoint, by name and shape: what its family's weight rules say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from transformers import PretrainedConfig

from tempo_megatron.model.families import family_of
from tempo_megatron.model.families.base import LM_HEAD_RULES, VALUE_HEAD_RULES
from tempo_megatron.model.rope import head_dim
from tempo_megatron.model.weight_map import WeightRule

Role = Literal["actor", "critic"]

LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rules_for(config: PretrainedConfig, role: Role) -> tuple[WeightRule, ...]:
    """All rules of a model in this role. A tied actor reads its output layer from the embedding."""
    backbone = family_of(config).rules
    if role == "critic":
        return backbone + VALUE_HEAD_RULES
    return backbone if config.tie_word_embeddings else backbone + LM_HEAD_RULES


def expected_tensors(config: PretrainedConfig, role: Role) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a complete checkpoint of this role holds, experts one by one.

    A critic's head is ``score.weight`` [1, hidden] and ``score.bias`` [1].  Dtypes are the folder's own
    (``checkpoint.hf_read.DTYPES``), tensor by tensor.
    """
    sizes = tensor_sizes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules_for(config, role):
        own = rule.hf_shapes(sizes)
        for layer in range(config.num_hidden_layers) if rule.per_layer else (None,):
            for expert in range(config.num_experts) if rule.per_expert else (None,):
                shapes.update(zip(rule.hf_names(layer, expert), own, strict=True))
    return shapes


def unexpected_tensors(names: Iterable[str], config: PretrainedConfig, role: Role, *, skip_head: bool) -> set[str]:
    """Tensors that a checkpoint holds and this role has no place for.

    Not among them because other tensors or config.json determine them: rotary buffers, and the output layer of a
    model with tied embeddings.  A critic that starts from a policy leaves out its output layer.
    """
    extra = {n for n in set(names) - expected_tensors(config, role).keys() if not is_rotary_buffer(n)}
    if skip_head or config.tie_word_embeddings:
        extra.discard(LM_HEAD)
    return extra


def is_rotary_buffer(name: str) -> bool:
    """Frequencies of the rotary embedding, which older programs stored; config.json determines them."""
    return re.search(r"rotary_emb\.inv_freq$", name) is not None


def tensor_sizes(config: PretrainedConfig) -> dict[str, int]:
    """The sizes that ``WeightRule.shapes`` name."""
    head = head_dim(config)
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "head": head,
        "q": config.num_attention_heads * head,
        "kv": config.num_key_value_heads * head,
        "intermediate": config.intermediate_size,
        "experts": getattr(config, "num_experts", 0),
        "expert_intermediate": getattr(config, "moe_intermediate_size", 0),
        "value": 1,
    }
