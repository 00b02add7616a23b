"""FP8 by blocks against vLLM: its own quantisation, and what its loader makes of a checkpoint in FP8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.model.held import megatron_holdings
from tempo_megatron.model.hf_tensors import expected_tensors
from tempo_megatron.reshard.fp8 import Blocks, quantise, quantised_tensors, scale_name
from tempo_megatron.reshard.plan import Plan
from tempo_megatron.reshard.regions import as_matrix
from tempo_megatron.rollout import landings
from tempo_megatron.rollout.engine import load_vllm
from tests.reshard.worlds import arrived, quantised_model, quantised_names, quantised_sources, whole_model

RANKS = 4
#: Blocks of 128 begin and end within heads, and the hidden size has half of one at its end.
SIZES = {"hidden_size": 320, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 90}
SIZES |= {"intermediate_size": 768, "num_hidden_layers": 2, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
#: Tensor-parallel size of a replica, whether it deals whole experts, and the trainer's layout.
CASES = {
    "qwen3": [(1, False, {}), (2, False, {"tensor": 4}), (2, False, {"tensor": 2, "pipeline": 2})],
    "qwen3-moe": [
        (1, False, {"expert": 4}),
        (2, False, {"tensor": 4, "expert_tensor": 4}),
        (2, True, {"tensor": 2, "expert_tensor": 2, "expert": 2}),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    load_vllm()


def _config(family: str) -> hf.PretrainedConfig:
    if family == "qwen3":
        return hf.Qwen3Config(**SIZES, architectures=["Qwen3ForCausalLM"])
    return hf.Qwen3MoeConfig(**SIZES, **EXPERTS, architectures=["Qwen3MoeForCausalLM"])


def _folder(folder: Path, config: hf.PretrainedConfig, quantisation: dict[str, Any]) -> Path:
    config.save_pretrained(folder)
    skipped = [f"model.layers.{layer}.mlp.gate" for layer in range(config.num_hidden_layers)]
    saved = json.loads((folder / "config.json").read_text())
    saved["quantization_config"] = {**quantisation, "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def _loaded_by_vllm(config: Any, checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """A rank's parameters with numbers, as vLLM fills them from a checkpoint."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with landings._apart(config) as own, landings._without_kernels(config), set_default_torch_dtype(torch.bfloat16):
        model: nn.Module = initialize_model(own, model_config=own.model_config)
    model.load_weights(iter(checkpoint.items()))
    return {name: parameter.data for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 5), (640, 129)])
def test_codes_and_scales_are_those_that_vllm_makes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    for factor in (1.0, 0.02, 1e-6, 0.0):
        values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * factor).to(dtype)
        codes, scales = quantise(values)
        wanted = per_block_cast_to_fp8(values)
        assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8)) and torch.equal(scales, wanted[1])


@pytest.mark.parametrize(("family", "case"), [(family, case) for family, cases in CASES.items() for case in cases])
def test_a_replica_gets_what_its_loader_reads_from_a_checkpoint(
    family: str, case: tuple[int, bool, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (size, experts, layout), config = case, _config(family)
    folder = _folder(tmp_path, config, FP8)
    tensors = {name: tensor.bfloat16().float() for name, tensor in whole_model(config, 1).items()}
    checkpoint = quantised_model(tensors, 128)
    loaded: list[dict[str, Tensor]] = []
    build = landings.build_twin

    def build_both(config: Any) -> nn.Module:
        loaded.append(_loaded_by_vllm(config, checkpoint))
        return build(config)

    monkeypatch.setattr(landings, "build_twin", build_both)
    shapes = expected_tensors(config, "actor")
    into = list(landings.foreseen_destinations(folder, shapes, size, expert_parallel=experts, dtype="bfloat16"))
    assert quantised_tensors(into) == quantised_names(shapes)
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.get("tensor", 1),
        pipeline_model_parallel_size=layout.get("pipeline", 1),
        expert_model_parallel_size=layout.get("expert", 1),
        expert_tensor_parallel_size=layout.get("expert_tensor", 1),
    )
    trainer = megatron_holdings(config, "actor", parallel, RANKS)
    blocks = Blocks(trainer, quantised_tensors(into))
    assert (blocks.told > 0) == (layout.get("tensor") == 4 or layout.get("expert_tensor") == 4)
    plan = Plan(blocks.holdings, into, 1 << 16, RANKS)
    sources = quantised_sources(blocks, trainer, tensors)
    for rank in range(RANKS):
        wanted = loaded[rank % size]
        targets = plan.destination_of(rank).targets
        assert {t.name for t in targets} == {name for name, tensor in wanted.items() if tensor.dim()}
        for target, got in zip(targets, arrived(plan, sources, rank), strict=True):
            want = as_matrix(wanted[target.name])
            assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8)), target.name


def test_experts_whose_scales_vllm_makes_smaller_come_whole(tmp_path: Path) -> None:
    """A rank's 192 columns are no blocks of 128: its loader repeats scales, for blocks of 64."""
    sizes = SIZES | EXPERTS | {"hidden_size": 256, "moe_intermediate_size": 384}
    config = hf.Qwen3MoeConfig(**sizes, architectures=["Qwen3MoeForCausalLM"])
    shapes, folder = expected_tensors(config, "actor"), _folder(tmp_path, config, FP8)
    experts = {name for name in quantised_names(shapes) if ".experts." in name}
    for into in landings.foreseen_destinations(folder, shapes, 2, expert_parallel=False, dtype="bfloat16"):
        assert into.whole == tuple(f"model.layers.{layer}.mlp.experts.routed_experts" for layer in range(2))
        whole = {target.name: target.dtype for target in into.targets if target.unit in into.whole}
        assert whole == dict.fromkeys(experts, "float8_e4m3fn") | dict.fromkeys(map(scale_name, experts), "float32")


@pytest.mark.parametrize(
    ("size", "changes", "told"),
    [
        (1, {"weight_block_size": None}, r"qkv_proj of the rollout engine is in FP8 with blocks of None, not \[128"),
        (1, {"weight_block_size": [64, 64]}, r"in FP8 with blocks of \[64, 64\], not \[128"),
        (4, {}, r"on 4 ranks a replica: .* = 192 is not divisible by weight quantization block_k = 128"),
    ],
)
def test_what_cannot_be_is_refused(size: int, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    config = _config("qwen3")
    folder = _folder(tmp_path, config, {**FP8, **changes})
    shapes = expected_tensors(config, "actor")
    with pytest.raises(TempoError, match=told):
        list(landings.foreseen_destinations(folder, shapes, size, expert_parallel=False, dtype="bfloat16"))
