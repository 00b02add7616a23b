"""Checkpoints under one layout go on under another, on other numbers of ranks: weights, float32 masters and moments bit
for bit, and two further steps as the run makes them that goes on under its own layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tempo_megatron.checkpoint import load
from tempo_megatron.checkpoint.manifest import WholeCheckpoint, find_whole
from tempo_megatron.checkpoint.save import random_state_name
from tests.checkpoint.folders import seal
from tests.checkpoint.reshard_cases import CHAINS, WORLDS
from tests.launching import launch_ranks

TOLERANCE = 1e-6  #: of losses and gradient norms, both steps, float32
MOVED = 5e-4  #: of how far a weight moves in the steps


@pytest.mark.slow(45)
@pytest.mark.timeout(400)
def test_any_layout_to_any(tmp_path: Path) -> None:
    """A critic, with a float32 head when it is bfloat16; experts; biases, copied KV heads and uneven stages."""
    lines = []
    for number, ranks in enumerate(WORLDS):
        result = launch_ranks("tests.checkpoint.reshard_worker", tmp_path, str(number), nproc=ranks, timeout_s=150)
        lines += [json.loads(line) for line in result.check().stdout.splitlines() if line.startswith("{")]
    assert len(lines) == sum(len(names) for chain in CHAINS for names in chain.layouts) - len(CHAINS)
    for line in lines:
        assert line["moments"] >= 10, line
        assert line["same_state"], line
        assert line["same_folder"], line
        assert line["weights_alone"], line
        check_other_kinds(line)
        if line["dtype"] == "float32":
            assert line["loss"] < TOLERANCE and line["grad_norm"] < TOLERANCE and line["step"] < MOVED, line
        else:  # layouts round differently; the step of the equal state is what the float32 critic is for
            assert line["loss"] < 0.02 and line["grad_norm"] < 0.02, line


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_random_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """As they were where there are as many ranks; else of seed, position and rank."""
    (tmp_path / "rng").mkdir()
    for old in range(2):
        torch.manual_seed(old)
        save_file({"cpu": torch.get_rng_state()}, tmp_path / random_state_name(old))
    whole = find_whole(seal(tmp_path, world_size=2, config={"seed": 3}))
    monkeypatch.setattr(load, "world_size", lambda: ranks)

    def drawn(checkpoint: WholeCheckpoint) -> list[float]:
        numbers = []
        for rank in range(ranks):
            monkeypatch.setattr(load, "rank", lambda rank=rank: rank)
            load._go_on_drawing(checkpoint)
            numbers.append(torch.rand(()).item())
        return numbers

    numbers = drawn(whole)
    assert numbers == drawn(whole) and len(set(numbers)) == ranks
    others = [whole.manifest.model_copy(update=c) for c in ({"step": 2}, {"phase": "estep"}, {"config": {"seed": 4}})]
    if ranks == 2:
        assert numbers == [torch.rand((), generator=torch.Generator().manual_seed(old)).item() for old in range(2)]
    for manifest in others if ranks != 2 else []:
        assert not set(numbers) & set(drawn(WholeCheckpoint(tmp_path, manifest)))


def check_other_kinds(line: dict[str, Any]) -> None:
    """Only the distributed optimizer keeps its state in one form for every dtype."""
    told, role, dtype = line["other_kinds"], line["role"], line["dtype"]
    again = f"; to resume it must be the same (a new run can take the weights alone, by {role}.init)"
    own, other = ("true", "false") if line["distributed"] else ("false", "true")
    assert told["distributed"] == f"saved with {role}.optimizer.distributed: {own}, this run has {other}{again}", line
    other = "bfloat16" if dtype == "float32" else "float32"
    plain = f'saved with {role}.dtype (with optimizer.distributed: false): "{dtype}", this run has "{other}"{again}'
    assert told["dtype"] == ("accepted" if line["distributed"] else plain), line
