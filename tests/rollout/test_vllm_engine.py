"""The rollout engine against transformers, on real vLLM."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel, Qwen3Config

from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SampledResponse, _checked
from tests.rollout.tiny_models import (
    MAX_MODEL_LEN,
    STOP_TOKEN_IDS,
    TinyModel,
    build,
    random_prompt,
    reference_log_probs,
    stream,
)


def _tokens(responses: list[SampledResponse]) -> list[list[int]]:
    return [r.token_ids for r in responses]


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


@pytest.mark.parametrize(
    ("engine_name", "model_name", "temperature", "top_p"),
    [("qwen3_engine", "qwen3", 1.0, 1.0), ("llama_engine", "tied_llama", 0.7, 0.9)],
)
def test_log_probs_equal_hf_before_and_after_an_update(
    engine_name: str, model_name: str, temperature: float, top_p: float, request: pytest.FixtureRequest
) -> None:
    engine: RolloutEngine = request.getfixturevalue(engine_name)
    tiny: TinyModel = request.getfixturevalue(model_name)
    for version, (model, other) in enumerate([(tiny.first, tiny.second), (tiny.second, tiny.first)] * 2):
        engine.update_weights(stream(model), version)
        assert engine.version == version
        _assert_equals_hf(engine, version, model, other, temperature, top_p)


@pytest.fixture
def loaded(qwen3_engine: RolloutEngine, qwen3: TinyModel) -> RolloutEngine:
    qwen3_engine.update_weights(stream(qwen3.first), 7)
    return qwen3_engine


def test_only_the_loaded_version_is_sampled(loaded: RolloutEngine) -> None:
    for version in (6, 8):
        with pytest.raises(RunError, match=f"asked to sample weights version {version}, but version 7 is loaded"):
            loaded.generate([GenerationRequest([5], 0, 1, 4)], version)


def test_an_update_forgets_the_cached_prompt(loaded: RolloutEngine, qwen3: TinyModel) -> None:
    long = random_prompt(3, MAX_MODEL_LEN - 20)
    for version, model in ((7, qwen3.first), (8, qwen3.second)):
        if version == 8:
            loaded.update_weights(stream(model), version)
        for _ in range(2):  # the second round reads the prompt from the cache
            (response,) = loaded.generate([GenerationRequest(long, 1, 1, 8)], version)
            expected = reference_log_probs(model, long, response.token_ids, 1.0, 1.0)
            assert response.log_probs == pytest.approx(expected, abs=1e-4)


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


def test_sampling_leaves_the_trainers_random_states(loaded: RolloutEngine) -> None:
    before = _random_states()
    loaded.generate([GenerationRequest([5, 6], 0, 4, 8)], 7)
    assert _random_states() == before


def _random_states() -> tuple:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_an_engine_comes_and_goes_without_a_trace_in_the_trainer(
    world_of_one: None, qwen3: TinyModel, monkeypatch: pytest.MonkeyPatch
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


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}


def test_an_engine_without_good_weights_does_not_sample(world_of_one: None, qwen3: TinyModel) -> None:
    engine = build(qwen3.folder)
    request = GenerationRequest([5, 6, 7], 0, 2, 4)
    assert engine.version is None
    with pytest.raises(RunError, match="version None is loaded"):
        engine.generate([request], 0)

    broken = type(qwen3.first)(qwen3.first.config)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    engine.update_weights(stream(broken), 0)
    with pytest.raises(RunError, match="log-probability nan"):
        engine.generate([request], 0)

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(stream(qwen3.first))[:5]
        assert engine.version is None
        raise OSError("the exporter failed")

    with pytest.raises(OSError, match="the exporter failed"):
        engine.update_weights(breaks_off(), 1)
    assert engine.version is None
    with pytest.raises(RunError, match="unusable: the update to weights version 1 did not finish"):
        engine.generate([request], 1)
    with pytest.raises(RunError, match="unusable"):
        engine.update_weights(stream(qwen3.first), 2)
    engine.close()
    with pytest.raises(RunError, match="unusable: it is closed"):
        engine.generate([request], 1)


def test_an_update_that_lacks_a_tensor_fails(world_of_one: None, qwen3: TinyModel) -> None:
    engine = build(qwen3.folder)
    without_last = list(stream(qwen3.first))[:-1]
    with pytest.raises(RunError, match=r"lacks 1 of \d+ tensors, the first is lm_head.weight"):
        engine.update_weights(without_last, 1)
    with pytest.raises(RunError, match="unusable"):
        engine.generate([GenerationRequest([5], 0, 1, 4)], 1)
    engine.close()


def test_an_update_names_the_tensor_that_is_wrong() -> None:
    expected = {"a": torch.Size([2]), "b": torch.Size([3, 2])}
    a, b = ("a", torch.zeros(2)), ("b", torch.zeros(3, 2))
    assert [name for name, _ in _checked([a, b], expected, 4)] == ["a", "b"]
    for stream_of, message in (
        ([b], "version 4 lacks 1 of 2 tensors, the first is a"),
        ([a, b, ("c", a[1])], "brings c, which the model does not have"),
        ([a, b, a], "brings a, twice"),
        ([a, ("b", torch.zeros(2, 3))], r"brings b as \[2, 3\], the model has \[3, 2\]"),
    ):
        with pytest.raises(RunError, match=message):
            list(_checked(stream_of, expected, 4))


def test_settings_that_vllm_cannot_run_are_one_line(world_of_one: None, qwen3: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(TempoError, match="tensor_parallel_size: 3 does not divide the world of 1 ranks"):
        build(qwen3.folder, tensor_parallel_size=3)
    with pytest.raises(TempoError, match=r"no config\.json"):
        build(tmp_path)
    Qwen3Config(**(qwen3.first.config.to_dict() | {"head_dim": 16})).save_pretrained(tmp_path)
    with pytest.raises(TempoError, match=r"config\.json: head_dim 16 is not one that vLLM runs on the CPU: \[32, "):
        build(tmp_path)
    Qwen3Config(**(qwen3.first.config.to_dict() | {"max_position_embeddings": 64})).save_pretrained(tmp_path)
    with pytest.raises(TempoError, match=r"vLLM cannot run .*max_model_len") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
