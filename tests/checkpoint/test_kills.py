"""A run that is killed at random instants ends as one that is not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checkpoint.kills import Trainer, survive


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_handful_of_kills(tmp_path: Path) -> None:
    """``make kills`` has fifty."""
    trainer = Trainer(tmp_path, steps=8)
    assert trainer.run("undisturbed") == ""
    outcome = survive(trainer, "killed", 4, random.Random(0))
    assert outcome.is_good, outcome
    assert len(outcome.kills) == 4
    assert any(kill.in_flight for kill in outcome.kills), outcome
