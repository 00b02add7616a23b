"""Packed attention against a dense reference: windows, sequences of many lengths, zig-zag context parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tempo_megatron.model import layers
from tempo_megatron.model.layers import PackedAttention, context_positions

# TransformerConfig warns of its own default
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

HEADS, KV_HEADS, DIM = 6, 2, 5


class ContextGroup:
    """The context group of one rank, of which all live in this process."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def attention(
    monkeypatch: pytest.MonkeyPatch, group: ContextGroup, window: int | None, scale: float | None = None
) -> PackedAttention:
    """Layer 2 of two, the one with a window if there is one."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=DIM,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=[0, 1],
        use_cpu_initialization=True,
    )
    monkeypatch.setattr(layers.mpu, "get_context_parallel_group", lambda: group)
    return PackedAttention(config, 2, None, "self", softmax_scale=scale)


def packed(lengths: Sequence[int]) -> PackedSeqParams:
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cumulative, cu_seqlens_kv=cumulative)


def random_qkv(tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(tokens, heads, DIM, generator=g) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def dense(qkv: list[Tensor], lengths: Sequence[int], window: int | None, scale: float) -> Tensor:
    """Attention by its definition, query by query: token i of a sequence sees its last ``window`` tokens."""
    outputs = []
    for q, k, v in zip(*(x.split(list(lengths)) for x in qkv), strict=True):
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        for i in range(len(q)):
            first = 0 if window is None else max(0, i - window + 1)
            seen = slice(first, i + 1)
            weights = (torch.einsum("hd,jhd->hj", q[i], k[seen]) * scale).softmax(-1)
            outputs.append(torch.einsum("hj,jhd->hd", weights, v[seen]).flatten())
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 3, 3, 3, 7], [12, 4, 4, 9]])
def test_one_rank(monkeypatch: pytest.MonkeyPatch, lengths: list[int], window: int | None) -> None:
    qkv = random_qkv(sum(lengths))
    layer = attention(monkeypatch, ContextGroup(0, 1), window)
    output = layer(*qkv, packed_seq_params=packed(lengths))
    torch.testing.assert_close(output, dense(qkv, lengths, window, 1 / math.sqrt(DIM)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
@pytest.mark.parametrize("cp", [2, 4])
def test_context_ranks(monkeypatch: pytest.MonkeyPatch, cp: int, window: int | None) -> None:
    """Each rank computes its tokens of every sequence from the keys and values of all."""
    lengths = [2 * cp * n for n in (1, 1, 2, 5, 5)]
    qkv = random_qkv(sum(lengths))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    held = [
        torch.cat([s + context_positions(n, cp, rank) for s, n in zip(starts, lengths, strict=True)])
        for rank in range(cp)
    ]
    parts = [[x[at] for at in held] for x in qkv]  # [query, key, value][rank]

    def gather(x: Tensor, group: ContextGroup) -> Tensor:
        return next(torch.cat(ranks) for ranks in parts if ranks[group.rank()] is x)

    monkeypatch.setattr(layers, "gather_from_sequence_parallel_region", gather)
    expected = dense(qkv, lengths, window, 1 / math.sqrt(DIM))
    for rank in range(cp):
        layer = attention(monkeypatch, ContextGroup(rank, cp), window)
        output = layer(*(ranks[rank] for ranks in parts), packed_seq_params=packed(lengths))
        torch.testing.assert_close(output, expected[held[rank]], rtol=1e-5, atol=1e-6)


def test_layers_with_and_without_a_window_share_one_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are kept on the pack, for the next layer with the same window only."""
    lengths = [6, 6, 9]
    qkv, pack = random_qkv(sum(lengths)), packed(lengths)
    for window in (None, 4, 2, None, 4):
        layer = attention(monkeypatch, ContextGroup(0, 1), window, scale=0.7)
        output = layer(*qkv, packed_seq_params=pack)
        torch.testing.assert_close(output, dense(qkv, lengths, window, 0.7), rtol=1e-5, atol=1e-6)


def test_the_layer_without_a_window_of_a_model_that_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    second = attention(monkeypatch, ContextGroup(0, 1), 4)
    first = PackedAttention(second.config, 1, None, "self")
    assert (first.window, second.window) == (None, 4)


def test_input_that_is_not_packed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="packed_seq_params is required"):
        attention(monkeypatch, ContextGroup(0, 1), None)(*random_qkv(3))


@given(cp=st.integers(1, 8), chunk=st.integers(1, 6))
def test_zig_zag_deals_every_position_once_and_the_same_work_to_all(cp: int, chunk: int) -> None:
    length = 2 * cp * chunk
    held = [context_positions(length, cp, rank) for rank in range(cp)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(length))
    assert {len(positions) for positions in held} == {length // cp}
    assert len({int((positions + 1).sum()) for positions in held}) == 1  # keys that the rank's queries see
    assert all(bool((positions.diff() > 0).all()) for positions in held)
