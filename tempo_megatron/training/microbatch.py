"""Sequences -> packed micro-batches as Megatron takes them, and outputs back to padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tempo_megatron.data.packing import plan_microbatches
from tempo_megatron.parallel.device import device


@dataclass(frozen=True)
class Sequences:
    """N prompts with their responses; row i is ``prompts[i] + responses[i]``."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def longest_response(self) -> int:
        return max((len(r) for r in self.responses), default=0)


@dataclass(frozen=True)
class MicroBatch:
    """One packed forward pass of n sequences with t tokens in all.

    Attributes:
        rows: positions of the n sequences in the batch they come from.
        input_ids: ``[1, t]`` int64; padding to a multiple of the TP size stands at the end as a sequence of its own.
        position_ids: ``[1, t]`` int64, from 0 in each sequence.
        packed: cumulative lengths for attention and rope.
        response_lengths: ``[n]`` int64 T_i.
        first: ``[n]`` int64 position in the pack of the last prompt token, where y_0 is predicted.
    """

    rows: list[int]
    input_ids: Tensor
    position_ids: Tensor
    packed: PackedSeqParams
    response_lengths: Tensor
    first: Tensor
    targets: Tensor

    def positions(self, extra: int) -> tuple[Tensor, Tensor]:
        """Positions in the pack that feed outputs for response columns 0..T_i-1+extra of each row.

        Returns:
            flat pack positions ``[m]`` and their index ``[m]`` into a flattened ``[n, L + extra]`` table, where L is
            the longest response of the micro-batch.
        """
        counts = self.response_lengths + extra
        width = int(counts.max()) if len(counts) else 0
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        starts = counts.cumsum(0) - counts
        column = torch.arange(len(row), device=counts.device) - starts[row]
        return self.first[row] + column, row * width + column

    def table(self, flat: Tensor, index: Tensor, extra: int) -> Tensor:
        """Scatter ``flat [m]`` (as ``positions`` orders it) to ``[n, L + extra]``, 0 elsewhere; differentiable."""
        width = int(self.response_lengths.max()) + extra if self.rows else 0
        padded = flat.new_zeros(len(self.rows) * width)
        return padded.index_put((index,), flat).view(len(self.rows), width)


def make_microbatches(sequences: Sequences, max_tokens: int, shards: int, shard: int, align: int) -> list[MicroBatch]:
    """This data-parallel shard's packed micro-batches; every shard gets the same number.

    Args:
        max_tokens: token budget of a pack. Raises TempoError if a sequence is longer.
        align: pack lengths become a multiple of it (the TP size under sequence parallelism).
    """
    plan = plan_microbatches(sequences.lengths, max_tokens, shards)[shard]
    return [_pack(sequences, rows, align) for rows in plan]


def _pack(sequences: Sequences, rows: list[int], align: int) -> MicroBatch:
    lengths = sequences.lengths
    rows = sorted(rows, key=lambda r: (lengths[r], r))  # neighbours of one length are attended as one batch
    tokens = [[*sequences.prompts[r], *sequences.responses[r]] for r in rows]
    sizes = [len(t) for t in tokens]
    padding = -sum(sizes) % align if rows else align
    if padding:
        tokens.append([0] * padding)
        sizes.append(padding)
    where = device()
    size = torch.tensor(sizes, dtype=torch.int64)
    ends = size.cumsum(0)
    cumulative = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    starts = cumulative[:-1]
    positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(starts, size)
    cu_seqlens = cumulative.to(torch.int32).to(where)
    longest = max(sizes)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    prompt_lengths = torch.tensor([len(sequences.prompts[r]) for r in rows], dtype=torch.int64)
    return MicroBatch(
        rows=rows,
        input_ids=torch.tensor([t for seq in tokens for t in seq], dtype=torch.int64, device=where).unsqueeze(0),
        position_ids=positions.unsqueeze(0).to(where),
        packed=packed,
        response_lengths=torch.tensor([len(sequences.responses[r]) for r in rows], dtype=torch.int64, device=where),
        first=(starts[: len(rows)] + prompt_lengths - 1).to(where),
        targets=torch.tensor([t for r in rows for t in sequences.responses[r]], dtype=torch.int64, device=where),
    )
