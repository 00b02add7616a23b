"""Our rotary embeddings are transformers': frequencies, attention factor, cos and sin, for every supported type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.model import layers
from tempo_megatron.model.rope import SUPPORTED_ROPES, ModelRope, rope_layer_types, rope_of_layer, ropes
from tests.model.published import write_config
from tests.model.test_attention import ContextGroup

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
#: As published with OLMo-3 7B, whose sliding layers rotate plainly.
OLMO3 = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 1.2079441541679836,
}

#: family, rope_scaling, other keys of config.json
CASES: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "default": ("llama", None, {}),
    "default, other theta": ("qwen3", None, {"rope_theta": 1000000}),
    "default, theta left out": ("llama", None, {"rope_theta": "absent"}),
    "linear": ("qwen3", LINEAR, {}),
    "linear, older key": ("llama", {"type": "linear", "factor": 2.5}, {}),
    "llama3": ("llama", LLAMA3, {"max_position_embeddings": 512, "head_dim": 32}),
    "yarn": ("qwen3-moe", YARN, {"max_position_embeddings": 256}),
    "yarn, own betas": ("qwen3", {**YARN, "beta_fast": 8, "beta_slow": 2}, {"head_dim": 64}),
    "yarn, mscale": ("qwen3", {**YARN, "mscale": 1.3, "mscale_all_dim": 0.7}, {}),
    "yarn, not truncated": ("qwen3", {**YARN, "truncate": False}, {"head_dim": 64}),
    "olmo3, as published": ("olmo3", OLMO3, {"max_position_embeddings": 65536, "hidden_size": 1024}),
    "olmo3, plain": ("olmo3", None, {}),
    "olmo3, another theta": ("olmo3", None, {"rope_theta": 10000.0}),
    "olmo3, full attention alone": ("olmo3", OLMO3, {"layer_types": ["full_attention"] * 4}),
}


def read_config(folder: Path, family: str, scaling: dict[str, Any] | None, others: dict[str, Any]) -> Any:
    return load_hf_config(write_config(folder, family, rope_scaling=scaling, **others))


def transformers_says(config: hf.PretrainedConfig, positions: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
    """cos and sin ``[positions, head_dim]`` of the model's own module (on the meta device but for its ropes)."""
    with torch.device("meta"):
        kind = type(hf.AutoModel.from_config(config).rotary_emb)
    which = {} if layer_type is None else {"layer_type": layer_type}
    cos, sin = kind(config)(torch.zeros(1), positions[None], **which)
    return cos[0], sin[0]


class OneRank:
    """A process group of one, as far as rotary embeddings ask it."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("case", CASES)
def test_cos_and_sin_equal_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    # Megatron moves the frequencies there, with or without a GPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    config = read_config(tmp_path, *CASES[case])
    # from 0 to beyond ``original_max_position_embeddings``
    positions = torch.tensor([0, 1, 2, 63, 64, 65, 255, 1000, 8191, 8192, 9000])
    angles = ModelRope(config, OneRank())(9001)
    types = rope_layer_types(config)
    own = ropes(config)
    assert len(own) == len(types)
    stacked = angles if len(types) > 1 else angles[None]
    for rope, angle, layer_type in zip(own, stacked, types, strict=True):
        cos, sin = transformers_says(config, positions, layer_type)
        at = angle[positions, 0, 0]
        assert at.dtype == torch.float32
        assert torch.equal(at.cos() * rope.attention_factor, cos)
        assert torch.equal(at.sin() * rope.attention_factor, sin)


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("rope", [None, 1])
def test_a_pack_is_turned_as_megatron_turns_it(monkeypatch: pytest.MonkeyPatch, cp: int, rope: int | None) -> None:
    lengths = [4, 4, 8, 12]
    angles = torch.randn(2, 12, 1, 1, 3).repeat(1, 1, 1, 1, 2)  # two ropes
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    for rank in range(cp):
        group = ContextGroup(rank, cp)
        monkeypatch.setattr(layers.mpu, "get_context_parallel_group", lambda group=group: group)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cumulative, cu_seqlens_kv=cumulative)
        x = torch.randn(sum(lengths) // cp, 1, 5, 6)
        results = []
        for ours in (True, False):
            x = x.detach().requires_grad_()
            if ours:
                turned = layers._Turn.apply(x, *layers._turns(angles if rope else angles[0], rope, packed))
            else:
                table = angles[rope or 0]
                turned = _apply_rotary_pos_emb_thd(x.squeeze(1), cumulative, table, cp_group=group).unsqueeze(1)
            (turned * torch.arange(6.0)).sum().backward()
            results.append((turned.detach(), x.grad))
        torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_takes_the_rope_of_its_type(tmp_path: Path, case: str) -> None:
    config = read_config(tmp_path, *CASES[case])
    types = rope_layer_types(config)
    for layer in range(config.num_hidden_layers):
        chosen = types[rope_of_layer(config, layer)]
        assert chosen is None or chosen == config.layer_types[layer]


def test_cases_cover_every_supported_type(tmp_path: Path) -> None:
    seen = set()
    for case in CASES.values():
        parameters = read_config(tmp_path, *case).rope_parameters
        nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
        seen |= {each["rope_type"] for each in nested}
    assert seen == set(SUPPORTED_ROPES)


def test_olmo3_as_published(tmp_path: Path) -> None:
    """YaRN, and its factor on cos and sin, in the full-attention layers alone."""
    config = read_config(tmp_path, *CASES["olmo3, as published"])
    assert rope_layer_types(config) == ["full_attention", "sliding_attention"]
    full, sliding = ropes(config)
    assert full.attention_factor == OLMO3["attention_factor"]
    assert sliding.attention_factor == 1.0
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(sliding.inv_freq, plain)
    # the fastest turn as before, the slowest eight times as slowly
    torch.testing.assert_close(full.inv_freq[:10], plain[:10])
    torch.testing.assert_close(full.inv_freq[-10:], plain[-10:] / 8)
    assert [rope_of_layer(config, layer) for layer in range(4)] == [1, 1, 1, 0]
