"""Delayed scaling's state as Transformer Engine keeps it, in checkpoints: each layer's own, in any layout.

Modules with such a state stand in for its own, which take a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import launch_ranks


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_extra_states_go_through_layouts_and_begin_anew_where_there_are_none(tmp_path: Path) -> None:
    launch_ranks("tests.checkpoint.extra_state_worker", tmp_path, nproc=2, timeout_s=200).check()
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        assert len(rank["fresh"]) >= 8 and all(rank["fresh"])
        assert list(rank["arrived"]) == ["tp2", "pp2", "", "tp2 sp"]
        assert all(found and all(found) for found in rank["arrived"].values()), rank["arrived"]
    assert all(len(rank["arrived"]["pp2"]) < len(rank["arrived"][""]) for rank in ranks), "each has its stage's"
