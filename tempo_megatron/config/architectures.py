"""The model families that are supported: the one list, readable without torch.

Adding a family is writing its module under ``tempo_megatron/model/families`` and naming it here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What layouts and folders ask of a family without loading it.

    Attributes:
        module: its module in ``tempo_megatron.model.families``.
        experts: every MLP is a mixture of experts.
        projection_norm: k is normalised over all its heads at once, which heads copied to more ranks could not follow.
    """

    module: str
    experts: bool = False
    projection_norm: bool = False


#: Policy class in ``architectures`` of config.json -> family.
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "Olmo3ForCausalLM": Architecture("olmo3", projection_norm=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", experts=True),
}

#: The same backbones with a score head: a critic (one label per token), and a reward model (one label per text).
TOKEN_CLASSIFIER, TEXT_CLASSIFIER = "ForTokenClassification", "ForSequenceClassification"

#: OpenRLHF saves the names of its own classes; with the head ``score`` they are text classifiers.
OPENRLHF_CRITICS = ("CriticModel", "RewardModel")


def is_critic(architecture: str) -> bool:
    """Whether transformers' class of this name has a score head instead of an output layer."""
    return architecture.endswith((TOKEN_CLASSIFIER, TEXT_CLASSIFIER))


def policy_name(architecture: str) -> str:
    """The policy class with the backbone of this class: Qwen3ForTokenClassification -> Qwen3ForCausalLM."""
    for ending in (TOKEN_CLASSIFIER, TEXT_CLASSIFIER):
        if architecture.endswith(ending):
            return architecture.removesuffix(ending) + "ForCausalLM"
    return architecture
