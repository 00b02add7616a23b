"""Starts of a run: what is written, and when a job that gets nowhere ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tempo_megatron.cluster.starts import STARTS_FILE, forget_start, note_start, read_starts
from tempo_megatron.errors import RunError


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def _start(job: str | None, restarts: int, place: str | None, allowed: int = 3) -> None:
        for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", None if job is None else str(restarts))):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        note_start(tmp_path, 2, place, allowed)

    return _start


def test_a_fourth_restart_from_the_same_place_ends_the_job(start, tmp_path: Path) -> None:
    for restarts in range(4):
        start("7", restarts, "step_00000010")
    with pytest.raises(RunError) as caught:
        start("7", 4, "step_00000010")
    assert "Slurm job 7 was restarted 4 times without progress" in str(caught.value)
    assert "step_00000010" in str(caught.value)
    assert len(read_starts(tmp_path / STARTS_FILE)) == 4


def test_progress_another_job_and_a_start_by_hand_count_anew(start) -> None:
    for restarts in range(4):
        start("7", restarts, None)
    start("7", 4, "step_00000000+rollout")
    for restarts in range(5, 8):
        start("7", restarts, "step_00000000+rollout")
    start("8", 0, "step_00000000+rollout")  # submitted anew
    start(None, 0, "step_00000000+rollout")
    for restarts in range(1, 5):
        start("8", restarts, "step_00000000+rollout")
    with pytest.raises(RunError, match=r"went on from step_00000000\+rollout"):
        start("8", 5, "step_00000000+rollout")


def test_the_limit_is_a_setting_and_a_broken_line_is_passed_over(start, tmp_path: Path) -> None:
    start("7", 0, None, allowed=0)
    with (tmp_path / STARTS_FILE).open("a") as file:
        file.write('{"time": "20')
    with pytest.raises(RunError, match="from the beginning"):
        start("7", 1, None, allowed=0)
    start("8", 0, None)
    assert [s.job for s in read_starts(tmp_path / STARTS_FILE)] == ["7", "8"]


def test_a_start_that_is_refused_leaves_no_line(start, tmp_path: Path) -> None:
    start("7", 0, None)
    before = (tmp_path / STARTS_FILE).read_text()
    start("7", 1, None)
    forget_start(tmp_path)
    assert (tmp_path / STARTS_FILE).read_text() == before
    forget_start(tmp_path)
    assert list(tmp_path.iterdir()) == []
