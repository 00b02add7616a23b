"""A run that is killed at random instants ends as one that is not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checkpoint.kills import Trainer, survive

#: Strikes rank 1 at any time, the launcher when a checkpoint takes its place, both ranks while one is written.
SEED = 34


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_handful_of_kills(tmp_path: Path) -> None:
    """``make kills`` has fifty."""
    trainer = Trainer(tmp_path, steps=6)
    assert trainer.run("undisturbed") == ""
    outcome = survive(trainer, "killed", 3, random.Random(SEED))
    assert outcome.is_good, outcome
    assert [kill.when for kill in outcome.kills] == ["any time", "rename", "write"]
