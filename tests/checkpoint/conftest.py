"""A run's checkpoints, made once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launching import launch_ranks


@dataclass(frozen=True)
class SavedRun:
    """Two ranks' checkpoints of steps 11 and 12 in ``folder/run``, for reading only; see ``saved_run_worker``.

    Attributes:
        ranks: what each rank saw.
    """

    folder: Path
    ranks: list[dict[str, Any]]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "run" / "checkpoints"


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    folder = tmp_path_factory.mktemp("saved-run")
    launch_ranks("tests.checkpoint.saved_run_worker", folder, nproc=2, timeout_s=120).check()
    return SavedRun(folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)])
