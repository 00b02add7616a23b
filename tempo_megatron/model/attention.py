"""Causal attention by blocks of queries: memory that grows with the tokens, where no fused kernel does it whole.

A mask of all queries and keys is quadratic in the length, and so are the scores where torch multiplies them out: on a
GPU with a mask or in float32, when several heads share keys and values. Here a block's queries see the keys that they
need and no others, and nothing of a block is kept: the backward computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Scores of one block, as float32 of all heads of all sequences that are computed together, take so many bytes at most
#: (but for a block of one query); torch may hold some four times as much of them at a time.
BLOCK_BYTES = 256 << 20
#: A block of more queries than these has at most half as many as the window has keys, or an eighth of the sequence: not
#: many of the scores are masked then.
FEW_ROWS = 128


@dataclass(frozen=True)
class Layout:
    """Where the tokens of sequences of one length lie on this context rank, and what a token sees.

    Attributes:
        length: of each sequence, whole.
        cp_size, cp_rank: of the context group; the zig-zag of ``layers.context_positions``.
        window: tokens that one sees, itself included; None: all before it.
    """

    length: int
    cp_size: int
    cp_rank: int
    window: int | None

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(first position, place among this rank's tokens, tokens) of each run of neighbouring positions."""
        if self.cp_size == 1:
            return [(0, 0, self.length)]
        half = self.length // (2 * self.cp_size)
        return [(self.cp_rank * half, 0, half), ((2 * self.cp_size - 1 - self.cp_rank) * half, half, half)]

    def rows(self, heads: int) -> int:
        """Queries of a block; ``heads``: of all sequences that are computed together."""
        scores = BLOCK_BYTES // (4 * heads)
        found = scores // self.length
        if self.window is not None:  # of n queries, each key of the window before the first and n more
            found = max(found, (isqrt(self.window**2 + 4 * scores) - self.window) // 2)
        return max(1, min(found, max(FEW_ROWS, (self.window or self.length // 4) // 2)))

    def blocks(self, heads: int) -> Iterator[tuple[slice, slice, slice]]:
        """(places among this rank's tokens, their positions, positions of the keys that they see)."""
        rows = self.rows(heads)
        for first, place, tokens in self.spans:
            for begin in range(0, tokens, rows):
                end = min(begin + rows, tokens)
                seen = 0 if self.window is None else max(0, first + begin - self.window + 1)
                positions = slice(first + begin, first + end)
                yield slice(place + begin, place + end), positions, slice(seen, first + end)


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attention of ``count`` sequences of one length.

    Args:
        query: ``[count, length / cp, heads, d]``, this context rank's tokens.
        key, value: ``[cp, count, length / cp, kv_heads, d]``, those of all context ranks.
        scale: of the scores.

    Returns:
        As ``query``, in its dtype. Gradients of keys and values are added up over blocks in float32 at least.
    """
    output: Tensor = _Blockwise.apply(query, key, value, layout, scale)
    return output


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.scale = layout, scale
        keys, values = (_in_order(x) for x in (key, value))
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for places, positions, seen in layout.blocks(query.shape[0] * query.shape[2]):
            mask = _mask(positions, seen, layout.window, query.device)
            output[:, places] = _attend(query[:, places], keys[:, seen], values[:, seen], mask, scale)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        keys, values = (_in_order(x) for x in (key, value))
        of_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        exact = torch.promote_types(key.dtype, torch.float32)
        of_keys, of_values = (
            torch.zeros_like(x, dtype=exact, memory_format=torch.contiguous_format) for x in (keys, values)
        )
        for places, positions, seen in ctx.layout.blocks(query.shape[0] * query.shape[2]):
            mask = _mask(positions, seen, ctx.layout.window, query.device)
            with torch.enable_grad():
                block = [x.detach().requires_grad_() for x in (query[:, places], keys[:, seen], values[:, seen])]
                output = _attend(block[0], block[1], block[2], mask, ctx.scale)
            of_query[:, places], of_key, of_value = torch.autograd.grad(output, block, gradient[:, places])
            of_keys[:, seen].add_(of_key)
            of_values[:, seen].add_(of_value)
            del block, output, of_key, of_value
        cp = key.shape[0]
        return of_query, _dealt(of_keys, cp).to(key.dtype), _dealt(of_values, cp).to(key.dtype), None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """All ``[count, tokens, heads, d]``."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def _mask(positions: slice, seen: slice, window: int | None, device: torch.device) -> Tensor:
    """``[queries, keys]``, True where a query sees a key."""
    queries = torch.arange(positions.start, positions.stop, device=device).unsqueeze(1)
    keys = torch.arange(seen.start, seen.stop, device=device)
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def _in_order(x: Tensor) -> Tensor:
    """``[cp, count, length / cp, heads, d]`` of all context ranks -> ``[count, length, heads, d]`` by position."""
    cp = x.shape[0]
    if cp == 1:
        return x[0]
    front, back = x.unflatten(2, (2, -1)).unbind(2)
    return torch.cat([*front, *back.flip(0)], dim=1)


def _dealt(x: Tensor, cp: int) -> Tensor:
    """The inverse of ``_in_order``."""
    if cp == 1:
        return x.unsqueeze(0)
    chunks = x.unflatten(1, (2 * cp, -1)).unbind(1)
    return torch.stack([torch.cat([chunks[rank], chunks[-1 - rank]], dim=1) for rank in range(cp)])
