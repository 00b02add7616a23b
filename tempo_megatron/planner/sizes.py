"""The numbers of a model's ``config.json`` that memory and work follow from. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_megatron.config.architectures import ARCHITECTURES, policy_name
from tempo_megatron.config.layout import read_model_shape

#: Families whose every q and k head has a norm of its own, and those with biases on q, k and v.
_HEAD_NORM = ("qwen3", "qwen3_moe")
_QKV_BIAS = ("qwen2",)
#: Norms on the outputs of attention and MLP.
_POST_NORM = ("olmo3",)

#: Bytes of an element.
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSizes:
    """Of one model.

    ``experts``, ``experts_per_token`` and ``expert_intermediate`` are 0 in a dense model. ``windows`` has the sliding
    window of each layer, None where it attends to everything.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    tied: bool
    experts: int
    experts_per_token: int
    expert_intermediate: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ModelSizes:
        """From the contents of a ``config.json`` that ``read_model_shape`` takes, or transformers' own dictionary."""
        family = ARCHITECTURES[policy_name(values["architectures"][0])].module
        heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
        experts = values.get("num_local_experts") or values.get("num_experts") or 0
        moe = experts if ARCHITECTURES[policy_name(values["architectures"][0])].experts else 0
        return cls(
            family=family,
            hidden=values["hidden_size"],
            layers=layers,
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            intermediate=values["intermediate_size"],
            vocab=values["vocab_size"],
            max_positions=values["max_position_embeddings"],
            tied=bool(values.get("tie_word_embeddings", False)),
            experts=moe,
            experts_per_token=values["num_experts_per_tok"] if moe else 0,
            expert_intermediate=values["moe_intermediate_size"] if moe else 0,
            windows=_windows(family, values, layers),
        )

    @classmethod
    def read(cls, folder: Path, key: str, *, critic: bool = False) -> ModelSizes:
        """From ``folder/config.json``; ``key`` is the setting or option that led to it.

        Raises:
            TempoError: as ``read_model_shape``.
        """
        file = folder / "config.json"
        read_model_shape(file, key, critic=critic)
        return cls.of(json.loads(file.read_text("utf-8")))

    @property
    def head_norm(self) -> bool:
        return self.family in _HEAD_NORM

    @property
    def projection_norm(self) -> bool:
        return any(a.module == self.family and a.projection_norm for a in ARCHITECTURES.values())

    @property
    def qkv_bias(self) -> bool:
        return self.family in _QKV_BIAS

    @property
    def post_norm(self) -> bool:
        return self.family in _POST_NORM

    @property
    def q(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all keys."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Of one layer, all experts."""
        return self.attention_parameters + self.mlp_parameters(self.experts)

    @property
    def attention_parameters(self) -> int:
        """Products of q, k, v and o in one layer."""
        return 2 * self.hidden * self.q + 2 * self.hidden * self.kv

    def mlp_parameters(self, experts: int) -> int:
        """Of one layer with so many of its experts and the router; of the dense MLP where there are none."""
        if not self.experts:
            return 3 * self.hidden * self.intermediate
        return 3 * self.hidden * self.expert_intermediate * experts + self.hidden * self.experts

    @property
    def active_parameters(self) -> int:
        """Parameters of matrix products that one token goes through in all layers; no embedding, no output layer."""
        return self.layers * (self.attention_parameters + self.mlp_parameters(self.experts_per_token))


def _windows(family: str, values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if family != "olmo3":
        return (None,) * layers
    # transformers' default of a file without layer_types: every fourth attends to everything
    kinds = values.get("layer_types") or [
        "full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)
    ]
    window = values.get("sliding_window") or 4096
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
