"""Inputs that the tests of the loop share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class DemoInputs:
    """The demo's parquet files by name (``write_task``) and its untrained policy; for reading only."""

    data: dict[str, Path]
    model: Path


@pytest.fixture(scope="session")
def demo_inputs(tmp_path_factory: pytest.TempPathFactory) -> DemoInputs:
    from tempo_megatron.demo.model import write_model
    from tempo_megatron.demo.task import write_task

    folder = tmp_path_factory.mktemp("demo-inputs")
    return DemoInputs(write_task(folder / "data", 0, sft_rows=512), write_model(folder / "model", 0))
