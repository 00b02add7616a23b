"""What overlaps, or is computed twice, changes no number."""

from __future__ import annotations

import json

import pytest

from tests.launching import launch_ranks
from tests.training.schedule_worker import CASES, WAYS

NUMBERS = ("losses", "norms", "sums", "weights")


@pytest.mark.slow
def test_every_schedule_gives_the_same_bits() -> None:
    """Two ranks, data and pipeline parallel: gradients reduced while others are made, activations made again."""
    result = launch_ranks("tests.training.schedule_worker", nproc=2, timeout_s=120).check()
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    found = {(line["layout"], line["family"], line["way"]): line for line in lines}
    assert len(found) == sum(map(len, CASES.values())) * len(WAYS)
    for (layout, family, way), got in found.items():
        plain = found[layout, family, "plain"]
        assert {k: got[k] for k in NUMBERS} == {k: plain[k] for k in NUMBERS}, (layout, family, way)
        again = way in ("selective", "full")
        assert got["mlps"] == plain["mlps"] * (2 if again else 1), (layout, family, way)
