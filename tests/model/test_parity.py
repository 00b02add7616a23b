"""Forward, loss and every gradient equal transformers', and HF -> Megatron -> HF returns the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import launch

TOLERANCE = 1e-4


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("nproc", "cases"), [(1, 4), (2, 16), (4, 16)])
def test_models_equal_transformers(tmp_path: Path, nproc: int, cases: int) -> None:
    """fp32, packed input, odd vocabulary, head_dim != hidden / heads; tied and untied, actor and critic."""
    result = launch(["-m", "tests.model.parity_worker", tmp_path], nproc, 200).check()
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == cases
    for line in lines:
        assert line["forward"] < TOLERANCE, line
        assert line["loss"] < TOLERANCE, line
        assert line["gradient"] < TOLERANCE, line
        assert line["roundtrip"], line
        assert line["parameters"] >= 20, line
