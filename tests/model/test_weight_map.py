"""The weight map: every transform has an exact inverse, and HF names are those of transformers' own checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from tempo_megatron.checkpoint.hf_read import HFTensors, load_hf_config
from tempo_megatron.model.build import model_dims
from tempo_megatron.model.families import family_of
from tempo_megatron.model.families.base import VALUE_HEAD_RULES
from tempo_megatron.model.hf_tensors import expected_tensors, rules_for
from tempo_megatron.model.weight_map import (
    QKV,
    GateUp,
    ModelDims,
    Replicated,
    Split,
    Transform,
    Vocab,
    WeightRule,
    padded_vocab_size,
)
from tempo_megatron.reshard.regions import as_matrix, matrix_shape
from tests.model.published import PUBLISHED, write_config

TP = (1, 2, 4)


def numbered(*shape: int) -> Tensor:
    """Every element another number, exactly."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def shards(transform: Transform, tensors: list[Tensor], dims: ModelDims, size: int) -> list[Tensor]:
    parts = [transform.shard(tensors, dims, rank, size) for rank in range(size)]
    assert len({part.shape for part in parts}) == 1  # ranks gather them without asking for shapes
    return parts


def assert_round_trip(transform: Transform, tensors: list[Tensor], dims: ModelDims, size: int) -> list[Tensor]:
    parts = shards(transform, tensors, dims, size)
    back = transform.unshard(parts, dims)
    assert len(back) == len(tensors)
    for got, want in zip(back, tensors, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    return parts


SIZE = st.integers(1, 5)


@pytest.mark.parametrize("tp", TP)
@given(groups=SIZE, per_group=SIZE, head_dim=SIZE, width=SIZE)
def test_qkv(tp: int, groups: int, per_group: int, head_dim: int, width: int) -> None:
    kv, heads = tp * groups, tp * groups * per_group
    dims = ModelDims(heads, kv, head_dim, vocab_size=1)
    q, k, v = (
        numbered(heads * head_dim, width),
        -1 - numbered(kv * head_dim, width),
        0.5 + numbered(kv * head_dim, width),
    )
    parts = assert_round_trip(QKV(), [q, k, v], dims, tp)
    assert_qkv_order(parts, (q, k, v), dims)


@given(
    kv=SIZE, copies=st.sampled_from([2, 3, 4]), per_rank=st.integers(1, 2), half=st.integers(1, 3), bias=st.booleans()
)
def test_qkv_on_more_ranks_than_kv_heads(kv: int, copies: int, per_rank: int, half: int, bias: bool) -> None:
    """The rows are cut evenly, in the middle of heads too; no row is on two ranks."""
    tp, head_dim = kv * copies, copies * half
    dims = ModelDims(tp * per_rank, kv, head_dim, vocab_size=1)
    width = () if bias else (3,)
    q = numbered(dims.num_heads * head_dim, *width)
    k, v = -1 - numbered(kv * head_dim, *width), 0.5 + numbered(kv * head_dim, *width)
    parts = assert_round_trip(QKV(), [q, k, v], dims, tp)
    assert sum(part.numel() for part in parts) == q.numel() + k.numel() + v.numel()
    assert_qkv_order(parts, (q, k, v), dims)


def assert_qkv_order(parts: list[Tensor], qkv: tuple[Tensor, Tensor, Tensor], dims: ModelDims) -> None:
    """Megatron's: of each group its queries, its key, its value."""
    q, k, v = (t.reshape(len(t), -1) for t in qkv)
    kv, head_dim, width = dims.num_kv_heads, dims.head_dim, q.shape[1]
    per_group = dims.num_heads // kv
    rows = torch.cat(parts).reshape(kv, -1, width)
    for group, block in enumerate(rows):
        own = slice(group * head_dim, (group + 1) * head_dim)
        assert torch.equal(block[: per_group * head_dim], q.reshape(kv, -1, width)[group])
        assert torch.equal(block[per_group * head_dim : -head_dim], k[own])
        assert torch.equal(block[-head_dim:], v[own])


@pytest.mark.parametrize("tp", TP)
@given(rows=SIZE, width=SIZE)
def test_gate_and_up(tp: int, rows: int, width: int) -> None:
    gate, up = numbered(tp * rows, width), -1 - numbered(tp * rows, width)
    parts = assert_round_trip(GateUp(), [gate, up], ModelDims(1, 1, 1, 1), tp)
    for rank, part in enumerate(parts):
        own = slice(rank * rows, (rank + 1) * rows)
        assert torch.equal(part, torch.cat([gate[own], up[own]]))


@pytest.mark.parametrize("tp", TP)
@given(vocab=st.integers(1, 40), width=SIZE)
def test_vocabulary_is_padded_with_zeros_to_what_the_ranks_share(tp: int, vocab: int, width: int) -> None:
    table = 1 + numbered(vocab, width)
    parts = assert_round_trip(Vocab(), [table], ModelDims(1, 1, 1, vocab), tp)
    padded = torch.cat(parts)
    assert len(padded) == padded_vocab_size(vocab, tp)
    assert len(padded) % tp == 0
    assert vocab <= len(padded) < vocab + tp
    assert not padded[vocab:].any()


@pytest.mark.parametrize("tp", TP)
@given(n=SIZE, other=SIZE)
def test_split_and_replicated(tp: int, n: int, other: int) -> None:
    dims = ModelDims(1, 1, 1, 1)
    for dim, tensor in ((0, numbered(tp * n, other)), (1, numbered(other, tp * n)), (0, numbered(tp * n))):
        parts = assert_round_trip(Split(dim), [tensor], dims, tp)
        assert [p.shape[dim] for p in parts] == [n] * tp
    whole = numbered(n, other)
    assert all(torch.equal(part, whole) for part in assert_round_trip(Replicated(), [whole], dims, tp))


@pytest.mark.parametrize("transform", [Replicated(), Split(0), Vocab(), QKV(), GateUp()])
def test_tp_sharded_says_whether_ranks_hold_parts(transform: Transform) -> None:
    count = {QKV: 3, GateUp: 2}.get(type(transform), 1)
    tensors = [numbered(8, 3) for _ in range(count)]
    parts = shards(transform, tensors, ModelDims(4, 4, 2, 8), 2)
    assert transform.tp_sharded == (parts[0].numel() * 2 == sum(t.numel() for t in tensors))


# ---------------------------------------------------------------- families


def saved(path: Path, family: str, critic: bool = False, tied: bool = False) -> tuple[hf.PretrainedConfig, HFTensors]:
    """A random model of the family, written by transformers."""
    config = load_hf_config(write_config(path, family, tie_word_embeddings=tied))
    config.num_labels = 1
    auto = hf.AutoModelForTokenClassification if critic else hf.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return load_hf_config(path), HFTensors(path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", PUBLISHED)
def test_tensors_are_those_of_transformers_checkpoints(tmp_path: Path, family: str, tied: bool) -> None:
    config, tensors = saved(tmp_path, family, tied=tied)
    assert expected_tensors(config, "actor") == {name: tensors.shape_of(name) for name in tensors.names}
    assert ("lm_head.weight" in tensors.names) is not tied
    per_expert = {f"model.layers.3.mlp.experts.{e}.{n}_proj.weight" for e in range(8) for n in ("gate", "up", "down")}
    assert (per_expert <= tensors.names) is (family == "qwen3-moe")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "family", [family for family in PUBLISHED if family != "olmo3"]
)  # transformers has no such class
def test_tensors_of_critics_are_those_of_token_classifiers(tmp_path: Path, family: str, tied: bool) -> None:
    config, tensors = saved(tmp_path, family, critic=True, tied=tied)
    assert config.architectures == [PUBLISHED[family]["architectures"][0].replace("CausalLM", "TokenClassification")]
    assert expected_tensors(config, "critic") == {name: tensors.shape_of(name) for name in tensors.names}
    assert {name for rule in VALUE_HEAD_RULES for name in rule.hf} <= tensors.names


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", PUBLISHED)
def test_tensors_of_a_critic_are_the_backbone_and_a_head(tmp_path: Path, family: str, tied: bool) -> None:
    """Of families without a token classifier in transformers, too; tied embeddings are an actor's matter."""
    config = load_hf_config(write_config(tmp_path, family, tie_word_embeddings=tied))
    with torch.device("meta"):
        backbone = hf.AutoModelForCausalLM.from_config(config)
    tensors = revert_weight_conversion(backbone, dict(backbone.named_parameters()))  # experts one by one
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != "lm_head.weight"}
    wanted |= {"score.weight": (1, config.hidden_size), "score.bias": (1,)}
    assert expected_tensors(config, "critic") == wanted


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("family", PUBLISHED)
def test_every_tensor_of_a_checkpoint_comes_back(tmp_path: Path, family: str, tp: int) -> None:
    config, tensors = saved(tmp_path, family)
    dims, seen = model_dims(config), []
    for rule in rules_for(config, "actor"):
        for layer in range(4) if rule.per_layer else (None,):
            for expert in range(8) if rule.per_expert else (None,):
                names = rule.hf_names(layer, expert)
                assert_round_trip(rule.transform, [tensors(name) for name in names], dims, tp)
                seen += names
    assert len(seen) == len(set(seen))
    assert set(seen) == tensors.names


@pytest.mark.parametrize("family", PUBLISHED)
def test_rules_do_not_share_a_megatron_parameter(tmp_path: Path, family: str) -> None:
    config = load_hf_config(write_config(tmp_path, family))
    for role in ("actor", "critic"):
        names = [rule.megatron for rule in rules_for(config, role)]
        assert len(names) == len(set(names))
        assert set(family_of(config).rules) <= set(rules_for(config, role))


def test_names_of_a_layer_and_an_expert() -> None:
    rule = WeightRule(
        "l.{layer}.e.{expert}.w", ("m.{layer}.x.{expert}.a", "m.{layer}.x.{expert}.b"), GateUp(), ("a", "b a")
    )
    assert rule.per_layer and rule.per_expert
    assert rule.megatron_name(3, 1) == "l.3.e.1.w"
    assert rule.hf_names(11, 5) == ("m.11.x.5.a", "m.11.x.5.b")
    assert rule.hf_shapes({"a": 2, "b": 3, "c": 4}) == ((2,), (3, 2))


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize(
    "transform",
    [Replicated(), Split(0), Split(1), Vocab(), QKV(), GateUp()],
    ids=str.split("whole rows cols vocab qkv gate_up"),
)
@given(data=st.data())
def test_pieces_say_what_a_shard_is_made_of(transform: Transform, tp: int, data: st.DataObject) -> None:
    head, hidden = data.draw(SIZE), 4 * data.draw(SIZE)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    dims = ModelDims(groups * data.draw(st.sampled_from([1, 2])) * 4, groups, 4 * head, data.draw(st.integers(1, 9)))
    q, kv = dims.num_heads * dims.head_dim, groups * dims.head_dim
    shapes = {
        QKV: [(q, hidden), (kv, hidden), (kv, hidden)],
        GateUp: [(4 * head, hidden)] * 2,
        Vocab: [(dims.vocab_size, hidden)],
    }.get(type(transform), [(4 * head, hidden)])
    if data.draw(st.booleans()) and not (isinstance(transform, Split) and transform.dim == 1):
        shapes = [shape[:1] for shape in shapes]  # biases
    tensors = [numbered(*shape) + 1e6 * n for n, shape in enumerate(shapes)]
    for rank in range(tp):
        shard = transform.shard(tensors, dims, rank, tp)
        made = torch.zeros(matrix_shape(shard.shape), dtype=torch.float64)
        times = torch.zeros_like(made)
        for tensor, pieces in zip(tensors, transform.pieces(shapes, dims, rank, tp), strict=True):
            for piece in pieces:
                lands = piece.local(piece.region)
                lands.of(made).copy_(piece.region.of(as_matrix(tensor)))
                lands.of(times).add_(1)
        assert torch.equal(made.view(shard.shape), shard)
        assert times.max() <= 1 and (isinstance(transform, Vocab) or times.min() == 1)
