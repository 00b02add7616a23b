"""What the imports of a rank bring into its process, and what they leave as it was."""

from __future__ import annotations

import json
import sys

import pytest

from tempo_megatron.imports import absent
from tests.launching import launch_ranks


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    return json.loads(launch_ranks("tests.imported_worker", nproc=1, timeout_s=60).check().stdout)


def test_a_rank_has_its_libraries_and_not_what_they_import_by_the_way(imported: dict[str, set[str]]) -> None:
    modules = set(imported["modules"])
    assert {"torch", "megatron.core", "vllm.v1.worker.cpu_worker", "tempo_megatron.loop.em"} <= modules
    assert not {"wandb", "scipy.signal", "torch._inductor.lowering"} & modules


def test_vllm_leaves_the_trainer_its_streams(imported: dict[str, object]) -> None:
    """An event that is None ends the first step of a model of experts."""
    assert imported["streams"]


def test_absent_hides_what_is_not_imported_yet() -> None:
    sys.modules.pop("this", None)
    with absent("this", "json"):
        with pytest.raises(ImportError):
            import this  # noqa: F401
        assert sys.modules["json"] is json
    assert "this" not in sys.modules
