"""Tiny random HF models in folders, engines for them, and what HF says about a response."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tempo_megatron.config.schema import RolloutConfig
from tempo_megatron.rollout.engine import RolloutEngine

VOCAB_SIZE = 96
MAX_MODEL_LEN = 192
STOP_TOKEN_IDS = (0, 1, 2, 3)

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
    """The model's tensors under their HF names, each made at the moment it is asked for."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().clone()


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


def _tiny(folder: Path, make: Callable[[], PreTrainedModel]) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = make().eval()
        second = make().eval()
    first.save_pretrained(folder)
    return TinyModel(folder, first, second)


def tiny_qwen3(folder: Path) -> TinyModel:
    config = Qwen3Config(**_SHAPE, tie_word_embeddings=False)
    return _tiny(folder, lambda: Qwen3ForCausalLM(config))


def tiny_tied_llama(folder: Path) -> TinyModel:
    config = LlamaConfig(**_SHAPE, tie_word_embeddings=True)
    return _tiny(folder, lambda: LlamaForCausalLM(config))


def build(folder: Path, **changes: object) -> RolloutEngine:
    settings = {"dtype": "float32", "kv_cache_gib": 0.0625, "max_num_seqs": 64, "max_num_batched_tokens": 1024}
    config = RolloutConfig(**(settings | changes))
    return RolloutEngine(folder, config, max_model_len=MAX_MODEL_LEN, seed=0, stop_token_ids=STOP_TOKEN_IDS)
