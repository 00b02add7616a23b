"""A vLLM engine that holds FP8, end to end: built, updated, proved, sampled.

vLLM's own kernels for it want a GPU, or AMX. In their place stands one in torch: it multiplies what the codes stand for
and leaves activations as they are. All else is vLLM's and ours: how the model is made, loaded and finished.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig

from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.model.hf_tensors import expected_tensors
from tempo_megatron.numerics.fp8 import BLOCK, Quantised
from tempo_megatron.planner.rollout import FP8_BLOCK, rollout_weights
from tempo_megatron.planner.sizes import ModelSizes
from tempo_megatron.reshard import fp8 as blocks
from tempo_megatron.reshard.fp8 import quantise, quantised_tensors
from tempo_megatron.reshard.regions import Region
from tempo_megatron.rollout import fp8
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.rollout.landings import foreseen_ranks
from tempo_megatron.rollout.limits import check_model
from tests.reshard.worlds import quantised_names
from tests.rollout.test_vllm_engine import _assert_equals_hf
from tests.rollout.tiny_models import TinyModel, build, source, tiny

#: Projections of 128 and 256 columns; of the hidden size the last block has half.
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny(tmp_path_factory.mktemp("fp8"), lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)))


@pytest.fixture(scope="module")
def torch_kernel(world_of_one: None) -> Iterator[None]:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.platforms.interface import PlatformEnum

    class TorchKernel(Fp8BlockScaledMMLinearKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
            return A @ blocks.decode(B, Region(0, 0, *B.shape), Bs).t().to(A.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(linear._POSSIBLE_FP8_BLOCK_KERNELS, PlatformEnum.CPU, [TorchKernel])
        patch.setattr(fp8, "cpu_multiplies", lambda: True)
        # float32, in which one can compare: real kernels take half of it
        patch.setattr(Fp8Config, "get_supported_act_dtypes", lambda _: [torch.float32, torch.bfloat16])
        yield


@pytest.fixture(scope="module")
def engine(torch_kernel: None, model: TinyModel) -> Iterator[RolloutEngine]:
    engine = build(model.folder, weights="fp8")
    yield engine
    engine.close()


def _held(engine: RolloutEngine) -> dict[str, Tensor]:
    (parameters,) = engine._llm.collective_rpc(lambda worker: dict(worker.get_model().named_parameters()))
    return {name: parameter.data for name, parameter in parameters.items()}


def _rounded(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if name.endswith("_proj.weight"):
            codes, scales = quantise(parameter.data)
            parameter.data = Quantised(codes, scales, (BLOCK, BLOCK)).dequantise()
    return rounded


def test_what_is_sampled_is_the_policy_in_fp8_before_and_after_an_update(
    engine: RolloutEngine, model: TinyModel
) -> None:
    pair = (model.first, model.second)
    for version, (trained, other) in enumerate((pair, pair[::-1], pair)):
        engine.update_weights(source(trained), version)
        _assert_equals_hf(engine, version, _rounded(trained), other, 1.0, 1.0)
        update = engine.last_update
        assert update is not None and update.tensors == len(list(trained.named_parameters())) + 7 * 2
        assert update.proved == update.tensors or version > 0


def test_codes_and_scales_lie_in_vllm_as_the_trainers_ranks_made_them(engine: RolloutEngine, model: TinyModel) -> None:
    engine.update_weights(source(model.second), 10)
    held = _held(engine)
    weights = dict(model.second.named_parameters())
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj"
        codes, scales = quantise(weights[f"{name}.weight"].detach())
        assert torch.equal(held[f"{name}.weight"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(held[f"{name}.weight_scale_inv"], scales)
    assert {name for name, tensor in held.items() if tensor.dtype == torch.float8_e4m3fn} == {
        f"model.layers.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }


def test_the_plan_and_the_planner_count_what_is_held(engine: RolloutEngine, model: TinyModel) -> None:
    engine.update_weights(source(model.first), 20)
    updater = engine._updater
    assert engine.last_update is not None
    assert engine.last_update.moved.received == updater.plan.traffic().received[0]
    assert FP8_BLOCK == BLOCK
    config = RolloutConfig(weights="fp8", dtype="float32")
    sizes = ModelSizes.of(model.first.config.to_dict())
    targets = updater._weights.destination.targets
    # 192 columns have two blocks' scales, of which one and a half are counted
    assert sum(t.nbytes for t in targets) == pytest.approx(rollout_weights(sizes, config), rel=1e-3)
    assert rollout_weights(sizes, config) < 0.5 * rollout_weights(
        sizes, config.model_copy(update={"weights": "trained"})
    )


def test_a_code_that_arrives_otherwise_is_found(
    engine: RolloutEngine, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: the engine is of no use behind it."""
    encode, spoilt = blocks.encode, []

    def spoiled(values: Tensor, region: Region, *args: Any) -> Tensor:
        codes = encode(values, region, *args)
        if not spoilt:  # what is sent; the proof makes them anew
            spoilt.append(region)
            codes.view(torch.uint8)[0, 0] ^= 1
        return codes

    monkeypatch.setattr(blocks, "encode", spoiled)
    engine._updater._planned_for = None  # as at the first update, of which all tensors are proved
    with pytest.raises(RunError, match=r"did not land: on rank 0 1 of \d+ tensors differ from the trainer's, such as"):
        engine._updater.update(source(model.second), 30, complete=True)


# ---------------------------------------------------------------- without an engine


def _foreseen(folder: Path, size: int, **settings: Any) -> list[Any]:
    config = fp8_model("qwen3")
    config.save_pretrained(folder)
    rollout = RolloutConfig(dtype="bfloat16", tensor_parallel_size=size, kv_cache_gib=0.0625, **settings)
    return list(foreseen_ranks(folder, expected_tensors(config, "actor"), rollout, None))


def fp8_model(family: str, **changes: int) -> PretrainedConfig:
    shape = SHAPE | changes
    if family == "qwen3":
        return Qwen3Config(**shape, architectures=["Qwen3ForCausalLM"])
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    return Qwen3MoeConfig(**shape, **experts, architectures=["Qwen3MoeForCausalLM"])


def test_a_replica_that_does_not_exist_is_in_fp8_too(tmp_path: Path) -> None:
    plain, quantised = _foreseen(tmp_path, 1)[0], _foreseen(tmp_path, 1, weights="fp8")[0]
    names = expected_tensors(fp8_model("qwen3"), "actor")
    assert quantised_tensors([quantised.destination]) == quantised_names(names)
    assert not quantised_tensors([plain.destination])
    assert quantised.weights < 0.6 * plain.weights


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_a_router_stays_as_it_is(family: str) -> None:
    given = fp8.overrides(RolloutConfig(weights="fp8"), fp8_model(family))["hf_overrides"]["quantization_config"]
    assert given["modules_to_not_convert"] == (
        [] if family == "qwen3" else [f"model.layers.{n}.mlp.gate" for n in (0, 1)]
    )
    assert fp8.overrides(RolloutConfig(weights="fp8-emulated"), fp8_model(family)) == {}


@pytest.mark.parametrize(
    ("family", "size", "changes", "told"),
    [
        ("qwen3", 2, {}, r"num_attention_heads x head_dim of hf/config.json is 64 on each of 2 ranks of a replica"),
        ("qwen3", 1, {"num_key_value_heads": 2}, "num_key_value_heads x head_dim of hf/config.json is 64 on each of 1"),
        ("qwen3", 1, {"intermediate_size": 320}, "intermediate_size of hf/config.json is 320 on each of 1 ranks"),
        ("qwen3-moe", 1, {"intermediate_size": 320}, None),
    ],
)
def test_parts_that_are_no_whole_blocks_are_refused(
    family: str, size: int, changes: dict[str, int], told: str | None
) -> None:
    def check(weights: str) -> None:
        check_model("hf", fp8_model(family, **changes), size, on_cpu=False, weights=weights)

    check("fp8-emulated")
    if told is None:
        check("fp8")
        return
    with pytest.raises(TempoError, match=told):
        check("fp8")


def test_a_processor_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "cpu_multiplies", lambda: False)
    with pytest.raises(TempoError, match=r"rollout\.weights: fp8 takes a GPU that has FP8, or a CPU with AMX"):
        check_model("hf", fp8_model("qwen3"), 1, on_cpu=True, weights="fp8")
    check_model("hf", fp8_model("qwen3"), 1, on_cpu=True, weights="fp8-emulated")
