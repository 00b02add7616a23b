"""Sequences -> packed micro-batches as Megatron takes them, and outputs back to padded rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from tempo_megatron.data.homes import assign_homes, row_costs
from tempo_megatron.data.packing import plan_microbatches
from tempo_megatron.data.ragged import Ragged, positions
from tempo_megatron.model.layers import context_positions, keep_length_runs
from tempo_megatron.parallel.device import to_device


@dataclass(frozen=True)
class Sequences:
    """N prompts with their responses; row i is ``prompts[i] + responses[i]``.

    Attributes:
        prompts: N sequences of token ids.
        responses: N rows of int32 token ids; without tokens where this rank does not hold them.
        response_lengths: ``[N]`` int64 T_i, of all rows.
        homes: ``[N]`` int64, the data-parallel shard that computes each row, whose ranks hold its tokens; None: every
            rank holds all rows, and the engine deals them.
    """

    prompts: Sequence[Sequence[int]]
    responses: Ragged
    response_lengths: Tensor
    homes: Tensor | None = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Sequences:
        """From lists that every rank has."""
        held = Ragged.of_rows(responses, torch.int32)
        return cls(prompts, held, held.lengths)

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """``[N]`` int64."""
        return torch.tensor([len(p) for p in self.prompts], dtype=torch.int64)

    @cached_property  # asked for once a row
    def lengths(self) -> list[int]:
        return (self.prompt_lengths + self.response_lengths).tolist()

    def dealt(self, shards: int, hidden_size: int) -> Tensor:
        """``homes``, or where they are None those of rows that are all trained together."""
        if self.homes is not None:
            return self.homes
        together = np.zeros(len(self), dtype=np.int64)
        return torch.from_numpy(assign_homes(row_costs(self.lengths, hidden_size), [together], shards))


@dataclass(frozen=True)
class MicroBatch:
    """One packed forward pass of n sequences with t tokens in all, as one context rank sees it.

    With context parallelism each sequence is padded to a multiple of 2 cp tokens, and this rank holds t / cp of the
    tokens (``model.layers.context_positions``).

    Attributes:
        rows: positions of the n sequences in the batch they come from.
        input_ids: ``[1, t / cp]`` int64; padding for sequence parallelism stands at the end, a sequence of its own.
        position_ids: ``[1, t / cp]`` int64, from 0 in each sequence.
        packed: cumulative lengths of whole sequences, for attention and rope.
        order: ``[t]`` int64; where each token of the pack stands when the ranks' tokens are concatenated.
        predicting: positions in this rank's tokens of those that predict a response token, ``[m]`` int64.
        targets: the tokens that they predict, ``[m]`` int64.
        first: ``[n]`` int64 position in the pack of the last prompt token, where y_0 is predicted.
        response_lengths: ``[n]`` int64 T_i.
        longest_response: the largest T_i, 0 of no sequences; known on the host, as ``rows`` is.
    """

    rows: list[int]
    input_ids: Tensor
    position_ids: Tensor
    packed: PackedSeqParams
    order: Tensor
    predicting: Tensor
    targets: Tensor
    first: Tensor
    response_lengths: Tensor
    longest_response: int

    @property
    def tokens(self) -> int:
        """t, of all context ranks together."""
        return len(self.order)

    def gather(self, local: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
        """This rank's ``[t / cp]`` outputs -> the whole pack's ``[t]``, on every context rank; differentiable."""
        if cp_group.size() == 1:
            return local
        # every context rank computes the same loss of all tokens, so the backward only takes this rank's part
        every = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=False, group=cp_group)
        return every[self.order]

    def by_row(self, flat: Tensor, *, final_state: bool) -> Tensor:
        """Outputs ``[t]`` of the pack -> ``[n, L]``, 0 beyond each row's T_i; differentiable.

        With ``final_state`` also the output after the last token, where a value is read: ``[n, L + 1]``, T_i + 1.
        Column c of row i is the output at the token before y_c; L is the longest response of the micro-batch.
        """
        columns = torch.arange(self.longest_response + int(final_state) if self.rows else 0, device=flat.device)
        inside = columns < self.response_lengths.unsqueeze(1) + int(final_state)
        at = (self.first.unsqueeze(1) + columns).clamp(max=len(flat) - 1)  # picked by ``inside``, it would wait
        return flat[at].masked_fill(~inside, 0)


@dataclass(frozen=True)
class MicroBatches:
    """A data-parallel shard's micro-batches, each packed when it is asked for; every shard has as many.

    Attributes:
        sequences: all rows.
        plan: the rows of each pack.
        sizes: tokens of each pack, padding included.
        context_part: context-parallel (rank, size): each rank takes its tokens of every row.
        unit: what each sequence's length is padded to a multiple of.
    """

    sequences: Sequences
    plan: list[list[int]]
    sizes: list[int]
    context_part: tuple[int, int]
    unit: int

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[MicroBatch]:
        for rows, size in zip(self.plan, self.sizes, strict=True):
            yield _pack(self.sequences, rows, self.context_part, self.unit, size)


def make_microbatches(
    sequences: Sequences,
    homes: Tensor,
    max_tokens: int,
    data_part: tuple[int, int],
    context_part: tuple[int, int],
    *,
    align: int,
    multiple: int,
    equal_lengths: bool,
) -> MicroBatches:
    """This rank's packed micro-batches; every rank gets the same number, without asking the others.

    Args:
        homes: ``[N]`` int64, the data-parallel shard of each row.
        max_tokens: token budget of a pack, before padding. Raises TempoError if a sequence is longer.
        data_part: data-parallel (rank, size).
        context_part: context-parallel (rank, size).
        align: the tokens of a context rank become a multiple of it (the TP size under sequence parallelism, times
            what FP8 products are multiples of).
        multiple: the number of micro-batches becomes a multiple of it, by empty ones.
        equal_lengths: pad all packs of this rank to the longest.
    """
    shard, shards = data_part
    plan = plan_microbatches(sequences.lengths, max_tokens, homes.tolist(), shards)[shard]
    plan = plan + [[] for _ in range(-len(plan) % multiple)]
    unit = 2 * context_part[1] if context_part[1] > 1 else 1
    sizes = [sum(_up(sequences.lengths[r], unit) for r in rows) for rows in plan]
    sizes = [_up(max(n, 1), unit * align) for n in sizes]
    if equal_lengths:
        sizes = [max(sizes)] * len(sizes)
    return MicroBatches(sequences, plan, sizes, context_part, unit)


def _up(n: int, unit: int) -> int:
    """``n`` rounded up to a multiple of ``unit``."""
    return -(-n // unit) * unit


def _pack(sequences: Sequences, rows: list[int], context_part: tuple[int, int], unit: int, total: int) -> MicroBatch:
    """``total`` tokens: the rows, each padded to a multiple of ``unit``, and padding as a sequence of its own."""
    cp_rank, cp = context_part
    lengths = sequences.lengths
    rows = sorted(rows, key=lambda r: (lengths[r], r))  # neighbours of one length are attended as one batch
    sizes = [_up(lengths[r], unit) for r in rows]
    if padding := total - sum(sizes):
        sizes.append(padding)
    size = torch.tensor(sizes, dtype=torch.int64)
    cumulative = torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)])
    starts = cumulative[:-1]
    at = torch.tensor(rows, dtype=torch.int64)
    prompt_lengths, response_lengths = sequences.prompt_lengths[at], sequences.response_lengths[at]
    first = starts[: len(rows)] + prompt_lengths - 1

    tokens = torch.zeros(total, dtype=torch.int64)
    prompts = Ragged.of_rows([sequences.prompts[r] for r in rows], torch.int64)
    tokens[positions(starts[: len(rows)], prompt_lengths)] = prompts.values
    responses = sequences.responses.rows(at).values.to(torch.int64)
    predicted = positions(first, response_lengths)  # where the response's tokens are predicted, one before they stand
    tokens[predicted + 1] = responses
    targets = torch.full((total,), -1)
    targets[predicted] = responses
    order = torch.arange(total)
    mine: Tensor | slice = slice(None)
    if cp > 1:
        by_rank = [
            torch.cat([s + context_positions(n, cp, r) for s, n in zip(starts.tolist(), sizes, strict=True)])
            for r in range(cp)
        ]
        order, mine = torch.cat(by_rank).argsort(), by_rank[cp_rank]
    predicting = (targets[mine] >= 0).nonzero().squeeze(1)
    cu_seqlens = to_device(cumulative.to(torch.int32))
    longest = max(sizes)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    keep_length_runs(packed, sizes)
    return MicroBatch(
        rows=rows,
        input_ids=to_device(tokens[mine].unsqueeze(0)),
        position_ids=to_device((torch.arange(total) - starts.repeat_interleave(size))[mine].unsqueeze(0)),
        packed=packed,
        order=to_device(order),
        predicting=to_device(predicting),
        targets=to_device(targets[mine][predicting]),
        first=to_device(first),
        response_lengths=to_device(response_lengths),
        longest_response=int(response_lengths.max()) if rows else 0,
    )
