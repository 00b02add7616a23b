"""One rollout over all replicas: deal the prompts, sample, decode, gather the same rows on every rank."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import Rollouts
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.parallel.distributed import on_all_ranks, sum_over_world
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SampledResponse

#: Turns lists of response token ids into texts, special tokens skipped.
Decode = Callable[[list[list[int]]], list[str]]


@dataclass(frozen=True)
class PromptDraw:
    """A prompt to sample from; ``seed`` is that of its first sample (``sampling.sample_seed``)."""

    record_id: str
    prompt_token_ids: list[int]
    labeled: bool
    seed: int


def rollout(
    engine: RolloutEngine,
    prompts: Sequence[PromptDraw],
    *,
    samples_per_prompt: int,
    max_response_tokens: int,
    version: int,
    decode: Decode,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rollouts:
    """Sample ``samples_per_prompt`` responses to each prompt; collective over the world.

    Prompt i is sampled by replica ``i % num_replicas``; seeds belong to samples, so the rows do not depend on
    the number of replicas. If a rank fails, every rank raises (a rank lost inside a tensor-parallel replica's own
    collectives is found by the process group's timeout only).

    Args:
        prompts: the same on every rank.
        samples_per_prompt: responses to each prompt.
        max_response_tokens: limit of a response; prompts close to ``engine.max_model_len`` leave less.
        version: weights version to sample; any other loaded one is refused.
        decode: called on each replica with its own responses.
        on_progress: called with (finished, total) responses of this rank's replica.

    Returns:
        N = ``len(prompts) * samples_per_prompt`` rows, samples of a prompt together, prompts in the given order;
        ``group`` is the prompt's position. Identical on every rank.

    Raises:
        TempoError: a prompt leaves no room for a response.
        RunError: a rank failed, or the ranks of one replica sampled different tokens.
    """
    requests = [
        GenerationRequest(
            draw.prompt_token_ids, draw.seed, samples_per_prompt, _room(engine, draw, max_response_tokens)
        )
        for draw in prompts
    ]
    mine = requests[engine.replica_index :: engine.num_replicas]
    total = len(mine) * samples_per_prompt

    def sample_and_decode() -> tuple[list[SampledResponse], list[str]]:
        report = None if on_progress is None else lambda finished: on_progress(finished, total)
        try:
            responses = engine.generate(mine, version, report)
            return responses, decode([r.token_ids for r in responses])
        except TempoError:
            raise
        except Exception as error:  # whatever vLLM or the tokenizer died of, the other ranks must hear of it
            raise RunError(f"rollout: rank {dist.get_rank()} failed: {type(error).__name__}: {error}") from error

    responses, texts = on_all_ranks(sample_and_decode)
    _require_equal_replicas(engine, responses)
    prompt_of_row = torch.arange(len(prompts)).repeat_interleave(samples_per_prompt)
    own = (prompt_of_row % engine.num_replicas == engine.replica_index) & engine.is_replica_leader
    gathered = _gather(own, *((responses, texts) if engine.is_replica_leader else ([], [])))
    return _rollouts(prompts, prompt_of_row, gathered, version)


def _room(engine: RolloutEngine, draw: PromptDraw, max_response_tokens: int) -> int:
    length = len(draw.prompt_token_ids)
    if not 0 < length < engine.max_model_len:
        raise TempoError(
            f"record {draw.record_id}: its prompt has {length} tokens; the rollout engine takes "
            f"1 to {engine.max_model_len - 1} (max_model_len {engine.max_model_len}, one left for the response)"
        )
    return min(max_response_tokens, engine.max_model_len - length)


def _require_equal_replicas(engine: RolloutEngine, responses: list[SampledResponse]) -> None:
    """The ranks of a tensor-parallel replica run vLLM in lockstep; that they did is checked, not believed."""
    digest = zlib.crc32(b"".join(np.asarray(r.token_ids, dtype=np.int32).tobytes() for r in responses))
    digests = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    digests[dist.get_rank()] = digest
    for index, replica in enumerate(sum_over_world(digests).view(engine.num_replicas, -1)):
        if (replica != replica[0]).any():
            raise RunError(f"rollout: the ranks of vLLM replica {index} sampled different tokens from the same seeds")


@dataclass(frozen=True)
class _Gathered:
    """All N rows of a rollout: ``lengths [N]``, ``stopped [N]``, flat ids and log-probabilities, texts."""

    lengths: Tensor
    stopped: Tensor
    token_ids: Tensor
    log_probs: Tensor
    texts: list[str]


def _gather(own: Tensor, responses: list[SampledResponse], texts: list[str]) -> _Gathered:
    """Put the rows of all replicas together on every rank: each row has one owner, the others add zeros.

    Args:
        own: ``[N]`` bool, the rows that this rank contributes, in the order of ``responses`` and ``texts``.
    """
    raw_texts = [text.encode() for text in texts]
    shape = torch.zeros(len(own), 3, dtype=torch.int64)
    shape[own] = torch.tensor(
        [[len(r.token_ids), r.finish_reason == "stop", len(t)] for r, t in zip(responses, raw_texts, strict=True)],
        dtype=torch.int64,
    ).view(-1, 3)
    lengths, stopped, text_bytes = sum_over_world(shape).unbind(1)

    def flat(values: np.ndarray, sizes: Tensor) -> Tensor:
        mine = torch.from_numpy(values)
        everything = torch.zeros(int(sizes.sum()), dtype=mine.dtype)
        everything[own.repeat_interleave(sizes)] = mine
        return sum_over_world(everything)

    token_ids = flat(np.array([t for r in responses for t in r.token_ids], dtype=np.int32), lengths)
    log_probs = flat(np.array([p for r in responses for p in r.log_probs], dtype=np.float32), lengths)
    text = flat(np.frombuffer(b"".join(raw_texts), dtype=np.uint8).copy(), text_bytes).numpy().tobytes()
    ends = text_bytes.cumsum(0).tolist()
    all_texts = [text[end - size : end].decode() for end, size in zip(ends, text_bytes.tolist(), strict=True)]
    return _Gathered(lengths, stopped.bool(), token_ids, log_probs, all_texts)


def _rollouts(prompts: Sequence[PromptDraw], prompt_of_row: Tensor, rows: _Gathered, version: int) -> Rollouts:
    draws = [prompts[i] for i in prompt_of_row.tolist()]
    return Rollouts(
        record_ids=[draw.record_id for draw in draws],
        group=prompt_of_row,
        prompt_token_ids=[draw.prompt_token_ids for draw in draws],
        response_token_ids=Ragged.of_lengths(rows.token_ids, rows.lengths),
        responses=rows.texts,
        finish_reason=["stop" if stopped else "length" for stopped in rows.stopped.tolist()],
        rollout_log_probs=Ragged.of_lengths(rows.log_probs, rows.lengths),
        response_lengths=rows.lengths,
        labeled=torch.tensor([draw.labeled for draw in draws], dtype=torch.bool),
        weights_version=version,
    )
