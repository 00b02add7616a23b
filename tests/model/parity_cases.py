"""The cases of the parity table: families, roles and layouts, and the part of them that ``make test`` runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tempo_megatron.config.schema import ParallelConfig

RANKS = (1, 2, 4)
ROLES = ("actor", "critic")
#: Words of a layout's name that end with a number.
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
}
#: Words that change the model.
MODEL_SIZES = {
    "layers": "num_hidden_layers",
    "kv": "num_key_value_heads",
    "dim": "head_dim",
    "vocab": "vocab_size",
    "length": "max_position_embeddings",
    "window": "sliding_window",
}
#: Layouts per world size; data parallelism is what remains.  "distopt": the distributed optimizer.
LAYOUTS = {
    1: ["", "distopt"],
    2: [
        "",
        "distopt",
        "tp2",
        "tp2 sp",
        "pp2",
        "pp2 vpp2",
        "cp2",
        "ep2",
        "ep2 distopt",
        "tp2 sp ep2",
        "tp2 sp etp2",
        "cp2 ep2",
        "pp2 layers5",
        "pp2 first1",
        "pp2 vpp2 layers7",
        "tp2 kv1",
        "tp2 sp kv1",
        "tp2 sp ep2 kv1",
    ],
    4: [
        "distopt",
        "tp4 sp",
        "pp4",
        "cp4",
        "tp2 sp",
        "tp2 distopt",
        "pp2 distopt",
        "pp2 vpp2",
        "cp2",
        "tp2 pp2",
        "tp2 pp2 sp distopt",
        "tp2 pp2 vpp2 sp",
        "tp2 cp2",
        "tp2 cp2 sp distopt",
        "pp2 cp2",
        "pp2 vpp2 cp2 distopt",
        "ep4",
        "ep2",
        "ep2 distopt",
        "tp2 sp ep2 etp2",
        "tp2 sp ep2",
        "pp2 ep2 distopt",
        "pp2 vpp2 ep2",
        "cp2 ep2",
        "pp4 layers6 distopt",
        "pp4 first2 last1 layers6",
        "pp2 vpp2 last2 layers6 distopt",
        "pp2 cp2 layers5",
        "pp2 ep2 layers5",
        "tp4 kv2",
        "tp4 sp kv2 distopt",
        "tp4 sp kv1",
        "tp2 cp2 sp kv1 distopt",
        "tp2 pp2 vpp2 sp kv1 layers5 distopt",
    ],
}
_WORDS_LEFT_OUT = ["cp4", "tp2 sp ep2 etp2", "pp4 first2 last1 layers6"]
#: How many cases of a layout ``make test`` runs, and of which layouts, by world size; ``make parity`` and ``.ci/run``
#: run all of all.
ROTATED = {1: (5, LAYOUTS[1]), 2: (1, LAYOUTS[2]), 4: (1, [*LAYOUTS[4][::2], *_WORDS_LEFT_OUT])}

#: Attention heads of every model.
HEADS = 8
_COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "vocab_size": 37,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_ROPE = {"rope_theta": 100.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **_ROPE}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    **_ROPE,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_OLMO_ROPES = {"sliding_attention": {"rope_type": "default", **_ROPE}, "full_attention": _YARN}
#: As Qwen2.5 is published: a window that is switched off.
_NO_WINDOW = {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 2}

#: Column of the table -> class of its config and what it is made with.
FAMILIES: dict[str, tuple[type[hf.PretrainedConfig], dict[str, Any]]] = {
    "qwen3": (hf.Qwen3Config, {"tie_word_embeddings": False, "rope_parameters": _YARN}),
    "llama-tied": (hf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama": (hf.LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": _LLAMA3}),
    "qwen2": (hf.Qwen2Config, {**_NO_WINDOW, "tie_word_embeddings": False, "rope_parameters": _YARN}),
    "qwen2-tied": (hf.Qwen2Config, {**_NO_WINDOW, "tie_word_embeddings": True}),
    "olmo3": (hf.Olmo3Config, {"sliding_window": 4, "rope_parameters": _OLMO_ROPES}),
    "qwen3-moe": (hf.Qwen3MoeConfig, {**_EXPERTS, "tie_word_embeddings": False}),
}


@cache
def config_of(family: str, **changes: int) -> hf.PretrainedConfig:
    """Four layers, grouped-query attention, head_dim other than hidden / heads, an odd vocabulary; but for changes."""
    config_class, own = FAMILIES[family]
    architecture = config_class.__name__.replace("Config", "ForCausalLM")
    return config_class(**{**_COMMON, **own, **changes}, architectures=[architecture])


@torch.no_grad()
def off_constants(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Moves every parameter that transformers starts at a constant: a misplaced bias of zero would go unnoticed."""
    for parameter in model.parameters():
        if is_constant(parameter):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def largest(numbers: Iterable[float]) -> float:
    """NaN if one of them is, which Python's max may pass over."""
    return torch.tensor(list(numbers), dtype=torch.float64).max().item()


@dataclass(frozen=True)
class Layout:
    """A layout by name: words of ``SIZES`` and ``MODEL_SIZES`` with their numbers, ``sp`` and ``distopt``."""

    name: str

    @cached_property
    def words(self) -> dict[str, int | None]:
        """Each word and its number, e.g. {"tp": 2, "sp": None}; ValueError naming one that is unknown."""
        found: dict[str, int | None] = {}
        for word in self.name.split():
            match = re.fullmatch(r"(sp|distopt)|([a-z]+)([1-9]\d*)", word)
            if match is None or not (match[1] or match[2] in SIZES | MODEL_SIZES):
                known = ", ".join(["sp", "distopt", *(f"{word}N" for word in SIZES | MODEL_SIZES)])
                raise ValueError(f"layout {self.name!r}: {word!r} is none of {known}")
            found[match[1] or match[2]] = int(match[3]) if match[3] else None
        return found

    @property
    def parallel(self) -> ParallelConfig:
        sizes = {SIZES[word]: size for word, size in self.words.items() if word in SIZES}
        return ParallelConfig(**sizes, sequence_parallel="sp" in self.words)

    @property
    def model_changes(self) -> dict[str, int]:
        """What ``config_of`` is asked for."""
        return {MODEL_SIZES[word]: size for word, size in self.words.items() if word in MODEL_SIZES and size}

    @property
    def distributed(self) -> bool:
        return "distopt" in self.words

    @property
    def shown(self) -> str:
        """The name without the word that has a column of its own."""
        return " ".join(word for word in self.name.split() if word != "distopt")

    def fits(self, family: str) -> bool:
        """Experts need experts, and Megatron trains them under tensor parallelism with sequence parallelism only.

        OLMo-3 has a norm over all heads of k, which copies of them could not follow.
        """
        if family == "olmo3" and (self.words.get("tp") or 1) > (self.words.get("kv") or _COMMON["num_key_value_heads"]):
            return False
        if family == "qwen3-moe":
            return "tp" not in self.words or "sp" in self.words
        return "ep" not in self.words and "etp" not in self.words


@dataclass(frozen=True)
class ParityCase:
    """One model of a role in one layout on ``ranks`` ranks."""

    ranks: int
    layout: str
    family: str
    role: str


def all_cases() -> Iterator[ParityCase]:
    """Of the table, in its order."""
    for ranks in RANKS:
        for layout in LAYOUTS[ranks]:
            yield from _cases(ranks, layout)


def rotation() -> Iterator[ParityCase]:
    """Some cases of the layouts of ``ROTATED``, so chosen that families and roles take turns."""
    used: Counter[tuple[str, str]] = Counter()
    for ranks, (many, layouts) in ROTATED.items():
        for layout in layouts:
            in_turn = sorted(_cases(ranks, layout), key=lambda case: used[case.family, case.role])
            for case in in_turn[:many]:
                used[case.family, case.role] += 1
                yield case


def _cases(ranks: int, layout: str) -> list[ParityCase]:
    return [
        ParityCase(ranks, layout, family, role) for family in FAMILIES for role in ROLES if Layout(layout).fits(family)
    ]
