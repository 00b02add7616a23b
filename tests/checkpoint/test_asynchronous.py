"""Checkpoints written while training goes on: they hold what there was when they were begun, and fail on all ranks."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from tempo_megatron.checkpoint.inprocess_writer import Abandoned, write_bucket
from tests.launching import launch_ranks

DISTURBANCES = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("asynchronous")
    launch_ranks("tests.checkpoint.async_worker", folder, nproc=2, timeout_s=120).check()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_a_checkpoint_holds_what_there_was_when_it_was_begun(ranks: list[dict[str, Any]]) -> None:
    """Engines train, are overwritten and move while it is written; bfloat16 with masters, and a plain optimizer."""
    for line in ranks:
        found = line["snapshots"]
        assert found["in flight"] == [True] * DISTURBANCES
        for at, same in enumerate(found["same"], 1):
            assert same == {
                "as synchronous": True,
                "as the one before": False,
                "weights' digests": True,
                "rows": [at] * 3,
                "other files": [True] * 3,
            }
        assert found["unchanged"] == []


def test_host_memory_is_counted(ranks: list[dict[str, Any]]) -> None:
    """All ranks together hold each tensor once, and no byte more."""
    for line in ranks:
        for figures in line["snapshots"]["figures"]:
            assert figures["staged"] == figures["stored"] > 0
            assert figures["figures"] == [
                f"checkpoint/{n}" for n in ("commit_s", "in_flight_s", "snapshot_s", "staged_gib")
            ]


def test_a_failed_write_is_told_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (line["failures"] for line in ranks)
    assert first == second
    assert re.fullmatch(
        r"RunError: .*/step_00000002: the checkpoint cannot be saved \(earlier ones are complete\): rank 1: "
        r"\[Errno 27\] File too large",
        first["full"],
    )
    assert first["after a full disk"] == ["step_00000001"]
    assert first["and then"] == ["step_00000001", "step_00000003"]
    assert first["lost"] == "TempoError: the claim is gone"
    assert first["after the loss"] == ["step_00000001", "step_00000003"]
    assert first["after the end"] == [".partial-step_00000005", "step_00000001", "step_00000003"]
    assert first["after going back"] == ["step_00000001", "step_00000003", "step_00000006"]


def test_no_thread_is_left(ranks: list[dict[str, Any]]) -> None:
    assert [line["threads"] for line in ranks] == [[], []]


def test_a_write_that_is_given_up_ends(tmp_path: Path) -> None:
    import io

    item = WriteItem(index=MetadataIndex("x"), type=WriteItemType.BYTE_IO)
    bucket = (str(tmp_path / "x"), "x", ([(item, io.BytesIO(b"1234"))], []))
    abandon = threading.Event()
    assert write_bucket(_StorageWriterTransforms(), bucket, abandon).digest.size == 4
    abandon.set()
    with pytest.raises(Abandoned):
        write_bucket(_StorageWriterTransforms(), bucket, abandon)
