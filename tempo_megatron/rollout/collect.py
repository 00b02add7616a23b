"""One rollout over all replicas: draw the prompts, sample, decode, gather the same rows on every rank."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import Rollouts
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.parallel.distributed import on_all_ranks, sum_over_world
from tempo_megatron.rollout.engine import GenerationRequest, ReadResponses, RolloutEngine, SampledResponse
from tempo_megatron.rollout.expected import ExpectedLengths
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.rollout.queue import PromptQueue, open_queue

#: Turns lists of response token ids into texts, special tokens skipped.
Decode = Callable[[list[list[int]]], list[str]]
#: Is told a prompt's position and the texts of its responses.
Hear = Callable[[int, list[str]], None]


@dataclass(frozen=True)
class Finished:
    """All samples of one prompt, on the ranks of the replica that drew it; texts on its first rank, else empty."""

    responses: list[SampledResponse]
    texts: list[str]


def rollout(
    engine: RolloutEngine,
    prompts: Sequence[PromptDraw],
    *,
    samples_per_prompt: int,
    max_response_tokens: int,
    version: int,
    decode: Decode,
    expected: ExpectedLengths | None = None,
    hear: Hear | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rollouts:
    """Sample ``samples_per_prompt`` responses to each prompt; collective over the world.

    The replicas draw the prompts from one queue (``queue.py``), the longest expected first. Seeds belong to samples, so
    the rows do not depend on who drew what, or on the number of replicas. If a rank fails, nobody draws any more and
    every rank raises (a rank lost inside a tensor-parallel replica's own collectives is found by the process group's
    timeout only).

    Args:
        prompts: the same on every rank.
        samples_per_prompt: responses to each prompt.
        max_response_tokens: limit of a response; prompts close to ``engine.max_model_len`` leave less.
        version: weights version to sample; any other loaded one is refused.
        decode: called on the first rank of the replica that drew a prompt, with its responses, in a thread.
        expected: what is known of earlier rollouts' lengths; it learns this one's. None: the longest prompts first.
        hear: called behind ``decode``, as soon as a prompt is finished, while others are sampled.
        on_progress: called with (finished, drawn) responses of this rank's replica.

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
    expected = expected or ExpectedLengths()
    with open_queue(engine, expected.order(prompts), samples_per_prompt) as queue:
        found = on_all_ranks(lambda: sample(engine, requests, version, queue, decode, hear, on_progress))
    _require_equal_replicas(engine, found)
    prompt_of_row = torch.arange(len(prompts)).repeat_interleave(samples_per_prompt)
    gathered = _gather(len(prompt_of_row), samples_per_prompt, found if engine.is_replica_leader else {})
    means = gathered.lengths.view(len(prompts), samples_per_prompt).double().mean(1)
    expected.observe(prompts, means.tolist())
    return _rollouts(prompts, prompt_of_row, gathered, version)


def sample(
    engine: RolloutEngine,
    requests: Sequence[GenerationRequest],
    version: int,
    queue: PromptQueue,
    decode: Decode,
    hear: Hear | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[int, Finished]:
    """What this rank's replica draws from ``queue``, by position in ``requests``, in their order.

    Finished prompts are read and decoded in a thread, while the replica samples the others.

    Raises:
        TempoError: whatever went wrong; the queue is given up.
    """
    reading: dict[int, Future[Finished]] = {}
    counts = [0, 0]

    def count(which: int, index: int) -> None:
        counts[which] += requests[index].num_samples
        if on_progress is not None and which == 0:
            on_progress(*counts)

    def draw() -> int | None:
        index = queue.draw()
        if index is not None:
            count(1, index)
        return index

    def read(index: int, responses: ReadResponses) -> Finished:
        try:
            found = responses()
            if not engine.is_replica_leader:
                return Finished(found, [])
            texts = decode([r.token_ids for r in found])
            if hear is not None:
                hear(index, texts)
            return Finished(found, texts)
        except BaseException:
            queue.give_up()  # at once: this replica finds out when it has sampled what it drew
            raise

    def finish(index: int, responses: ReadResponses) -> None:
        reading[index] = thread.submit(read, index, responses)
        count(0, index)

    try:
        with ThreadPoolExecutor(1, "rollout-reader") as thread:
            engine.generate_drawn(requests, version, draw, finish)
        return {index: reading[index].result() for index in sorted(reading)}
    except Exception as error:
        queue.give_up()
        if isinstance(error, TempoError):
            raise
        # whatever vLLM or the tokenizer died of, the other ranks must hear of it
        raise RunError(f"rollout: rank {dist.get_rank()} failed: {type(error).__name__}: {error}") from error


def _room(engine: RolloutEngine, draw: PromptDraw, max_response_tokens: int) -> int:
    length = len(draw.prompt_token_ids)
    if not 0 < length < engine.max_model_len:
        raise TempoError(
            f"record {draw.record_id}: its prompt has {length} tokens; the rollout engine takes "
            f"1 to {engine.max_model_len - 1} (max_model_len {engine.max_model_len}, one left for the response)"
        )
    return min(max_response_tokens, engine.max_model_len - length)


def _require_equal_replicas(engine: RolloutEngine, found: dict[int, Finished]) -> None:
    """The ranks of a tensor-parallel replica run vLLM in lockstep; that they did is checked, not believed."""
    parts = [np.array([i, *(t for r in f.responses for t in r.token_ids)], np.int32) for i, f in found.items()]
    digests = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    digests[dist.get_rank()] = zlib.crc32(b"".join(part.tobytes() for part in parts))
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


def _gather(num_rows: int, samples_per_prompt: int, found: dict[int, Finished]) -> _Gathered:
    """Put the rows of all replicas together on every rank: each row has one owner, the others add zeros.

    Args:
        num_rows: N.
        found: what this rank contributes, by prompt, in their order.
    """
    own = torch.tensor(list(found), dtype=torch.int64)[:, None] * samples_per_prompt + torch.arange(samples_per_prompt)
    own = own.flatten()  # rows, which only their owner knows before this
    responses = [r for f in found.values() for r in f.responses]
    raw_texts = [text.encode() for f in found.values() for text in f.texts]
    shape = torch.zeros(num_rows, 4, dtype=torch.int64)
    shape[own] = torch.tensor(
        [[1, len(r.token_ids), r.finish_reason == "stop", len(t)] for r, t in zip(responses, raw_texts, strict=True)],
        dtype=torch.int64,
    ).view(-1, 4)
    owners, lengths, stopped, text_bytes = sum_over_world(shape).unbind(1)
    if (owners != 1).any():
        row = int((owners != 1).nonzero()[0])
        raise RunError(f"rollout: row {row} of {num_rows} was sampled by {int(owners[row])} replicas")
    is_own = torch.zeros(num_rows, dtype=torch.bool)
    is_own[own] = True

    def flat(values: np.ndarray, sizes: Tensor) -> Tensor:
        mine = torch.from_numpy(values)
        everything = torch.zeros(int(sizes.sum()), dtype=mine.dtype)
        everything[is_own.repeat_interleave(sizes)] = mine
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
