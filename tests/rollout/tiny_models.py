"""Tiny random HF models in folders, engines for them, and what HF says about a response."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.reshard.holdings import WeightSource, whole_tensors
from tempo_megatron.rollout.engine import RolloutEngine

VOCAB_SIZE = 96
MAX_MODEL_LEN = 192
STOP_TOKEN_IDS = (0, 1, 2, 3)

#: Temperature and top-p of each model's engine.
SAMPLING = {
    "qwen3": (1.0, 1.0),
    "qwen2": (1.0, 1.0),
    "tied_llama": (0.7, 0.9),
    "qwen3_moe": (1.0, 1.0),
    "olmo3": (1.0, 1.0),
}

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "eos_token_id": 1,
}


@dataclass
class TinyModel:
    """A random HF model, the folder with its config, and other weights for the same config."""

    folder: Path
    first: PreTrainedModel
    second: PreTrainedModel


def stream(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model's HF checkpoint under their names there, each made at the moment it is asked for."""
    for name, parameter in model.named_parameters():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":  # [experts, 2 * width, hidden]
            for expert, (gate, up) in enumerate(pair.chunk(2) for pair in parameter.detach()):
                yield f"{prefix}.{expert}.gate_proj.weight", gate.clone()
                yield f"{prefix}.{expert}.up_proj.weight", up.clone()
        elif last == "down_proj":
            for expert, down in enumerate(parameter.detach()):
                yield f"{prefix}.{expert}.down_proj.weight", down.clone()
        else:
            yield name, parameter.detach().clone()


def source(model: PreTrainedModel) -> WeightSource:
    """The same, as a trainer whose every rank has all of it."""
    return whole_tensors(dict(stream(model)), dist.get_world_size())


@torch.no_grad()
def reference_log_probs(
    model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float, top_p: float
) -> list[float]:
    """log p of each response token by HF, after temperature and top-p as vLLM defines them (smallest set >= p)."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float() / temperature
    probs, order = logits.softmax(-1).sort(descending=True)
    outside = probs.cumsum(-1) - probs >= top_p
    logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()


def random_prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def tiny(folder: Path, make: Callable[[], PreTrainedModel]) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = make().eval()
        second = make().eval()
        for model in (first, second):
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms start at one and biases at zero, where a misplaced one goes unnoticed
                    parameter.uniform_(0.5, 1.5)
    first.save_pretrained(folder)
    return TinyModel(folder, first, second)


def tiny_qwen3(folder: Path) -> TinyModel:
    config = Qwen3Config(**_SHAPE, tie_word_embeddings=False)
    return tiny(folder, lambda: Qwen3ForCausalLM(config))


def tiny_qwen2(folder: Path) -> TinyModel:
    """Tied, as the small ones are published; the window is switched off."""
    shape = _SHAPE | {"num_key_value_heads": 1, "sliding_window": 16, "use_sliding_window": False}
    config = Qwen2Config(**shape, max_window_layers=1, tie_word_embeddings=True)
    return tiny(folder, lambda: Qwen2ForCausalLM(config))


def tiny_tied_llama(folder: Path) -> TinyModel:
    config = LlamaConfig(**_SHAPE, tie_word_embeddings=True)
    return tiny(folder, lambda: LlamaForCausalLM(config))


def tiny_qwen3_moe(folder: Path) -> TinyModel:
    """Experts whose width is not the multiple of 32 that the CPU kernel wants."""
    config = Qwen3MoeConfig(
        **_SHAPE
        | {"num_hidden_layers": 3, "num_attention_heads": 4}
        | {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 48},
        tie_word_embeddings=True,
    )
    return tiny(folder, lambda: Qwen3MoeForCausalLM(config))


#: Far below MAX_MODEL_LEN, so that most positions lie beyond them.
OLMO3_WINDOW, OLMO3_ORIGINAL_POSITIONS = 16, 32


def tiny_olmo3(folder: Path) -> TinyModel:
    """Three layers with a sliding window, then one with full attention and YaRN; config.json as in published models."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": OLMO3_ORIGINAL_POSITIONS}
    yarn |= {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2079441541679836}
    shape = _SHAPE | {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"sliding_window": OLMO3_WINDOW, "tie_word_embeddings": False}
    del shape["head_dim"]
    config = Olmo3Config(**shape, rope_scaling=yarn, rope_theta=500000.0)
    made = tiny(folder, lambda: Olmo3ForCausalLM(config))
    published = config.to_dict() | {"rope_scaling": yarn, "rope_theta": 500000.0}
    del published["rope_parameters"]  # transformers 5's own form, which save_pretrained has written
    (folder / "config.json").write_text(json.dumps(published))
    return made


def build(folder: Path, **changes: object) -> RolloutEngine:
    settings = {"dtype": "float32", "kv_cache_gib": 0.0625, "max_num_seqs": 64, "max_num_batched_tokens": 1024}
    config = RolloutConfig(**(settings | changes))
    return RolloutEngine(folder, config, max_model_len=MAX_MODEL_LEN, seed=0, stop_token_ids=STOP_TOKEN_IDS)


class Engines:
    """One engine is open at a time, as in a run: vLLM's process groups fit the model they were made for."""

    def __init__(self, tiny_model: Callable[[str], TinyModel]) -> None:
        self._tiny_model = tiny_model
        self._open: tuple[str, RolloutEngine] | None = None

    def of(self, family: str) -> RolloutEngine:
        """The engine of the tiny model of this fixture name; it samples with ``SAMPLING``."""
        if self._open is None or self._open[0] != family:
            self.close()
            temperature, top_p = SAMPLING[family]
            engine = build(self._tiny_model(family).folder, temperature=temperature, top_p=top_p)
            self._open = family, engine
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
