"""Rollouts over one replica here; over several in ``test_replicas``."""

from __future__ import annotations

import threading

import pytest
import torch

from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.rollout.collect import rollout
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine
from tempo_megatron.rollout.prompts import PromptDraw
from tests.rollout.tiny_models import MAX_MODEL_LEN, TinyModel, random_prompt, source


def _decode(responses: list[list[int]]) -> list[str]:
    return ["→".join(map(str, ids)) for ids in responses]


@pytest.fixture
def engine(qwen3_engine: RolloutEngine, qwen3: TinyModel) -> RolloutEngine:
    qwen3_engine.update_weights(source(qwen3.first), 3)
    return qwen3_engine


DRAWS = [PromptDraw(f"r{i}", random_prompt(i, 4 + 3 * i), i % 2 == 0, 50 * i) for i in range(5)]


def test_rows_are_the_samples_of_each_prompt_in_order(engine: RolloutEngine) -> None:
    seen: list[tuple[int, int]] = []
    batch = rollout(
        engine,
        DRAWS,
        samples_per_prompt=3,
        max_response_tokens=10,
        version=3,
        decode=_decode,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert len(batch) == 15
    assert seen[-1] == (15, 15)
    assert batch.record_ids == [d.record_id for d in DRAWS for _ in range(3)]
    assert batch.group.tolist() == [i for i in range(5) for _ in range(3)]
    assert batch.labeled.tolist() == [d.labeled for d in DRAWS for _ in range(3)]
    assert batch.weights_version == 3
    alone = [
        engine.generate([GenerationRequest(d.prompt_token_ids, d.seed + i, 1, 10)], 3)[0]
        for d in DRAWS
        for i in range(3)
    ]
    assert batch.response_token_ids.values.dtype == torch.int32
    assert batch.response_token_ids.tolist() == [r.token_ids for r in alone]
    assert batch.finish_reason == [r.finish_reason for r in alone]
    assert set(batch.finish_reason) == {"stop", "length"}
    assert batch.responses.texts() == _decode(batch.response_token_ids.tolist())
    assert torch.equal(batch.responses.lengths, batch.response_bytes)
    assert batch.source.tolist() == [0] * 15
    assert batch.response_lengths.tolist() == [len(r.token_ids) for r in alone]
    assert batch.rollout_log_probs.values.dtype == torch.float32
    assert torch.equal(batch.rollout_log_probs.lengths, batch.response_lengths)
    expected = [p for r in alone for p in r.log_probs]
    assert batch.rollout_log_probs.values.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_finished_prompt_is_heard_of_while_others_are_sampled(engine: RolloutEngine) -> None:
    heard = threading.Event()
    texts: dict[int, list[str]] = {}

    def hear(position: int, responses: list[str]) -> None:
        texts[position] = responses
        heard.set()

    batch = rollout(
        engine,
        DRAWS,
        samples_per_prompt=2,
        max_response_tokens=10,
        version=3,
        decode=_decode,
        hear=hear,
        on_progress=lambda done, drawn: None if heard.wait(60) else pytest.fail("nobody heard of the first prompt"),
    )
    assert [text for position in range(len(DRAWS)) for text in texts[position]] == batch.responses.texts()


def test_a_long_prompt_leaves_less_for_the_response(engine: RolloutEngine) -> None:
    draws = [PromptDraw("long", random_prompt(1, MAX_MODEL_LEN - 4), False, 0)]
    batch = rollout(engine, draws, samples_per_prompt=8, max_response_tokens=10, version=3, decode=_decode)
    assert int(batch.response_lengths.max()) == 4


@pytest.mark.parametrize("length", [0, MAX_MODEL_LEN])
def test_a_prompt_without_room_is_named(engine: RolloutEngine, length: int) -> None:
    draws = [*DRAWS, PromptDraw("bad", random_prompt(1, length), False, 0)]
    message = f"record bad: its prompt has {length} tokens; the rollout engine takes 1 to {MAX_MODEL_LEN - 1}"
    with pytest.raises(TempoError, match=message):
        rollout(engine, draws, samples_per_prompt=1, max_response_tokens=4, version=3, decode=_decode)


def test_a_stale_version_is_refused(engine: RolloutEngine) -> None:
    with pytest.raises(RunError, match="asked to sample weights version 4, but version 3 is loaded"):
        rollout(engine, DRAWS, samples_per_prompt=1, max_response_tokens=4, version=4, decode=_decode)


def test_a_failure_while_decoding_names_the_rank(engine: RolloutEngine) -> None:
    def decode(responses: list[list[int]]) -> list[str]:
        raise KeyError(len(responses))

    with pytest.raises(RunError, match="rank 0 failed: KeyError: 1"):
        rollout(engine, DRAWS, samples_per_prompt=1, max_response_tokens=4, version=3, decode=decode)


def test_no_prompts_make_an_empty_batch(engine: RolloutEngine) -> None:
    batch = rollout(engine, [], samples_per_prompt=4, max_response_tokens=4, version=3, decode=_decode)
    assert len(batch) == 0
    assert len(batch.rollout_log_probs) == len(batch.response_token_ids) == 0
