"""One module per model family, each with a ``FAMILY``; their list is ``config.architectures``."""

from __future__ import annotations

from importlib import import_module

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tempo_megatron.config.architectures import ARCHITECTURES, policy_name
from tempo_megatron.errors import TempoError
from tempo_megatron.model.families.base import Family

FAMILIES: dict[str, Family] = {
    name: import_module(f"{__name__}.{listed.module}").FAMILY for name, listed in ARCHITECTURES.items()
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of an HF config.

    Raises:
        TempoError: an architecture that is not supported (with the list of those that are) or that the config's
            model_type does not go with, or a feature that would be loaded only approximately.
    """
    names = getattr(config, "architectures", None) or []
    name = policy_name(names[0]) if len(names) == 1 else None
    if name not in FAMILIES:
        raise TempoError(f"architectures: {names} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if expected != name:
        raise TempoError(f"architectures: {names} does not go with model_type: {config.model_type}, that of {expected}")
    FAMILIES[name].check(config)
    return FAMILIES[name]
