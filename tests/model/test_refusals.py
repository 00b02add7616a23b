"""What is not supported is refused by name, from config.json on: key, value and what would be right, on one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.config.architectures import ARCHITECTURES
from tempo_megatron.config.layout import read_model_shape
from tempo_megatron.errors import TempoError
from tempo_megatron.model.families import FAMILIES, family_of
from tempo_megatron.model.rope import head_dim
from tests.model.published import PUBLISHED, write_config


def refusal(path: Path) -> str:
    """What ``load_hf_config`` says after the file's name."""
    with pytest.raises(TempoError) as caught:
        load_hf_config(path)
    message, start = str(caught.value), f"{path / 'config.json'}: "
    assert message.startswith(start)
    assert "\n" not in message
    return message.removeprefix(start)


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configs_pass(tmp_path: Path, family: str) -> None:
    config = load_hf_config(write_config(tmp_path, family))
    assert family_of(config).architecture == PUBLISHED[family]["architectures"][0]
    shape = read_model_shape(tmp_path / "config.json", "actor.init")
    assert (shape.attention_heads, shape.key_value_heads, shape.layers) == (8, 4, 4)
    assert shape.head_dim == head_dim(config)
    assert shape.copies_kv_heads == (family_of(config).qk_norm != "projection")
    assert shape.experts == (8 if family == "qwen3-moe" else 0)


@pytest.mark.parametrize("family", PUBLISHED)
def test_configs_saved_again_by_transformers_pass_and_say_the_same(tmp_path: Path, family: str) -> None:
    """transformers 5 writes ``rope_parameters``, ``dtype`` and, for experts, ``num_local_experts``."""
    first = load_hf_config(write_config(tmp_path, family))
    shape = read_model_shape(tmp_path / "config.json", "actor.init")
    first.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_bytes())
    assert "rope_scaling" not in saved
    assert "torch_dtype" not in saved
    second = load_hf_config(tmp_path)
    assert second.dtype == first.dtype is not None
    assert second.to_dict() == first.to_dict()
    assert read_model_shape(tmp_path / "config.json", "actor.init") == shape


def test_every_listed_family_is_the_one_of_its_module() -> None:
    assert {name: family.architecture for name, family in FAMILIES.items()} == {name: name for name in ARCHITECTURES}
    assert {values["architectures"][0] for values in PUBLISHED.values()} == set(ARCHITECTURES)


def test_the_list_of_families_needs_no_torch() -> None:
    code = "import sys, tempo_megatron.config.layout; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "GemmaForCausalLM"),
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": ["LlamaForProcessRewardModel"]}, "LlamaForProcessRewardModel"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"architectures": ["LlamaForCausalLM", "GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": []}, ""),
        ({"architectures": "absent"}, ""),
    ],
)
def test_architectures(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    write_config(tmp_path, "llama", **changes)
    supported = f"is not supported; supported: {', '.join(ARCHITECTURES)}"
    told = refusal(tmp_path)
    assert told.startswith("architectures: [")
    assert named in told
    assert told.endswith(supported)
    with pytest.raises(TempoError) as caught:
        read_model_shape(tmp_path / "config.json", "actor.init")
    told = str(caught.value)
    assert told.startswith(f"actor.init: {tmp_path / 'config.json'}: architectures: ")
    assert named in told
    assert told.endswith(supported)
    assert "\n" not in told


def test_architecture_of_another_model_type(tmp_path: Path) -> None:
    told = refusal(write_config(tmp_path, "llama", architectures=["Qwen3ForCausalLM"]))
    assert told == ("architectures: ['Qwen3ForCausalLM'] does not go with model_type: llama, that of LlamaForCausalLM")


def test_model_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    told = refusal(write_config(tmp_path, "llama", model_type="mystery"))
    assert told.startswith("not a config that transformers knows: ")
    assert "model type `mystery`" in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("dtype", value) for value in ("float", [1], 5)),
        *(("id2label", value) for value in ("x", 3, [1])),
        *(("quantization_config", value) for value in ("fp8", 8, [1])),
        *(("rope_scaling", value) for value in ("yarn", 8, [1])),
        *(("hidden_size", value) for value in ("64", 6.4, -1, None)),
        *(("layer_types", value) for value in ("full_attention", 4, {"x": 1})),
    ],
)
def test_values_that_no_config_has(tmp_path: Path, key: str, value: object) -> None:
    """Whatever transformers raises or lets pass: one line or a good config, never a traceback."""
    write_config(tmp_path, "qwen3", **{key: value})
    try:
        load_hf_config(tmp_path)
    except TempoError as error:
        assert str(error).startswith(f"{tmp_path / 'config.json'}: ")
        assert "\n" not in str(error)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("attention_bias", True, "attention_bias: true is not supported (only false)"),
        ("mlp_bias", True, "mlp_bias: true is not supported (only false)"),
        ("hidden_act", "gelu", "hidden_act: gelu is not supported (only silu)"),
        ("use_sliding_window", True, "use_sliding_window: true is not supported (only false)"),
        ("attention_dropout", 0.1, "attention_dropout: 0.1 is not supported (only 0.0)"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor: 0.5 is not supported (only 1.0)"),
        ("rope_theta", None, "rope_theta: null is not supported (a number is needed)"),
        ("rope_theta", "big", "rope_theta: 'big' is not supported (a number is needed)"),
        (
            "quantization_config",
            {"quant_method": "gptq", "bits": 4},
            "quantization_config: quant_method gptq: quantized weights are not supported; convert them to safetensors "
            "in float first",
        ),
    ],
)
def test_features_of_every_family(tmp_path: Path, family: str, key: str, value: object, told: str) -> None:
    architecture = PUBLISHED[family]["architectures"][0]
    write_config(tmp_path, family, **{key: value})
    if (family, key) == ("qwen2", "attention_bias"):  # its biases are there whatever the config says
        load_hf_config(tmp_path)
    else:
        assert refusal(tmp_path) == f"{architecture}: {told}"


LONGROPE = {"short_factor": [1.0] * 5, "long_factor": [2.0] * 5, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize(
    ("kind", "others"),
    [("dynamic", {"factor": 2.0}), ("longrope", LONGROPE), ("proportional", {}), ("mystery", {"factor": 2.0})],
)
def test_rope_types(tmp_path: Path, family: str, kind: str, others: dict[str, Any]) -> None:
    write_config(tmp_path, family, rope_scaling={"rope_type": kind, **others})
    architecture = PUBLISHED[family]["architectures"][0]
    told = f"{architecture}: rope_type: {kind} is not supported (only default, linear, llama3, yarn)"
    assert refusal(tmp_path) == told


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3-moe"])
def test_rope_type_under_its_older_key(tmp_path: Path, family: str) -> None:
    told = refusal(write_config(tmp_path, family, rope_scaling={"type": "dynamic", "factor": 2.0}))
    assert "rope_type: dynamic is not supported" in told
    config = load_hf_config(write_config(tmp_path, family, rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_parameters["rope_type"] == "linear"


def test_rope_type_under_its_older_key_by_layer_type(tmp_path: Path) -> None:
    """transformers would take the default rope."""
    told = refusal(write_config(tmp_path, "olmo3", rope_scaling={"type": "linear", "factor": 2.0}))
    assert told == "Olmo3ForCausalLM: rope type: linear is not supported beside rope_type: default (only rope_type is)"


def test_rope_that_lacks_a_number(tmp_path: Path) -> None:
    told = refusal(write_config(tmp_path, "qwen3", rope_scaling={"rope_type": "yarn"}))
    assert "'rope_type'='yarn': {'factor'}" in told


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family", PUBLISHED)
def test_yarn_reaches_as_far_as_the_positions(tmp_path: Path, family: str) -> None:
    """vLLM's table of positions has factor x original rows; what lies beyond is read out of bounds."""
    load_hf_config(write_config(tmp_path, family, rope_scaling=YARN, max_position_embeddings=64))
    told = refusal(write_config(tmp_path, family, rope_scaling=YARN, max_position_embeddings=65))
    assert told == (
        f"{PUBLISHED[family]['architectures'][0]}: max_position_embeddings: 65 is beyond YaRN's factor 4 x "
        "original_max_position_embeddings 16 = 64, where vLLM's table of positions ends"
    )


@pytest.mark.parametrize("value", [None, "4", 0, -1.0])
@pytest.mark.parametrize(
    ("rope", "key"),
    [
        (YARN, "factor"),
        (YARN, "original_max_position_embeddings"),
        (LLAMA3, "low_freq_factor"),
        (LLAMA3, "original_max_position_embeddings"),
        ({"rope_type": "linear", "factor": 2.0}, "factor"),
    ],
)
def test_rope_with_what_is_no_number(tmp_path: Path, rope: dict[str, Any], key: str, value: object) -> None:
    told = refusal(write_config(tmp_path, "llama", rope_scaling={**rope, key: value}))
    if not told.startswith("not a config that transformers knows: "):
        kind, shown = rope["rope_type"], "null" if value is None else repr(value)
        assert told == f"LlamaForCausalLM: {key}: {shown} is not supported (rope_type {kind} needs a number above 0)"


@pytest.mark.parametrize(
    ("key", "value"), [("pad_token_id", 37), ("bos_token_id", 37), ("eos_token_id", 37), ("eos_token_id", [1, 151645])]
)
@pytest.mark.parametrize("family", PUBLISHED)
def test_ids_beyond_the_vocabulary(tmp_path: Path, family: str, key: str, value: object) -> None:
    """Of a vocabulary that was made smaller, or a pad token that was added without one more row."""
    wrong = value if isinstance(value, int) else 151645
    told = refusal(write_config(tmp_path, family, **{key: value}))
    assert told == f"{key}: {wrong} must be a token id from 0 to 36 (vocab_size - 1)"


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        (
            "qwen3-moe",
            {"decoder_sparse_step": 2},
            "decoder_sparse_step: 2 is not supported (only 1: experts in every layer)",
        ),
        (
            "qwen3-moe",
            {"mlp_only_layers": [0]},
            "mlp_only_layers: [0] is not supported (only []: experts in every layer)",
        ),
        (
            "olmo3",
            {"layer_types": ["full_attention", "chunked_attention", "sliding_attention", "full_attention"]},
            "layer_types: chunked_attention is not supported (only sliding_attention and full_attention)",
        ),
        (
            "olmo3",
            {"sliding_window": None},
            "sliding_window: null is not supported (a number of tokens from 1 up is needed)",
        ),
        ("olmo3", {"sliding_window": 0}, "sliding_window: 0 is not supported (a number of tokens from 1 up is needed)"),
        *(
            ("qwen2", {key: value}, f"{key}: {json.dumps(value)} is not supported (only {json.dumps(not value)})")
            for key, value in (("is_causal", False), ("qk_norm", True), ("use_mrope", True))
        ),
        (
            "qwen2",
            {"dual_chunk_attention_config": {"chunk_size": 16}},
            "dual_chunk_attention_config: is not supported (only null: one attention over all positions)",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "layer_types: sliding_attention is not supported (only full_attention)",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "layer_types: sliding_attention is not supported (only full_attention)",
        ),
    ],
)
def test_features_of_one_family(tmp_path: Path, family: str, changes: dict[str, Any], told: str) -> None:
    architecture = PUBLISHED[family]["architectures"][0]
    assert refusal(write_config(tmp_path, family, **changes)) == f"{architecture}: {told}"


def test_layer_types_that_transformers_does_not_know(tmp_path: Path) -> None:
    assert "`layer_types`" in refusal(write_config(tmp_path, "olmo3", layer_types=["mystery"] * 4))
    assert "`layer_types` (3)" in refusal(write_config(tmp_path, "olmo3", layer_types=["full_attention"] * 3))


def test_number_of_experts_must_be_said(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3-moe", num_experts="absent")
    with pytest.raises(TempoError, match="num_experts: None must be a positive integer"):
        read_model_shape(tmp_path / "config.json", "actor.init")
