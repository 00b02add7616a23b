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
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.model import attention as blocks
from tempo_megatron.model import layers
from tempo_megatron.model.attention import Layout, blockwise_attention
from tempo_megatron.model.layers import PackedAttention, context_positions
from tempo_megatron.planner import layers as planned
from tempo_megatron.planner.layers import Pack
from tempo_megatron.planner.shadow import Meter
from tempo_megatron.planner.sizes import ModelSizes
from tests.live_bytes import LiveBytes
from tests.planner.cases import config_of

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


def random_qkv(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(tokens, heads, DIM, generator=g).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.fixture(params=[1, 1 << 10, 1 << 28], ids=["a query a block", "some", "one block"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", request.param)


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
@pytest.mark.usefixtures("block_bytes")
def test_one_rank(monkeypatch: pytest.MonkeyPatch, lengths: list[int], window: int | None) -> None:
    """Outputs and gradients."""
    qkv = [x.requires_grad_() for x in random_qkv(sum(lengths))]
    layer = attention(monkeypatch, ContextGroup(0, 1), window)
    output = layer(*qkv, packed_seq_params=packed(lengths))
    expected = dense(qkv, lengths, window, 1 / math.sqrt(DIM))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(output, qkv), gradients(expected, qkv), rtol=1e-5, atol=1e-5)


def gradients(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum that weighs every element otherwise."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad(output, list(inputs), weights.to(output.dtype))


@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.usefixtures("block_bytes")
def test_context_ranks(monkeypatch: pytest.MonkeyPatch, cp: int, window: int | None) -> None:
    """Each rank computes its tokens of every sequence from the keys and values of all, which get gradients of all."""
    lengths = [2 * cp * n for n in (1, 1, 2, 5, 5)]
    qkv = [x.requires_grad_() for x in random_qkv(sum(lengths))]
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
    outputs = []
    for rank in range(cp):
        layer = attention(monkeypatch, ContextGroup(rank, cp), window)
        outputs.append(layer(*(ranks[rank] for ranks in parts), packed_seq_params=packed(lengths)))
        torch.testing.assert_close(outputs[-1], expected[held[rank]], rtol=1e-5, atol=1e-6)
    found = gradients(torch.cat(outputs), qkv)
    torch.testing.assert_close(found, gradients(expected[torch.cat(held)], qkv), rtol=1e-5, atol=1e-5)


def test_layers_with_and_without_a_window_share_one_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [6, 6, 9]
    qkv, pack = random_qkv(sum(lengths)), packed(lengths)
    for window in (None, 4, 2, None, 4):
        layer = attention(monkeypatch, ContextGroup(0, 1), window, scale=0.7)
        output = layer(*qkv, packed_seq_params=pack)
        torch.testing.assert_close(output, dense(qkv, lengths, window, 0.7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_of_bfloat16_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Over as many blocks as there are queries they are as good as of one."""
    inputs = [x.unsqueeze(0).requires_grad_() for x in random_qkv(96, torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    layout, errors = Layout(96, 1, 0, window), {}
    expected = gradients(attended(exact, layout), exact)
    for size in (1, 1 << 28):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        found = gradients(attended(inputs, layout), inputs)
        errors[size] = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    assert max(errors[1]) < 0.01
    assert errors[1] == pytest.approx(errors[1 << 28], rel=0.2)


def attended(inputs: Sequence[Tensor], layout: Layout) -> Tensor:
    """On a rank that has all tokens of one sequence, ``[1, length, heads, d]`` each."""
    query, key, value = inputs
    return blockwise_attention(query, key.unsqueeze(0), value.unsqueeze(0), layout, 1 / math.sqrt(DIM))


@pytest.mark.parametrize("window", [None, 64])
def test_memory_grows_with_the_tokens_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Forward and backward, also where torch multiplies the scores out, as on a GPU with a mask."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 18)
    most, largest = {}, {}
    for length in (256, 512, 1024):
        inputs = [x.unsqueeze(0).requires_grad_() for x in random_qkv(length)]
        with sdpa_kernel(SDPBackend.MATH), LiveBytes() as live:
            gradients(attended(inputs, Layout(length, 1, 0, window)), inputs)
        most[length], largest[length] = live.most, live.largest
    of_tokens = 1024 * HEADS * DIM * 4
    assert max(largest.values()) <= max(blocks.BLOCK_BYTES, of_tokens)
    assert most[1024] - most[512] <= 2.2 * (most[512] - most[256])
    assert most[1024] <= 12 * of_tokens + 6 * blocks.BLOCK_BYTES < 1024 * 1024 * HEADS * 4 / 8


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("size", [1, 1 << 12, 1 << 14, 1 << 28])
def test_blocks_cover_each_query_once_within_their_bound(
    monkeypatch: pytest.MonkeyPatch, cp: int, window: int | None, size: int
) -> None:
    """And the planner counts the largest of them."""
    assert (planned.BLOCK_BYTES, planned.FEW_ROWS) == (blocks.BLOCK_BYTES, blocks.FEW_ROWS)
    length, count = 48, 3
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    monkeypatch.setattr(planned, "BLOCK_BYTES", size)
    monkeypatch.setattr(blocks, "FEW_ROWS", 2)
    monkeypatch.setattr(planned, "FEW_ROWS", 2)
    role = RoleConfig(init="-", parallel={"context_parallel_size": cp})
    sizes = ModelSizes.of(config_of("qwen3").to_dict())
    plan = planned.Layers(Meter(), sizes, role, "torch", Pack(length * count // cp, ((length, count),)), on_cpu=True)
    most = plan._block(length * count // cp, length, window)
    for rank in range(cp):
        made = list(Layout(length, cp, rank, window).blocks(plan.heads * count))
        positions = torch.cat([torch.arange(at.start, at.stop) for _, at, _ in made])
        assert torch.equal(positions, context_positions(length, cp, rank))
        for places, at, seen in made:
            rows, keys = at.stop - at.start, seen.stop - seen.start
            assert places.stop - places.start == rows <= most[0] and keys <= most[1]
            assert rows == 1 or 4 * count * plan.heads * rows * keys <= size


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
