"""One rollout over all replicas: draw the prompts, sample, decode, and tell every rank the facts of all rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import Rollouts
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.parallel.distributed import on_all_ranks, rank, sum_over_world, world_size
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
    """All samples of one prompt, on the ranks of the replica that drew it.

    Attributes:
        token_ids: int32.
        log_probs: float32.
        stopped: which have ended by a stop token.
        texts: bytes in UTF-8, on the replica's first rank; on the others none.
    """

    token_ids: Ragged
    log_probs: Ragged
    stopped: list[bool]
    texts: Ragged

    @classmethod
    def of(cls, responses: list[SampledResponse], texts: list[str]) -> Finished:
        return cls(
            Ragged.of_rows([r.token_ids for r in responses], torch.int32),
            Ragged.of_rows([r.log_probs for r in responses], torch.float32),
            [r.finish_reason == "stop" for r in responses],
            Ragged.of_texts(texts),
        )


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
        ``group`` is the prompt's position. Facts are the same on every rank; the tokens and the text of a row stay on
        the first rank of the replica that sampled it (``source``).

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
    rollouts = _rollouts(prompts, samples_per_prompt, found if engine.is_replica_leader else {}, version)
    means = rollouts.response_lengths.view(len(prompts), samples_per_prompt).double().mean(1)
    expected.observe(prompts, means.tolist())
    return rollouts


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
                return Finished.of(found, [])
            texts = decode([r.token_ids for r in found])
            if hear is not None:
                hear(index, texts)
            return Finished.of(found, texts)
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
        raise RunError(f"rollout: rank {rank()} failed: {type(error).__name__}: {error}") from error


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
    parts = [part for i, f in found.items() for part in (np.int32(i), f.token_ids.values.numpy())]
    digests = torch.zeros(world_size(), dtype=torch.int64)
    digests[rank()] = zlib.crc32(b"".join(part.tobytes() for part in parts))
    for index, replica in enumerate(sum_over_world(digests).view(engine.num_replicas, -1)):
        if (replica != replica[0]).any():
            raise RunError(f"rollout: the ranks of vLLM replica {index} sampled different tokens from the same seeds")


def _rollouts(
    prompts: Sequence[PromptDraw], samples_per_prompt: int, found: dict[int, Finished], version: int
) -> Rollouts:
    """Facts of all rows on every rank; tokens and texts stay where they were sampled. Collective.

    Args:
        found: what this rank contributes, by prompt, in their order.
    """
    prompt_of_row = torch.arange(len(prompts)).repeat_interleave(samples_per_prompt)
    num_rows = len(prompt_of_row)
    mine = torch.zeros(num_rows, dtype=torch.bool)
    mine[torch.isin(prompt_of_row, torch.tensor(list(found), dtype=torch.int64))] = True
    token_ids, log_probs, texts = (
        Ragged.concat([getattr(f, name) for f in found.values()]) if found else Ragged.empty(0, dtype)
        for name, dtype in (("token_ids", torch.int32), ("log_probs", torch.float32), ("texts", torch.uint8))
    )
    stopped = torch.tensor([stop for f in found.values() for stop in f.stopped], dtype=torch.int64)
    facts = torch.zeros(num_rows, 5, dtype=torch.int64)
    facts[mine] = torch.stack(
        [torch.ones_like(stopped), torch.full_like(stopped, rank()), token_ids.lengths, stopped, texts.lengths], 1
    )
    owners, source, lengths, stopped, text_bytes = sum_over_world(facts).unbind(1)
    if (owners != 1).any():
        row = int((owners != 1).nonzero()[0])
        raise RunError(f"rollout: row {row} of {num_rows} was sampled by {int(owners[row])} replicas")
    draws = [prompts[i] for i in prompt_of_row.tolist()]
    return Rollouts(
        record_ids=[draw.record_id for draw in draws],
        group=prompt_of_row,
        prompt_token_ids=[draw.prompt_token_ids for draw in draws],
        response_token_ids=token_ids.among(mine),
        responses=texts.among(mine),
        response_bytes=text_bytes,
        finish_reason=["stop" if stop else "length" for stop in stopped.tolist()],
        rollout_log_probs=log_probs.among(mine),
        response_lengths=lengths,
        source=source,
        labeled=torch.tensor([draw.labeled for draw in draws], dtype=torch.bool),
        weights_version=version,
    )
