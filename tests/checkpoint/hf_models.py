"""Tiny HF folders for the tests of reading and writing them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "vocab_size": 13,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES = ("qwen3", "llama-tied")


def config_of(family: str) -> hf.PretrainedConfig:
    if family == "qwen3":
        return hf.Qwen3Config(**_SHAPE, head_dim=12, tie_word_embeddings=False)
    return hf.LlamaConfig(**_SHAPE, tie_word_embeddings=True)


def policy(family: str) -> hf.PreTrainedModel:
    torch.manual_seed(3)
    return hf.AutoModelForCausalLM.from_config(config_of(family)).eval()


def classifier(family: str, **changes: object) -> hf.PreTrainedModel:
    """A critic as ``AutoModelForTokenClassification`` makes it, its bias away from zero."""
    torch.manual_seed(4)
    config = config_of(family)
    config.num_labels = 1
    config.update(changes)
    model = hf.AutoModelForTokenClassification.from_config(config).eval()
    if model.score.bias is not None:
        torch.nn.init.constant_(model.score.bias, 0.25)
    return model


def v_head_folder(family: str, folder: Path) -> Path:
    """What TRL's ``AutoModelForCausalLMWithValueHead.save_pretrained`` writes: the policy and its ``v_head``."""
    model = policy(family)
    g = torch.Generator().manual_seed(5)
    head = {
        "v_head.summary.weight": torch.randn(1, model.config.hidden_size, generator=g),
        "v_head.summary.bias": torch.randn(1, generator=g),
    }
    model.save_pretrained(folder, state_dict={**model.state_dict(), **head})
    return folder


#: Two forward passes with the same weights: where tensors lie in memory may change a matrix product's last bits.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def v_head_values(folder: Path, ids: Tensor) -> Tensor:
    """The values [n, length] of a folder in TRL's form by plain torch: the last hidden state through ``v_head``."""
    model, loading = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(loading["unexpected_keys"]) == {"v_head.summary.weight", "v_head.summary.bias"}
    tensors = stored(folder)
    with torch.no_grad():
        hidden = model.eval()(ids, output_hidden_states=True).hidden_states[-1]
        return (hidden @ tensors["v_head.summary.weight"].T + tensors["v_head.summary.bias"])[..., 0]


def score_values(folder: Path, ids: Tensor) -> Tensor:
    """The values [n, length] by ``AutoModelForTokenClassification``, which finds every tensor that it wants."""
    model, loading = hf.AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(ids).logits[..., 0]


def token_ids() -> Tensor:
    return torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(6))


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bytes."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def rewrite(path: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors of one safetensors file; ``__`` in a key stands for a dot."""
    tensors = load_file(path)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
