"""One file per model family; adding a family is writing that file and naming it here."""

from __future__ import annotations

from transformers import PretrainedConfig

from tempo_megatron.errors import TempoError
from tempo_megatron.model.families import llama, olmo3, qwen3, qwen3_moe
from tempo_megatron.model.families.base import Family

FAMILIES: dict[str, Family] = {f.architecture: f for f in (qwen3.FAMILY, qwen3_moe.FAMILY, olmo3.FAMILY, llama.FAMILY)}


def family_of(config: PretrainedConfig) -> Family:
    """The family of an HF config; TempoError with the list of supported ones otherwise."""
    names = getattr(config, "architectures", None) or []
    # critics saved by AutoModelForTokenClassification are the same backbone with a `score` head
    causal = [n.replace("ForTokenClassification", "ForCausalLM") for n in names]
    for name in causal:
        if name in FAMILIES:
            FAMILIES[name].check(config)
            return FAMILIES[name]
    raise TempoError(f"architectures: {names} is not supported; supported: {', '.join(sorted(FAMILIES))}")
