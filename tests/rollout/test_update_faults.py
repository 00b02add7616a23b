"""Faults between the trainer's weights and vLLM's: each is found before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_megatron.errors import RunError
from tempo_megatron.reshard import transfer
from tempo_megatron.reshard.plan import Piece
from tempo_megatron.reshard.proof import Proof
from tempo_megatron.reshard.transfer import Transfer
from tempo_megatron.rollout import weights
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine
from tempo_megatron.rollout.update import PROVED_IN_TURN
from tempo_megatron.rollout.weights import RolloutReceiver, RolloutWeights
from tests.rollout.tiny_models import Engines, TinyModel, source

REQUEST = GenerationRequest([5, 6, 7], 0, 2, 4)
Patch = pytest.MonkeyPatch


@pytest.fixture
def engine(engines: Engines, request: pytest.FixtureRequest) -> Iterator[RolloutEngine]:
    """With the first weights; usable again after the test."""
    found = engines.of(request.param)
    found._failure, found._version = None, None
    found.update_weights(source(request.getfixturevalue(request.param).first), 1)
    found._version = None  # the next update is proved completely
    yield found
    found._failure, found._version = None, None


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> Callable[[RolloutEngine], TinyModel]:
    names = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe", "LlamaForCausalLM": "tied_llama"}

    def found(engine: RolloutEngine) -> TinyModel:
        ((architecture,),) = engine._llm.collective_rpc(lambda w: w.model_config.hf_config.architectures)
        model: TinyModel = request.getfixturevalue(names[architecture])
        return model

    return found


def _of(engine: RolloutEngine, ending: str) -> list[int]:
    """Numbers of the targets whose name ends so."""
    targets = engine._updater.plan.destinations[0].targets
    return [n for n, target in enumerate(targets) if target.name.endswith(ending)]


def _swap(engine: RolloutEngine, patch: Patch, one: str, other: str) -> None:
    """Where a piece of the one tensor should be read, that of the other is, and the other way round."""
    carried_out = engine._updater._transfer
    assert carried_out is not None
    pieces = [piece for bucket in carried_out.buckets for piece in bucket.local]
    first = next(piece for piece in pieces if piece.tensor.endswith(one))
    second = next(piece for piece in pieces if piece.tensor.endswith(other))
    assert first.region.rows == second.region.rows and first.region.cols == second.region.cols
    leaving = Transfer._leaving

    def swapped(self: Transfer, matrices: Any, piece: Piece) -> Tensor:
        return leaving(self, matrices, {first: second, second: first}.get(piece, piece))

    patch.setattr(Transfer, "_leaving", swapped)


def _skip_bucket(engine: RolloutEngine, patch: Patch) -> None:
    copied = Transfer._copy
    seen: list[int] = []

    def skipping(self: Transfer, pieces: list[Piece], *rest: Any) -> None:
        seen.append(1)
        if len(seen) != 1:
            copied(self, pieces, *rest)

    patch.setattr(Transfer, "_copy", skipping)


def _skip_copies(engine: RolloutEngine, patch: Patch) -> None:
    """Counted, but not done."""
    patch.setattr(transfer, "_copy_all", lambda to, of: None)


def _leave_one_stale(engine: RolloutEngine, patch: Patch) -> None:
    """A norm, written in place, keeps what it had."""
    copied = transfer._copy_all

    def all_but_one(to: list[Tensor], of: list[Tensor]) -> None:
        kept = [n for n, t in enumerate(to) if t.shape[1] != 1]
        copied([to[n] for n in kept], [of[n] for n in kept])

    patch.setattr(transfer, "_copy_all", all_but_one)


def _transpose(engine: RolloutEngine, patch: Patch) -> None:
    leaving = Transfer._leaving

    def transposed(self: Transfer, matrices: Any, piece: Piece) -> Tensor:
        found = leaving(self, matrices, piece)
        return found.t() if piece.tensor.endswith("layers.1.self_attn.o_proj.weight") else found

    patch.setattr(Transfer, "_leaving", transposed)


def _write_twice(engine: RolloutEngine, patch: Patch) -> None:
    """Other numbers land behind the right ones, uncounted."""
    norm = _of(engine, "input_layernorm.weight")[0]
    arrived = RolloutReceiver.finish

    def again(self: RolloutReceiver, bucket: int) -> None:
        arrived(self, bucket)
        self.matrix(norm).add_(1)

    patch.setattr(RolloutReceiver, "finish", again)


def _send_twice(engine: RolloutEngine, patch: Patch) -> None:
    carried_out = engine._updater._transfer
    assert carried_out is not None
    local = carried_out.buckets[0].local
    patch.setattr(carried_out.buckets[0], "local", [*local, local[-1]])


def _leave_head_packed_as_it_was(engine: RolloutEngine, patch: Patch) -> None:
    patch.setattr(RolloutWeights, "finish_heads", lambda self: None)


def _leave_a_module_unfinished(engine: RolloutEngine, patch: Patch) -> None:
    finish = weights._OpenModule.finish
    patch.setattr(
        weights._OpenModule,
        "finish",
        lambda self: None if "RowParallel" in type(self._module).__name__ else finish(self),
    )


def _keep_prefix_cache(engine: RolloutEngine, patch: Patch) -> None:
    patch.setattr(engine._llm, "reset_prefix_cache", lambda: True)


def _see_nothing(engine: RolloutEngine, patch: Patch) -> None:
    patch.setattr(Proof, "see", lambda self, target, matrix, is_lent: None)


def _flip_a_bit(engine: RolloutEngine, patch: Patch) -> None:
    arrived = RolloutReceiver.finish

    def flipped(self: RolloutReceiver, bucket: int) -> None:
        first = min(self._matrices)
        self.matrix(first).view(torch.int32)[0, 0] ^= 1
        arrived(self, bucket)

    patch.setattr(RolloutReceiver, "finish", flipped)


DIFFER = "did not land: on rank 0 {} of {} tensors differ from the trainer's, such as {}"
FAULTS: list[tuple[str, Callable[[RolloutEngine, Patch], None], str]] = [
    ("qwen3", _skip_bucket, r"rank 0 moved .*local=\d+.* in an update of the rollout's weights, .*planned"),
    ("qwen3", _skip_copies, DIFFER.format("21", "25", "model.embed_tokens")),
    ("qwen3", _leave_one_stale, DIFFER.format("9", "25", r"model\.layers\.0\.")),
    ("qwen3", _transpose, DIFFER.format("1", "25", r"model\.layers\.1\.self_attn\.o_proj")),
    ("qwen3", _write_twice, DIFFER.format("1", "25", r"model\.layers\.0\.input_layernorm")),
    ("qwen3", _send_twice, r"rank 0 moved .* in an update of the rollout's weights"),
    ("qwen3", _see_nothing, DIFFER.format("25", "25", "model.embed_tokens")),
    ("qwen3", _flip_a_bit, DIFFER.format("1", "25", "model")),
    ("qwen3", _keep_prefix_cache, "vLLM kept its prefix cache in the update to weights version 2"),
    ("qwen3", _leave_a_module_unfinished, r"vLLM did not finish model\.layers\.0\.mlp\.down_proj"),
    ("tied_llama", _leave_head_packed_as_it_was, "vLLM did not finish lm_head"),
    (
        "qwen3",
        lambda e, p: _swap(e, p, "q_proj.weight", "k_proj.weight"),
        DIFFER.format("2", "25", r"model\.layers\.0"),
    ),
    (
        "qwen3",
        lambda e, p: _swap(e, p, "0.mlp.gate_proj.weight", "1.mlp.gate_proj.weight"),
        DIFFER.format("2", "25", "m"),
    ),
    ("qwen3_moe", lambda e, p: _swap(e, p, "experts.1.up_proj.weight", "experts.4.up_proj.weight"), "2 of 83 tensors"),
    ("qwen3_moe", lambda e, p: _swap(e, p, "0.gate_proj.weight", "0.up_proj.weight"), "2 of 83 tensors differ"),
]


@pytest.mark.parametrize(("engine", "fault", "message"), FAULTS, indirect=["engine"])
def test_a_fault_is_found_before_anything_is_sampled(
    engine: RolloutEngine,
    fault: Callable[[RolloutEngine, Patch], None],
    message: str,
    tiny: Callable[[RolloutEngine], TinyModel],
    monkeypatch: Patch,
) -> None:
    second = tiny(engine).second
    if fault is _keep_prefix_cache:  # something must be in it
        engine.update_weights(source(second), 1)
        engine.generate([GenerationRequest([5 + i % 7 for i in range(100)], 0, 1, 4)], 1)
        engine._version = None
    with monkeypatch.context() as patch:
        fault(engine, patch)
        with pytest.raises(RunError, match=message):
            engine.update_weights(_again(engine, second), 2)
    for version in (1, 2):
        with pytest.raises(RunError, match="unusable: the update to weights version 2 did not finish"):
            engine.generate([REQUEST], version)


def _again(engine: RolloutEngine, model: Any) -> Any:
    """The model's tensors under the plan that the engine has."""
    new, old = source(model), engine._updater._planned_for
    assert old is not None and new.holdings.shapes == old.shapes
    return replace(new, holdings=old)


@pytest.mark.parametrize("engine", ["qwen3"], indirect=True)
def test_a_lasting_fault_is_found_in_turn(
    engine: RolloutEngine, tiny: Callable[[RolloutEngine], TinyModel], monkeypatch: Patch
) -> None:
    second = tiny(engine).second
    engine.update_weights(_again(engine, second), 0)
    with monkeypatch.context() as patch:
        _transpose(engine, patch)
        with pytest.raises(RunError, match="o_proj"):
            for version in range(1, PROVED_IN_TURN + 1):
                engine.update_weights(_again(engine, second), version)
    engine._failure = None


@pytest.mark.parametrize("engine", ["qwen3"], indirect=True)
def test_vllm_keeps_nothing_of_the_trainers_memory(
    engine: RolloutEngine, tiny: Callable[[RolloutEngine], TinyModel]
) -> None:
    weights = _again(engine, tiny(engine).second)
    engine.update_weights(weights, 1)
    before = engine.generate([REQUEST], 1)
    held = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    for tensor in weights.tensors.values():
        tensor.zero_()
    assert engine.generate([REQUEST], 1) == before
    for name, tensor in weights.tensors.items():
        tensor.copy_(held[name])
    engine.update_weights(weights, 2)
    assert all(torch.equal(tensor, held[name]) for name, tensor in weights.tensors.items())
    assert engine.generate([REQUEST], 2) == before


@pytest.mark.parametrize("engine", ["qwen3"], indirect=True)
def test_what_is_proved_is_told(engine: RolloutEngine, tiny: Callable[[RolloutEngine], TinyModel]) -> None:
    second = tiny(engine).second
    checked = []
    for version in range(PROVED_IN_TURN + 1):
        engine.update_weights(_again(engine, second), version)
        assert engine.last_update is not None and engine.last_update.tensors == 25
        checked.append(engine.last_update.proved)
    assert checked[0] == 25 and sum(checked[1:]) == 25, "all at first, then each once in turn"
    engine.parts.weights.sleep()
    for part in engine.parts:
        part.wake()
    engine.update_weights(_again(engine, second), 99)
    assert engine.last_update is not None and engine.last_update.proved == 25, "memory that was away is proved anew"
