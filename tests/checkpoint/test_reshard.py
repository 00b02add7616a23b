"""Checkpoints under one layout go on under another: weights, float32 masters and moments bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import launch_ranks

TOLERANCE = 1e-6
#: of how far a weight moves in one step
MOVED = 5e-4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_any_layout_to_any(tmp_path: Path) -> None:
    """A critic, with a float32 head when it is bfloat16; experts; biases, copied KV heads and uneven stages."""
    result = launch_ranks("tests.checkpoint.reshard_worker", tmp_path, nproc=2, timeout_s=280).check()
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 21
    for line in lines:
        assert line["moments"] >= 10, line
        assert line["same_state"], line
        assert line["same_folder"], line
        assert line["weights_alone"], line
        assert line["lr"] == 0, line
        check_other_kinds(line)
        if line["dtype"] == "float32":
            assert line["loss"] < TOLERANCE and line["grad_norm"] < TOLERANCE and line["step"] < MOVED, line
        else:  # layouts round differently; the step of the equal state is what the float32 critic is for
            assert line["loss"] < 0.02 and line["grad_norm"] < 0.02, line


def check_other_kinds(line: dict[str, Any]) -> None:
    """Only the distributed optimizer keeps its state in one form for every dtype."""
    told, role, dtype = line["other_kinds"], line["role"], line["dtype"]
    again = f"; to resume it must be the same (a new run can take the weights alone, by {role}.init)"
    own, other = ("true", "false") if line["distributed"] else ("false", "true")
    assert told["distributed"] == f"saved with {role}.optimizer.distributed: {own}, this run has {other}{again}", line
    other = "bfloat16" if dtype == "float32" else "float32"
    plain = f'saved with {role}.dtype (with optimizer.distributed: false): "{dtype}", this run has "{other}"{again}'
    assert told["dtype"] == ("accepted" if line["distributed"] else plain), line
