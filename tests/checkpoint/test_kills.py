"""A run that is killed at random instants ends as one that is not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checkpoint.kills import Trainer, survive

#: Strikes both ranks while a checkpoint within the first step is written, the launcher when one takes its place.
SEED = 637


@pytest.mark.slow(30)
@pytest.mark.timeout(600)
def test_two_kills(tmp_path: Path) -> None:
    """``make kills`` has fifty."""
    trainer = Trainer(tmp_path, steps=3)
    assert trainer.run("undisturbed") == ""
    outcome = survive(trainer, "killed", 2, random.Random(SEED))
    assert outcome.is_good, outcome
    assert [kill.when for kill in outcome.kills] == ["write", "rename"]
