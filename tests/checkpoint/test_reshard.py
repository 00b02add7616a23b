"""Checkpoints under one layout go on under another: weights, float32 masters and moments bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import launch

TOLERANCE = 1e-6
#: of how far a weight moves in one step
MOVED = 5e-4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_any_layout_to_any(tmp_path: Path) -> None:
    """A critic, with a float32 head when it is bfloat16, and a mixture of experts."""
    result = launch(["-m", "tests.checkpoint.reshard_worker", tmp_path], 2, 280).check()
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 21
    for line in lines:
        assert line["moments"] >= 10, line
        assert line["same_state"], line
        assert line["same_folder"], line
        assert line["weights_alone"], line
        assert line["lr"] == 0, line
        if "float32" in line["case"]:
            assert line["loss"] < TOLERANCE and line["grad_norm"] < TOLERANCE and line["step"] < MOVED, line
        else:  # layouts round differently; the step of the equal state is what the float32 critic is for
            assert line["loss"] < 0.02 and line["grad_norm"] < 0.02, line
