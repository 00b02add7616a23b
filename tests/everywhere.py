"""What the ranks hold of a batch's rows, on every rank: for tests, which look at all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from tempo_megatron.data.ragged import Ragged
from tempo_megatron.parallel.distributed import gather_objects


def everywhere(held: Ragged) -> Ragged:
    """All rows, on every rank; ranks that hold the same row must have the same bits. Collective."""
    rows: list[Tensor] = [held.values.new_empty(0)] * len(held)
    for values, lengths in gather_objects((held.values.numpy(), [len(row) for row in held])):
        for i, row in enumerate(torch.from_numpy(values).split(lengths)):
            assert not len(row) or not len(rows[i]) or torch.equal(row, rows[i]), f"ranks differ in row {i}"
            rows[i] = row if len(row) else rows[i]
    return Ragged.of_lengths(torch.cat([held.values[:0], *rows]), torch.tensor([len(row) for row in rows]))
