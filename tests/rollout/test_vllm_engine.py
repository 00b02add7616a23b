"""The rollout engine against transformers, on real vLLM."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.model.hf_tensors import expected_tensors
from tempo_megatron.numerics.fp8 import BLOCK, Quantised
from tempo_megatron.reshard.fp8 import quantise
from tempo_megatron.reshard.holdings import whole_tensors
from tempo_megatron.rollout.engine import (
    GenerationRequest,
    RolloutEngine,
    SampledResponse,
)
from tempo_megatron.rollout.limits import CPU_EXPERTS_ALIGNMENT, CPU_HEAD_SIZES, check_model, read_hf_config
from tempo_megatron.rollout.update import require_expected
from tests.rollout.tiny_models import (
    MAX_MODEL_LEN,
    OLMO3_ORIGINAL_POSITIONS,
    OLMO3_WINDOW,
    SAMPLING,
    STOP_TOKEN_IDS,
    Engines,
    TinyModel,
    build,
    random_prompt,
    reference_log_probs,
    source,
    stream,
)


def _tokens(responses: list[SampledResponse]) -> list[list[int]]:
    return [r.token_ids for r in responses]


@pytest.fixture
def loaded(qwen3_engine: RolloutEngine, qwen3: TinyModel) -> RolloutEngine:
    qwen3_engine.update_weights(source(qwen3.first), 7)
    return qwen3_engine


def test_only_the_loaded_version_is_sampled(loaded: RolloutEngine) -> None:
    for version in (6, 8):
        with pytest.raises(RunError, match=f"asked to sample weights version {version}, but version 7 is loaded"):
            loaded.generate([GenerationRequest([5], 0, 1, 4)], version)


def test_a_sample_depends_on_its_prompt_and_seed_alone(loaded: RolloutEngine) -> None:
    requests = [GenerationRequest(random_prompt(i, 4 + i), 1000 * i, 3, 16) for i in range(5)]
    together = loaded.generate(requests, 7)
    assert len({tuple(t) for t in _tokens(together)}) > 12, "different seeds should give different samples"
    assert loaded.generate(requests, 7) == together
    backwards = [loaded.generate([r], 7) for r in reversed(requests)]
    assert [s for samples in reversed(backwards) for s in samples] == together
    apart = [
        loaded.generate([GenerationRequest(r.prompt_token_ids, r.seed + i, 1, 16)], 7)[0]
        for r in requests
        for i in range(3)
    ]
    assert apart == together


def test_responses_end_at_a_stop_token_or_at_the_limit(loaded: RolloutEngine) -> None:
    responses = loaded.generate([GenerationRequest(random_prompt(9, 6), 0, 64, 12)], 7)
    stopped = [r for r in responses if r.finish_reason == "stop"]
    cut = [r for r in responses if r.finish_reason == "length"]
    assert stopped and cut and len(stopped) + len(cut) == 64
    for r in stopped:
        assert r.token_ids[-1] in STOP_TOKEN_IDS
        assert not set(r.token_ids[:-1]) & set(STOP_TOKEN_IDS)
    for r in cut:
        assert len(r.token_ids) == 12
        assert not set(r.token_ids) & set(STOP_TOKEN_IDS)


def test_progress_counts_responses(loaded: RolloutEngine) -> None:
    seen: list[int] = []
    loaded.generate([GenerationRequest(random_prompt(i, 6), 0, 2, 3 + i) for i in range(4)], 7, seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == 8


def test_nothing_is_drawn_while_what_was_drawn_waits(loaded: RolloutEngine) -> None:
    """Ten prompts are more tokens than a step takes: places are left, and yet others have to wait."""
    requests = [GenerationRequest(random_prompt(i, 100), i, 1, 2) for i in range(100)]
    scheduler, indices = loaded._llm.engine_core.engine_core.scheduler, iter(range(100))
    waiting: list[int] = []

    def draw() -> int | None:
        waiting.append(scheduler.get_request_counts()[1])
        return next(indices, None)

    finished: list[int] = []
    loaded.generate_drawn(requests, 7, draw, lambda index, _: finished.append(index))
    assert sorted(finished) == list(range(100))
    assert waiting[:64] == list(range(64))
    assert all(after in (0, before + 1) for before, after in itertools.pairwise(waiting))


def test_sampling_leaves_the_trainers_random_states(loaded: RolloutEngine) -> None:
    before = _random_states()
    loaded.generate([GenerationRequest([5, 6], 0, 4, 8)], 7)
    assert _random_states() == before


def _random_states() -> tuple:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def _assert_equals_hf(
    engine: RolloutEngine,
    version: int,
    model: PreTrainedModel,
    other: PreTrainedModel,
    temperature: float,
    top_p: float,
) -> None:
    requests = [GenerationRequest(random_prompt(i, 5 + 9 * i), 100 * i, 4, 12) for i in range(6)]
    responses = engine.generate(requests, version)
    prompts = [r.prompt_token_ids for r in requests for _ in range(r.num_samples)]
    to_other = 0.0
    for prompt, response in zip(prompts, responses, strict=True):
        expected = reference_log_probs(model, prompt, response.token_ids, temperature, top_p)
        assert response.log_probs == pytest.approx(expected, abs=1e-4)
        wrong = reference_log_probs(other, prompt, response.token_ids, temperature, top_p)
        to_other = max(to_other, max(abs(a - b) for a, b in zip(response.log_probs, wrong, strict=True)))
    assert to_other > 1, "the two sets of weights are too alike for this test to mean anything"


FAMILIES = pytest.mark.parametrize("family", SAMPLING, scope="module")  # in that scope pytest groups by family


@FAMILIES
def test_log_probs_equal_hf_before_and_after_an_update(
    family: str, engines: Engines, request: pytest.FixtureRequest
) -> None:
    engine, tiny = engines.of(family), request.getfixturevalue(family)
    for version, (model, other) in enumerate([(tiny.first, tiny.second), (tiny.second, tiny.first)] * 2):
        engine.update_weights(source(model), version)
        assert engine.version == version
        _assert_equals_hf(engine, version, model, other, *SAMPLING[family])


@FAMILIES
def test_an_update_forgets_the_cached_prompt(family: str, engines: Engines, request: pytest.FixtureRequest) -> None:
    engine, tiny = engines.of(family), request.getfixturevalue(family)
    long = random_prompt(3, MAX_MODEL_LEN - 20)
    for version, model in ((7, tiny.first), (8, tiny.second)):
        engine.update_weights(source(model), version)
        for _ in range(2):  # the second round reads the prompt from the cache
            (response,) = engine.generate([GenerationRequest(long, 1, 1, 8)], version)
            expected = reference_log_probs(model, long, response.token_ids, *SAMPLING[family])
            assert response.log_probs == pytest.approx(expected, abs=1e-4)


@FAMILIES
def test_a_sleeping_engine_samples_the_same_after_an_update(
    family: str, engines: Engines, request: pytest.FixtureRequest
) -> None:
    engine, tiny = engines.of(family), request.getfixturevalue(family)
    weights, kv_cache = engine.parts
    requests = [GenerationRequest(random_prompt(i, 40), 100 * i, 3, 12) for i in range(4)]
    engine.update_weights(source(tiny.first), 7)
    before = engine.generate(requests, 7)
    awake = {part.name: part.resident_bytes() for part in engine.parts}
    # every tensor, a tied one once; a separate output layer is kept beside its packed copy
    model_bytes = sum(p.nbytes for p in tiny.first.parameters())
    assert awake["rollout.weights"] >= model_bytes and awake["rollout.kv_cache"] >= 60 * 2**20

    kv_cache.sleep()  # the weights go with it
    assert [part.resident_bytes() for part in engine.parts] == [0, 0] and engine.version is None
    with pytest.raises(RunError, match=r"sampling needs rollout\.weights, which is released, nothing of it was kept"):
        engine.generate(requests, 7)
    with pytest.raises(RunError, match=r"bringing its contents needs rollout\.weights, which is released"):
        engine.update_weights(source(tiny.first), 8)
    weights.wake()
    engine.update_weights(source(tiny.first), 8)
    with pytest.raises(RunError, match=r"sampling needs rollout\.kv_cache, which is released"):
        engine.generate(requests, 8)
    kv_cache.wake()
    assert engine.generate(requests, 8) == before
    weights.sleep()
    for part in engine.parts:
        part.wake()
    with pytest.raises(RunError, match="asked to sample weights version 8, but version None is loaded"):
        engine.generate(requests, 8)

    def linear(model: torch.nn.Module) -> None:
        next(module for module in model.modules() if hasattr(module, "cpu_linear")).cpu_linear()

    with pytest.raises(RunError, match="weights were released; an update brings new ones"):
        engine._llm.apply_model(linear)


def _with_config(model: PreTrainedModel, **changes: object) -> PreTrainedModel:
    """The same weights under another config."""
    other = type(model)(type(model.config)(**(model.config.to_dict() | changes))).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_olmo3_slides_its_window_and_stretches_its_positions(engines: Engines, olmo3: TinyModel) -> None:
    olmo3_engine = engines.of("olmo3")
    olmo3_engine.update_weights(source(olmo3.first), 1)
    prompts = [random_prompt(i, length) for i, length in enumerate((4, OLMO3_WINDOW, OLMO3_ORIGINAL_POSITIONS, 160))]
    responses = olmo3_engine.generate([GenerationRequest(p, i, 1, 32) for i, p in enumerate(prompts)], 1)
    lengths = [len(p) + len(r.token_ids) for p, r in zip(prompts, responses, strict=True)]
    assert max(lengths) > 5 * OLMO3_ORIGINAL_POSITIONS > OLMO3_WINDOW

    def largest_difference(model: PreTrainedModel) -> float:
        pairs = zip(prompts, responses, strict=True)
        expected = [p for prompt, r in pairs for p in reference_log_probs(model, prompt, r.token_ids, 1.0, 1.0)]
        sampled = [p for r in responses for p in r.log_probs]
        return max(abs(a - b) for a, b in zip(sampled, expected, strict=True))

    plain = {name: {"rope_type": "default", "rope_theta": 500000.0} for name in ("full_attention", "sliding_attention")}
    assert largest_difference(olmo3.first) < 1e-4
    assert largest_difference(_with_config(olmo3.first)) < 1e-4, "transformers' class is another after the engine"
    assert largest_difference(_with_config(olmo3.first, sliding_window=MAX_MODEL_LEN)) > 0.1
    assert largest_difference(_with_config(olmo3.first, rope_parameters=plain)) > 0.1


def test_an_engine_comes_and_goes_without_a_trace_in_the_trainer(
    no_engine: None, qwen3: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")  # torchrun's; vLLM would set it to 1
    states, threads, set_num_threads = _random_states(), torch.get_num_threads(), torch.set_num_threads
    environment = _environment()
    engine = build(qwen3.folder)
    assert _random_states() == states
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is set_num_threads
    assert _environment() == environment
    assert (engine.num_replicas, engine.replica_index, engine.is_replica_leader) == (1, 0, True)
    del engine
    gc.collect()
    assert dist.is_initialized()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 1
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()  # close() would have


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}


def test_rounded_weights_are_what_is_sampled_from(no_engine: None, qwen3_moe: TinyModel) -> None:
    """Linear layers and experts as FP8 leaves them; embeddings, routers, norms and the output layer as they are."""
    engine = build(qwen3_moe.folder, weights="fp8-emulated")
    for version, model in ((1, qwen3_moe.first), (2, qwen3_moe.second)):
        rounded = copy.deepcopy(model)
        for name, parameter in rounded.named_parameters():
            if name.endswith(("_proj.weight", "_proj")):
                for matrix in parameter.data.view(-1, *parameter.shape[-2:]):
                    halves = matrix.chunk(2) if name.endswith("gate_up_proj") else [matrix]  # two tensors of HF's files
                    for half in halves:
                        codes, scales = quantise(half)
                        half.copy_(Quantised(codes, scales, (BLOCK, BLOCK)).dequantise())
        engine.update_weights(source(model), version)
        _assert_equals_hf(engine, version, rounded, model, 1.0, 1.0)
    engine.close()


def test_an_engine_without_good_weights_does_not_sample(no_engine: None, qwen3: TinyModel) -> None:
    engine = build(qwen3.folder)
    request = GenerationRequest([5, 6, 7], 0, 2, 4)
    assert engine.version is None
    with pytest.raises(RunError, match="version None is loaded"):
        engine.generate([request], 0)

    broken = type(qwen3.first)(qwen3.first.config)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    engine.update_weights(source(broken), 0)
    with pytest.raises(RunError, match="log-probability nan"):
        engine.generate([request], 0)

    def breaks_off() -> None:
        assert engine.version is None
        raise OSError("the exporter failed")

    with pytest.raises(OSError, match="the exporter failed"):
        engine.update_weights(replace(source(qwen3.first), check=breaks_off), 1)
    assert engine.version is None
    with pytest.raises(RunError, match="unusable: the update to weights version 1 did not finish"):
        engine.generate([request], 1)
    with pytest.raises(RunError, match="unusable"):
        engine.update_weights(source(qwen3.first), 2)
    engine.close()
    with pytest.raises(RunError, match="unusable: it is closed"):
        engine.generate([request], 1)


def test_an_update_that_lacks_a_tensor_fails(no_engine: None, qwen3: TinyModel) -> None:
    engine = build(qwen3.folder)
    without_last = dict(list(stream(qwen3.first))[:-1])
    with pytest.raises(TempoError, match=r"lacks 1 of \d+ tensors of the model, such as lm_head.weight"):
        engine.update_weights(whole_tensors(without_last, 1), 1)
    with pytest.raises(RunError, match="unusable"):
        engine.generate([GenerationRequest([5], 0, 1, 4)], 1)
    engine.close()


@FAMILIES
def test_an_update_speaks_the_names_of_the_checkpoint(family: str, request: pytest.FixtureRequest) -> None:
    tiny: TinyModel = request.getfixturevalue(family)
    saved = {name: tensor.shape for name, tensor in load_file(tiny.folder / "model.safetensors").items()}
    assert expected_tensors(read_hf_config(tiny.folder), "actor") == saved
    assert {name: tensor.shape for name, tensor in stream(tiny.first)} == saved


def test_an_update_names_the_tensor_that_is_wrong(qwen3_moe: TinyModel) -> None:
    expected = expected_tensors(qwen3_moe.first.config, "actor")
    whole = dict(stream(qwen3_moe.first))
    require_expected(whole_tensors(whole, 1).holdings, expected)
    down = "model.layers.2.mlp.experts.5.down_proj.weight"
    for tensors, message in (
        (
            {n: t for n, t in whole.items() if n != down},
            rf"lacks 1 of {len(whole)} tensors of the model, such as {down}",
        ),
        (
            whole | {down.replace("5", "6"): whole[down]},
            r"experts\.6\.down_proj\.weight, which the model does not have",
        ),
        (whole | {down: whole[down].T}, r"as \[48, 64\], the model as \[64, 48\]"),
        (whole | {"model.norm.weight": whole["model.norm.weight"][1:]}, r"norm\.weight as \[63\], the model as \[64\]"),
    ):
        with pytest.raises(TempoError, match=message):
            require_expected(whole_tensors(tensors, 1).holdings, expected)


def test_a_head_size_that_vllm_takes_otherwise_is_named(qwen2: TinyModel) -> None:
    with pytest.raises(
        TempoError,
        match=r"config\.json: head_dim 64 is not hidden_size 64 / num_attention_heads 2, which vLLM's Qwen2 takes",
    ):
        check_model(
            "hf", type(qwen2.first.config)(**(qwen2.first.config.to_dict() | {"head_dim": 64})), 1, on_cpu=False
        )


def test_the_sizes_of_the_cpu_are_those_of_vllm() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert CPUAttentionBackend.get_supported_head_sizes() == list(CPU_HEAD_SIZES)
    assert CPUUnquantizedExperts.output_alignment == CPU_EXPERTS_ALIGNMENT


def test_sizes_that_vllm_cannot_split_are_named(qwen3_moe: TinyModel, olmo3: TinyModel) -> None:
    check_model("hf", olmo3.first.config, 2, on_cpu=False)
    with pytest.raises(TempoError, match=r"tensor_parallel_size: 4 does not divide num_key_value_heads 2 \(hf/config"):
        check_model("hf", olmo3.first.config, 4, on_cpu=False)
    check_model("hf", qwen3_moe.first.config, 4, on_cpu=False)
    with pytest.raises(
        TempoError, match=r"tensor_parallel_size: 5 does not divide moe_intermediate_size 48 \(hf/config"
    ):
        check_model("hf", qwen3_moe.first.config, 5, on_cpu=False)


def test_settings_that_vllm_cannot_run_are_one_line(
    no_engine: None, qwen3: TinyModel, qwen3_moe: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(TempoError, match="tensor_parallel_size: 3 does not divide the world of 1 ranks"):
        build(qwen3.folder, tensor_parallel_size=3)
    with pytest.raises(TempoError, match=r"no config\.json"):
        build(tmp_path)
    Qwen3Config(**(qwen3.first.config.to_dict() | {"head_dim": 16})).save_pretrained(tmp_path)
    with pytest.raises(TempoError, match=r"config\.json: head_dim 16 is not one that vLLM runs on the CPU: \[32, "):
        build(tmp_path)
    Qwen3MoeConfig(**(qwen3_moe.first.config.to_dict() | {"hidden_size": 48})).save_pretrained(tmp_path)
    with pytest.raises(TempoError, match=r"config\.json: hidden_size 48 is not a multiple of 32"):
        build(tmp_path)
    Qwen3Config(**(qwen3.first.config.to_dict() | {"max_position_embeddings": 64})).save_pretrained(tmp_path)
    with pytest.raises(TempoError, match=r"vLLM cannot run .*max_model_len") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
