"""What vLLM's loaders put where, recorded from twins of tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tempo_megatron.errors import TempoError
from tempo_megatron.model.hf_tensors import expected_tensors
from tempo_megatron.reshard.plan import Destination
from tempo_megatron.reshard.regions import Region, matrix_shape
from tempo_megatron.rollout.landings import foreseen_destinations, region_of
from tests.rollout.reloading import held, load_by_vllm
from tests.rollout.tiny_models import TinyModel, build, source, stream


@pytest.mark.parametrize(
    ("view", "region"),
    [
        (lambda m: m, Region(0, 0, 6, 8)),
        (lambda m: m[2:5], Region(2, 0, 3, 8)),
        (lambda m: m[:, 3:5], Region(0, 3, 6, 2)),
        (lambda m: m[1:3, 4:], Region(1, 4, 2, 4)),
        (lambda m: m[4, 1:3], Region(4, 1, 1, 2)),
        (lambda m: m[4, 1], Region(4, 1, 1, 1)),
        (lambda m: m[1:4, 2], Region(1, 2, 3, 1)),
        (lambda m: m.view(2, 3, 8)[1], Region(3, 0, 3, 8)),
        (lambda m: m.view(3, 2, 2, 4)[1].flatten(0, 1), Region(2, 0, 2, 8)),
        (lambda m: m.view(-1)[8:24], Region(1, 0, 2, 8)),
        (lambda m: m.t(), None),
        (lambda m: m[::2], None),
        (lambda m: m[:, ::2], None),
        (lambda m: m.view(-1)[4:12], None),
        (lambda m: m[:1].expand(6, 8), None),
    ],
)
def test_a_view_is_a_rectangle_or_none(view: object, region: Region | None) -> None:
    matrix = torch.arange(48).view(6, 8)
    found = view(matrix)  # type: ignore[operator]
    assert region_of(found, 8) == region
    if region is not None:
        assert torch.equal(region.of(matrix).flatten(), found.flatten())


def _foreseen(tiny: TinyModel, size: int, *, experts: bool = False) -> list[Destination]:
    tensors = expected_tensors(tiny.first.config, "actor")
    return list(foreseen_destinations(tiny.folder, tensors, size, expert_parallel=experts, dtype="float32"))


def _loaded(destination: Destination, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {t.name: torch.full(matrix_shape(t.shape), torch.nan) for t in destination.targets}
    for number, region in destination.fills:
        region.of(found[destination.targets[number].name]).zero_()
    for number, name, mapped in destination.landings:
        tensor = tensors[name].view(matrix_shape(tensors[name].shape))
        mapped.local(mapped.region).of(found[destination.targets[number].name]).copy_(mapped.region.of(tensor))
    return found


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "tied_llama", "qwen3_moe", "olmo3"])
def test_places_that_do_not_exist_are_foreseen(family: str, size: int, request: pytest.FixtureRequest) -> None:
    """Each element of the checkpoint is in some place, and each element of a target is something."""
    tiny: TinyModel = request.getfixturevalue(family)
    found = _foreseen(tiny, size)
    times = {name: torch.zeros(matrix_shape(t.shape)) for name, t in stream(tiny.first)}
    for destination in found:
        assert destination.whole == ()
        loaded = _loaded(destination, dict(stream(tiny.first)))
        assert not any(value.isnan().any() for value in loaded.values())
        for _, name, mapped in destination.landings:
            mapped.region.of(times[name]).add_(1)
    assert all((count >= 1).all() for count in times.values())


def _environment() -> dict[str, str]:
    """But for what only vLLM reads."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}


def test_the_process_stays_as_it_was(olmo3: TinyModel) -> None:
    """OLMo-3 is built of transformers' class, which its other instances, and new ones, are of too."""
    tokens, before = torch.tensor([[1, 2, 3]]), _environment()
    logits = olmo3.first(tokens).logits
    _foreseen(olmo3, 2)
    assert _environment() == before
    again = type(olmo3.first)(olmo3.first.config)
    again.load_state_dict(olmo3.first.state_dict())
    assert torch.equal(olmo3.first(tokens).logits, logits)
    assert torch.equal(again(tokens).logits, logits)


def test_experts_are_dealt_whole(qwen3_moe: TinyModel) -> None:
    experts = [
        {landing.tensor.split(".experts.")[1].split(".")[0] for landing in d.landings if ".experts." in landing.tensor}
        for d in _foreseen(qwen3_moe, 2, experts=True)
    ]
    assert experts == [{"0", "1", "2"}, {"3", "4", "5"}]


def test_a_size_that_vllm_cannot_cut_is_told(qwen3: TinyModel) -> None:
    with pytest.raises(TempoError, match=r"vLLM cannot run .* on 3 ranks a replica"):
        _foreseen(qwen3, 3)


@pytest.fixture
def loaders_that_compute() -> Iterator[None]:
    """vLLM's loaders of row-parallel layers copy what they have computed, as they do where they convert."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    original = RowParallelLinear.weight_loader_v2

    def computing(self: RowParallelLinear, param: Tensor, loaded_weight: Tensor) -> None:
        original(self, param, loaded_weight * 1)

    RowParallelLinear.weight_loader_v2 = computing  # type: ignore[method-assign]
    yield
    RowParallelLinear.weight_loader_v2 = original  # type: ignore[method-assign]


def test_what_a_loader_computes_comes_whole(no_engine: None, loaders_that_compute: None, qwen3: TinyModel) -> None:
    engine = build(qwen3.folder)
    destination = engine._updater._weights.destination
    assert destination.whole == tuple(
        sorted(f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.o_proj", "mlp.down_proj"))
    )
    engine.update_weights(source(qwen3.second), 1)
    assert engine.last_update is not None
    assert engine.last_update.whole_bytes == 2 * 4 * (64 * 64 + 64 * 128)
    ours = held(engine)
    load_by_vllm(engine, dict(stream(qwen3.second)))
    theirs = held(engine)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    engine.close()
