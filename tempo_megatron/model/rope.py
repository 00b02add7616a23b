"""Rotary embeddings with exactly the frequencies that transformers computes.

Megatron's own scaled variants hard-code Llama 3.1's constants and know one rope per model.  Here every rope type
comes from ``transformers.modeling_rope_utils`` and a model may have one rope per layer type (OLMo-3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tempo_megatron.patching import replace_value

#: Rope types whose frequencies do not depend on the length of the input.
SUPPORTED_ROPES = ("default", "linear", "llama3", "yarn")


#: What scaled ropes compute with.
SCALING_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """One rope: ``inv_freq [head_dim / 2]`` float32 on the CPU, and the factor on cos and sin (YaRN's)."""

    inv_freq: Tensor
    attention_factor: float


def head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_layer_types(config: PretrainedConfig) -> list[str | None]:
    """The layer types that have a rope each, sorted; [None] where one rope serves all layers."""
    nested = [k for k, v in _parameters(config).items() if isinstance(v, dict)]
    return [*sorted(set(nested) & set(config.layer_types))] if nested else [None]


def ropes(config: PretrainedConfig) -> list[Rope]:
    """The model's ropes, in the order of ``rope_layer_types``."""
    return [_rope(config, layer_type) for layer_type in rope_layer_types(config)]


def rope_of_layer(config: PretrainedConfig, layer: int) -> int:
    """Position in ``ropes`` of the rope of (0-based) layer ``layer``."""
    types = rope_layer_types(config)
    return types.index(config.layer_types[layer]) if len(types) > 1 else 0


def refuse_rope(config: PretrainedConfig) -> str | None:
    """Why this config's rope is not supported, or None."""
    partial = getattr(config, "partial_rotary_factor", None)  # beside the ropes transformers reads it in some families
    for layer_type in rope_layer_types(config):
        parameters = _parameters(config, layer_type)
        kind = parameters.get("rope_type", "default")
        if kind not in SUPPORTED_ROPES:
            return f"rope_type: {kind} is not supported (only {', '.join(SUPPORTED_ROPES)})"
        if parameters.get("type", kind) != kind:  # the older key, which transformers overlooks in ropes by layer type
            return f"rope type: {parameters['type']} is not supported beside rope_type: {kind} (only rope_type is)"
        factor = parameters.get("partial_rotary_factor", partial)
        if factor not in (None, 1.0):
            return f"partial_rotary_factor: {factor} is not supported (only 1.0)"
        if reason := _refuse_scaling(config, parameters):
            return reason
        theta = parameters.get("rope_theta")
        if not isinstance(theta, int | float):
            return f"rope_theta: {'null' if theta is None else repr(theta)} is not supported (a number is needed)"
    return None


def _refuse_scaling(config: PretrainedConfig, parameters: dict[str, Any]) -> str | None:
    kind = parameters.get("rope_type", "default")
    for key in SCALING_NUMBERS.get(kind, ()):
        value = parameters.get(key)
        if not isinstance(value, int | float) or value <= 0:
            told = "null" if value is None else repr(value)
            return f"{key}: {told} is not supported (rope_type {kind} needs a number above 0)"
    if kind == "yarn":
        end = int(parameters["factor"] * parameters["original_max_position_embeddings"])
        if config.max_position_embeddings > end:
            return (
                f"max_position_embeddings: {config.max_position_embeddings} is beyond YaRN's factor "
                f"{parameters['factor']:g} x original_max_position_embeddings "
                f"{parameters['original_max_position_embeddings']:g} = {end}, where vLLM's table of positions ends"
            )
    return None


def _parameters(config: PretrainedConfig, layer_type: str | None = None) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5: rope_type, rope_theta, factor, ..., perhaps by layer type."""
    every = dict(getattr(config, "rope_parameters", None) or {})
    return dict(every[layer_type]) if layer_type else every


def _rope(config: PretrainedConfig, layer_type: str | None) -> Rope:
    parameters = _parameters(config, layer_type)
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        with torch.device("cpu"):  # also where a model is built on the meta device: these are numbers, not weights
            inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
        return Rope(inv_freq.float(), float(factor))
    exponents = torch.arange(0, head_dim(config), 2, dtype=torch.float32, device="cpu") / head_dim(config)
    return Rope(1.0 / parameters["rope_theta"] ** exponents, 1.0)


class ModelRope(torch.nn.Module):
    """In place of ``GPTModel.rotary_pos_emb``: angles of the model's one rope, or of all of them stacked."""

    def __init__(self, config: PretrainedConfig, cp_group: Any) -> None:
        super().__init__()
        self.embeddings: list[RotaryEmbedding] = []
        for rope in ropes(config):
            embedding = RotaryEmbedding(head_dim(config), 1.0, use_cpu_initialization=True, cp_group=cp_group)
            replace_value(embedding, "inv_freq", rope.inv_freq, Tensor)  # moves to the device at its first use
            self.embeddings.append(embedding)
        self.get_rotary_seq_len = self.embeddings[0].get_rotary_seq_len

    def forward(self, max_seq_len: int, **kwargs: Any) -> Tensor:
        """``[max_seq_len, 1, 1, head_dim]`` float32, or ``[ropes, max_seq_len, 1, 1, head_dim]`` if several."""
        angles = [embedding(max_seq_len, **kwargs) for embedding in self.embeddings]
        return angles[0] if len(angles) == 1 else torch.stack(angles)
