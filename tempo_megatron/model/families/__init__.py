"""One file per model family; adding a family is writing that file and naming it here."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tempo_megatron.errors import TempoError
from tempo_megatron.model.families import llama, olmo3, qwen3, qwen3_moe
from tempo_megatron.model.families.base import Family

FAMILIES: dict[str, Family] = {f.architecture: f for f in (qwen3.FAMILY, qwen3_moe.FAMILY, olmo3.FAMILY, llama.FAMILY)}


def family_of(config: PretrainedConfig) -> Family:
    """The family of an HF config.

    Raises:
        TempoError: an architecture that is not supported (with the list of those that are) or that the config's
            model_type does not go with, or a feature that would be loaded only approximately.
    """
    names = getattr(config, "architectures", None) or []
    # critics saved by AutoModelForTokenClassification are the same backbone with a `score` head
    name = names[0].replace("ForTokenClassification", "ForCausalLM") if len(names) == 1 else None
    if name not in FAMILIES:
        raise TempoError(f"architectures: {names} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if expected != name:
        raise TempoError(f"architectures: {names} does not go with model_type: {config.model_type}, that of {expected}")
    FAMILIES[name].check(config)
    return FAMILIES[name]
