"""FP8 by blocks: the arithmetic, and codes and scales of any layout without processes."""

from __future__ import annotations

import json
import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_megatron.config.layout import divisors
from tempo_megatron.errors import TempoError
from tempo_megatron.model.held import megatron_holdings
from tempo_megatron.reshard.fp8 import (
    Blocks,
    QuantisedSource,
    Quantiser,
    RoundedSource,
    blocks_begun_in,
    blocks_of,
    encode,
    largest,
    quantise,
    quantised_tensors,
    scale_name,
    scales_of,
)
from tempo_megatron.reshard.holdings import Holdings, WeightSource, whole_tensors
from tempo_megatron.reshard.plan import Destination, Plan
from tempo_megatron.reshard.proof import Proof
from tempo_megatron.reshard.regions import Region, matrix_shape
from tempo_megatron.reshard.transfer import Transfer
from tests.launching import launch_ranks
from tests.reshard.fp8_worker import CASES, Targets
from tests.reshard.worlds import (
    arrived,
    by_definition,
    decode_by_definition,
    destinations,
    held_by,
    in_fp8,
    layouts,
    lower_bound,
    model,
    quantised_model,
    quantised_names,
    quantised_sources,
    taken_by,
    whole_model,
)

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _values(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 6, (rows, cols), generator=generator)
    return torch.ldexp(torch.randn(rows, cols, generator=generator), exponents).to(dtype)


# --- the arithmetic


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block"), [((1, 1), 4), ((8, 8), 4), ((9, 5), 4), ((130, 257), 128), ((300, 128), 128)]
)
def test_it_is_what_it_is_defined_as(shape: tuple[int, int], block: int, dtype: torch.dtype) -> None:
    values = _values(*shape, dtype)
    codes, scales = quantise(values, block)
    wanted = by_definition(values, block)
    assert torch.equal(_bits(codes), _bits(wanted[0])) and torch.equal(scales, wanted[1])
    assert codes.dtype == FP8 and scales.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_about_its_code_times_its_scale(dtype: torch.dtype) -> None:
    values = _values(200, 150, dtype)
    codes, scales = quantise(values, 32)
    scale = scales.repeat_interleave(32, 0)[:200].repeat_interleave(32, 1)[:, :150]
    error = (codes.float() * scale - values.float()).abs()
    # half of a step: 2^-4 of a normal number, 2^-10 scales of a smaller one
    assert (error <= 1.000001 * torch.maximum(values.float().abs() * 2**-4, scale * 2**-10)).all()


@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 2.0**9])
def test_every_finite_code_is_reached_by_its_own_value(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    codes = codes[codes.float().isfinite()]
    assert len(codes) == 254
    found, scales = quantise(codes.float().mul(scale).view(1, -1), 256)
    assert torch.equal(_bits(found.view(-1)), _bits(codes)) and scales.item() == scale


@given(st.floats(2.0**-13, 2.0**127, width=32), st.booleans())
def test_the_largest_of_a_block_is_the_largest_code(value: float, negative: bool) -> None:
    codes, _ = quantise(torch.tensor([[-value if negative else value, value / 3, 0.0]]))
    assert codes[0, 0].float().abs() == 448 and codes.float().isfinite().all()


def test_blocks_of_zeros_and_of_next_to_nothing() -> None:
    values = torch.zeros(8, 8)
    values[:4, 4:] = 1e-30
    codes, scales = quantise(values, 4)
    assert (codes.float() == 0).all() and (scales == torch.tensor(1e-4) / 448).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_in_its_block(bad: float) -> None:
    values = _values(8, 8, torch.bfloat16)
    values[5, 2] = bad
    codes, scales = quantise(values, 4)
    ill = codes.float().isnan()
    assert ill[5, 2] and not ill[:4].any() and not ill[:, 4:].any()
    assert not scales[1, 0].isfinite() and scales.isfinite().sum() == 3


@settings(deadline=None)
@given(st.sampled_from(DTYPES), st.integers(1, 20), st.integers(1, 20), st.integers(1, 7), st.data())
def test_parts_make_what_the_whole_makes(
    dtype: torch.dtype, rows: int, cols: int, block: int, data: st.DataObject
) -> None:
    values = _values(rows, cols, dtype)
    codes, scales = by_definition(values, block)
    row, col = data.draw(st.integers(0, rows)), data.draw(st.integers(0, cols))
    parts = [
        Region(r, c, height, width)
        for r, height in ((0, row), (row, rows - row))
        for c, width in ((0, col), (col, cols - col))
        if height and width
    ]
    found, begun = torch.zeros(scales.shape), torch.zeros(scales.shape)
    for part in parts:
        at = blocks_of(part, block).of(found)
        at.copy_(torch.maximum(at, largest(part.of(values), part, block)))
        own = blocks_begun_in(part, block)
        if own is not None:
            own.of(begun).add_(1)
    assert torch.equal(scales_of(found), scales) and (begun == 1).all()
    for part in parts:
        some = encode(part.of(values), part, blocks_of(part, block).of(scales), block)
        assert torch.equal(_bits(some), _bits(part.of(codes)))


def test_the_pieces_of_a_large_matrix_are_scaled_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _values(50, 40, torch.bfloat16)
    monkeypatch.setattr("tempo_megatron.reshard.fp8._CHUNK", 100)
    assert torch.equal(_bits(quantise(values, 16)[0]), _bits(by_definition(values, 16)[0]))


# --- layouts


def _world(seed: int, world: int) -> tuple[Holdings, list[Destination], int]:
    """Of random models and layouts on both sides, with blocks that shards often cut."""
    rng = random.Random(seed)
    experts = rng.random() < 0.5
    sizes = {"layers": rng.randint(1, 3), "heads": 8, "kv": rng.choice([1, 2, 4, 8]), "vocab": 37}
    config = model(experts=experts, tied=rng.random() < 0.5, **sizes)
    layout = rng.choice(layouts(config, world))
    size = rng.choice([size for size in divisors(world) if size <= 8])
    block = rng.choice([3, 4, 5, 7, 12])
    into = destinations(config, size, expert_parallel=experts and rng.random() < 0.5)
    return megatron_holdings(config, "actor", layout, world), [in_fp8(d, block) for d in into], block


def _cut_blocks(holdings: Holdings, name: str, block: int) -> int:
    owner = torch.zeros(holdings.shapes[name], dtype=torch.int64)
    for part, mapped in holdings.by_tensor[name]:
        mapped.region.of(owner).fill_(part)
    starts = [(row, col) for row in range(0, owner.shape[0], block) for col in range(0, owner.shape[1], block)]
    return sum(len(owner[row : row + block, col : col + block].unique()) > 1 for row, col in starts)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 6, 8, 16]))
def test_every_target_gets_what_quantising_whole_tensors_gives_it(seed: int, world: int) -> None:
    trainer, into, block = _world(seed, world)
    blocks = Blocks(trainer, quantised_tensors(into), block)
    plan = Plan(blocks.holdings, into, random.Random(seed).choice([256, 4096, 2**20]), world)
    shapes = enumerate(trainer.shapes.items())
    tensors = {name: _values(*matrix_shape(shape), torch.float32, n).view(shape) for n, (name, shape) in shapes}
    sources = quantised_sources(blocks, trainer, tensors)
    checkpoint = quantised_model(tensors, block)
    for rank in range(world):
        found, wanted = arrived(plan, sources, rank), taken_by(plan.destination_of(rank), checkpoint)
        for got, want, target in zip(found, wanted, plan.destination_of(rank).targets, strict=True):
            assert torch.equal(_bits(got), _bits(want)), target.name


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]))
def test_rounded_weights_are_those_of_whole_tensors(seed: int, world: int) -> None:
    """For replicas without FP8: codes times scales, in the layout of the weights themselves."""
    trainer, with_scales, block = _world(seed, world)
    names = quantised_tensors(with_scales)
    into = [_in_float32(destination) for destination in with_scales]
    plan = Plan(trainer, into, random.Random(seed).choice([256, 4096, 2**20]), world)
    shapes = enumerate(trainer.shapes.items())
    tensors = {name: _values(*matrix_shape(shape), torch.float32, n).view(shape) for n, (name, shape) in shapes}
    quantised = quantised_sources(Blocks(trainer, names, block), trainer, tensors)
    sources = [
        RoundedSource.of(WeightSource(trainer, held_by(trainer, rank, tensors), lambda: None), q)
        for rank, q in enumerate(quantised)
    ]
    rounded = {n: decode_by_definition(t, block) if n in names else t for n, t in tensors.items()}
    for rank in range(world):
        found, wanted = arrived(plan, sources, rank), taken_by(plan.destination_of(rank), rounded)
        for got, want, target in zip(found, wanted, plan.destination_of(rank).targets, strict=True):
            assert torch.equal(got, want), target.name


def _in_float32(destination: Destination) -> Destination:
    """``worlds.in_fp8`` undone."""
    kept = [n for n, target in enumerate(destination.targets) if "_scale_inv" not in target.name]
    assert kept == [*range(len(kept))]
    targets = [replace(destination.targets[n], dtype="float32", itemsize=4) for n in kept]
    landings = [landing for landing in destination.landings if landing.target < len(kept)]
    return replace(destination, targets=tuple(targets), landings=tuple(landings))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8, 12, 16, 32]))
def test_one_number_is_told_of_a_cut_block_and_no_byte_moves_that_is_there(seed: int, world: int) -> None:
    trainer, into, block = _world(seed, world)
    names = quantised_tensors(into)
    assert names == quantised_names(trainer.shapes)
    blocks = Blocks(trainer, names, block)
    assert blocks.told == sum(_cut_blocks(trainer, name, block) for name in names)
    plan = Plan(blocks.holdings, into, 4096, world)
    assert plan.traffic().received.tolist() == [lower_bound(plan, rank) for rank in range(world)]


def test_nothing_is_told_where_no_block_is_cut() -> None:
    config = model(experts=False, tied=False, layers=1, heads=8, kv=8, vocab=64)
    layout = next(one for one in layouts(config, 2) if one.tensor_model_parallel_size == 2)
    trainer = megatron_holdings(config, "actor", layout, 2)
    assert Blocks(trainer, quantised_names(trainer.shapes), 4).told == 0
    assert Blocks(trainer, quantised_names(trainer.shapes), 5).told > 0


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.9.mlp.up_proj.weight"])
def test_what_is_no_matrix_of_the_trainer_is_refused(name: str) -> None:
    config = model(experts=False, tied=False, layers=1, heads=8, kv=2, vocab=37)
    trainer = megatron_holdings(config, "actor", layouts(config, 1)[0], 1)
    with pytest.raises(TempoError, match=f"{name} cannot be quantised by blocks"):
        Blocks(trainer, {name})


def test_a_destination_that_takes_codes_without_scales_is_refused() -> None:
    config = model(experts=False, tied=False, layers=1, heads=8, kv=2, vocab=37)
    trainer = megatron_holdings(config, "actor", layouts(config, 1)[0], 1)
    (into,) = destinations(config, 1)
    blocks = Blocks(trainer, quantised_names(trainer.shapes), 4)
    with pytest.raises(TempoError, match=r"takes nothing of .*_scale_inv"):
        Plan(blocks.holdings, [into], 4096, 1)


# --- the proof


@pytest.fixture(scope="module")
def landed() -> tuple[Plan, QuantisedSource, Targets]:
    config = model(experts=True, tied=False, layers=2, heads=8, kv=2, vocab=37)
    into = [in_fp8(destination, 4) for destination in destinations(config, 1)]
    trainer = whole_tensors(whole_model(config, 0), 1)
    blocks = Blocks(trainer.holdings, quantised_tensors(into), 4)
    plan = Plan(blocks.holdings, into, 4096, 1)
    source = Quantiser(blocks, 0, None, CPU).run(trainer)
    targets = Targets(plan, 0)
    moved = Transfer(plan, 0, None, CPU).run(source, targets)
    assert moved.local == plan.traffic().local[0] and moved.received == moved.sent == 0
    return plan, source, targets


def _differing(landed: tuple[Plan, QuantisedSource, Targets]) -> list[str]:
    plan, source, targets = landed
    proof = Proof(plan, 0, CPU)
    for number, matrix in enumerate(targets.matrices):
        proof.see(number, matrix, is_lent=False)
    return proof.differing(source, None)


def _number(landed: tuple[Plan, QuantisedSource, Targets], tensor: str) -> int:
    return next(landing.target for landing in landed[0].destinations[0].landings if landing.tensor == tensor)


CODES = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_codes_of_one_bucket_are_there_at_a_time(
    landed: tuple[Plan, QuantisedSource, Targets], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, source, _ = landed
    live, most = 0, 0

    def gone(size: int) -> None:
        nonlocal live
        live -= size

    def counted(*args: Any) -> Tensor:
        nonlocal live, most
        codes = encode(*args)
        live += codes.nbytes
        most = max(most, live)
        weakref.finalize(codes, gone, codes.nbytes)
        return codes

    monkeypatch.setattr("tempo_megatron.reshard.fp8.encode", counted)
    Transfer(plan, 0, None, CPU).run(source, Targets(plan, 0))
    assert plan.num_buckets > 5 and live == 0
    assert 0 < most <= max(plan.buffer_bytes)


def test_what_has_landed_is_proved(landed: tuple[Plan, QuantisedSource, Targets]) -> None:
    assert _differing(landed) == []


@pytest.mark.parametrize("tensor", [CODES, scale_name(CODES)])
@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_is_found(landed: tuple[Plan, QuantisedSource, Targets], tensor: str, bit: int) -> None:
    where = next(one.mapped for one in landed[0].destinations[0].landings if one.tensor == tensor)
    matrix = landed[2].matrices[_number(landed, tensor)]
    byte = matrix.view(torch.uint8)[where.row, where.col * matrix.element_size()]
    byte ^= 1 << bit
    try:
        assert _differing(landed) == [tensor]
    finally:
        byte ^= 1 << bit
    assert _differing(landed) == []


def test_swapped_scales_are_found(landed: tuple[Plan, QuantisedSource, Targets]) -> None:
    scales = landed[2].matrices[_number(landed, scale_name(CODES))]
    before = scales.clone()
    scales[[0, 1]] = before[[1, 0]]
    try:
        assert _differing(landed) == [scale_name(CODES)]
    finally:
        scales.copy_(before)


# --- ranks


@pytest.mark.slow
def test_ranks_bring_and_prove_them() -> None:
    """Four ranks over gloo: the told numbers, the messages and the proof."""
    out = launch_ranks("tests.reshard.fp8_worker", nproc=4, timeout_s=60).check().stdout
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == len(CASES)
    for case in found:
        assert case["equal"] == [True] * 4 and case["differing"] == [[]] * 4, case
        assert case["altered"] == [["model.layers.0.mlp.down_proj.weight"]] * 4, case
    assert any(case["told"] for case in found) and any(sum(case["received"]) for case in found)
