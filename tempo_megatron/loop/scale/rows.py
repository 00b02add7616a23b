"""The rows of one step where no prompt has been read and nothing sampled: lengths that are stated."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.schema import Config
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import RolloutBatch, Rollouts
from tempo_megatron.rollout.expected import ExpectedLengths
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.rollout.queue import PromptQueue

Draw = Literal["longest", "long tail"]

#: Of the long tail: median of the responses, as a fraction of the longest, and the deviation of the logarithm.
MEDIAN, SPREAD = 1 / 8, 1.0

DRAWS: dict[Draw, str] = {
    "longest": "every prompt and every response as long as the configuration allows",
    "long tail": "prompts uniform up to the longest; responses log-normal, median 1/8 of the longest, sigma 1, cut off",
}


@dataclass(frozen=True)
class Rows:
    """One step's.

    Attributes:
        prompts: labelled ones first.
        lengths: ``[N]`` int64 of the responses, prompt by prompt.
    """

    prompts: list[PromptDraw]
    lengths: torch.Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def samples(self) -> int:
        """Of each prompt."""
        return len(self.lengths) // max(1, len(self.prompts))


def draw_rows(config: Config, draw: Draw, prompts: Sequence[tuple[bool, list[int]]] | None = None) -> Rows:
    """Rows of a step of the config's stage.

    Args:
        prompts: (labelled, token ids) of real ones; None: made up.
    """
    data, random = config.data, np.random.default_rng(config.seed)
    if config.stage == "sft":
        counts, samples = {True: data.sft_batch_size}, 1
    else:
        counts = {True: data.labeled_prompts_per_step, False: data.unlabeled_prompts_per_step}
        samples = config.rollout.samples_per_prompt
    if prompts is None:
        kinds = [labeled for labeled, count in counts.items() for _ in range(count)]
        longest = data.max_prompt_tokens
        sizes = random.integers(1, longest + 1, len(kinds)) if draw == "long tail" else [longest] * len(kinds)
        prompts = [(labeled, [0] * int(size)) for labeled, size in zip(kinds, sizes, strict=True)]
    draws = [PromptDraw(f"{i}", ids, labeled, i * samples) for i, (labeled, ids) in enumerate(prompts)]
    longest = data.max_response_tokens
    lengths = torch.full((len(draws) * samples,), longest)
    if draw == "long tail":
        drawn = longest * MEDIAN * np.exp(SPREAD * random.standard_normal(len(lengths)))
        lengths = torch.from_numpy(drawn.clip(1, longest).astype(np.int64))
    return Rows(draws, lengths)


def queue_shares(rows: Rows, replicas: int, max_num_seqs: int) -> list[int]:
    """The replica that samples each prompt: dealt, then drawn by whoever has sampled least so far.

    ``rollout.queue.open_queue`` without its engine.
    """
    tokens = rows.lengths.view(len(rows.prompts), -1).sum(1).tolist()
    order = ExpectedLengths().order(rows.prompts)
    dealt = min(-(-max_num_seqs // rows.samples), -(-len(order) // replicas))
    counter = _Counter()
    queues = [PromptQueue(order, replica, replicas, dealt, counter) for replica in range(replicas)]
    shares, idle = [-1] * len(order), [(0, replica) for replica in range(replicas)]
    while idle:
        busy, replica = heapq.heappop(idle)
        if (position := queues[replica].draw()) is not None:
            shares[position] = replica
            heapq.heappush(idle, (busy + tokens[position], replica))
    return shares


class _Counter:
    """``rollout.queue.Counter`` of one process."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, count: int) -> int:
        self._count += count
        return self._count - count


def sampled(config: Config, rows: Rows, shares: Sequence[int], rank: int) -> RolloutBatch:
    """The rows as ``rank`` has them when all are sampled and verified: facts of all, tokens of what it has sampled.

    Outcomes alternate, so that every method has right and wrong ones.
    """
    n, samples = len(rows), rows.samples
    prompt_of_row = torch.arange(len(rows.prompts)).repeat_interleave(samples)
    source = torch.tensor(shares)[prompt_of_row] * config.rollout.tensor_parallel_size
    draws = [rows.prompts[i] for i in prompt_of_row.tolist()]
    labeled = torch.tensor([draw.labeled for draw in draws], dtype=torch.bool)
    held = torch.where(source == rank, rows.lengths, 0)
    tokens = int(held.sum())
    alternating = (torch.arange(n) % 2).float()
    batch = Rollouts(
        record_ids=[draw.record_id for draw in draws],
        group=prompt_of_row,
        prompt_token_ids=[draw.prompt_token_ids for draw in draws],
        response_token_ids=Ragged.of_lengths(torch.zeros(tokens, dtype=torch.int32), held),
        responses=Ragged.empty(n, torch.uint8),
        response_bytes=torch.zeros(n, dtype=torch.int64),
        finish_reason=["length"] * n,
        rollout_log_probs=Ragged.of_lengths(torch.zeros(tokens), held),
        response_lengths=rows.lengths,
        source=source,
        labeled=labeled,
        weights_version=0,
    ).with_outcomes(torch.where(labeled, alternating, torch.nan))
    asks = METHODS[config.stage].asks
    return replace(
        batch,
        answer_cluster=torch.arange(n) % 2 if asks == "equality" else batch.answer_cluster,
        oracle_outcome=alternating if asks == "truth" else batch.oracle_outcome,
    )
