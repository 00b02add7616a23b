"""The claim on an output folder: who gets it, who is told what, and when a dead holder's is free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tempo_megatron.cluster import claim as module
from tempo_megatron.cluster.claim import STALE_S, Holder, check_unclaimed, claimed
from tempo_megatron.errors import RunError, TempoError

HOLD = """
import sys, time
from pathlib import Path
from tempo_megatron.cluster.claim import claimed
from tempo_megatron.cluster.lifetime import end_on_signals
from tempo_megatron.errors import TempoError
end_on_signals(lambda number: None)
while not Path(sys.argv[2]).exists():  # all of them start at once
    time.sleep(0.0005)
try:
    with claimed(Path(sys.argv[1])):
        print("got it", flush=True)
        time.sleep(float(sys.argv[3]))
except TempoError as error:
    print(error, flush=True)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that claims ``folder`` once ``tmp_path / "go"`` is there, and holds it for some seconds."""
    started: list[subprocess.Popen[str]] = []

    def _hold(folder: Path, seconds: float = 60) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder), str(tmp_path / "go"), str(seconds)]
        started.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE))
        return started[-1]

    yield _hold
    for process in started:
        process.kill()
        process.communicate()


def another(**changes: object) -> Holder:
    """A process of another machine."""
    fields = {"host": "node7", "machine": "other", "pid": 1, "started": "5", "since": "2031-01-02T03:04:05+00:00"}
    return Holder(**{**fields, "job": None, "restarts": 0, "token": "t", **changes})  # type: ignore[arg-type]


def write(folder: Path, holder: Holder, number: int = 1, age_s: float = 0) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f".claim-{number:08d}"
    file.write_text(json.dumps(asdict(holder)))
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def test_a_claim_names_its_holder_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    folder = tmp_path / "runs" / "a"
    with claimed(folder) as held:
        held.check()
        assert [path.name for path in folder.iterdir()] == [".claim-00000001"]
        for second in (lambda: check_unclaimed(folder), lambda: claimed(folder).__enter__()):
            with pytest.raises(TempoError) as error:
                second()
            assert error.value.exit_code == 2
            told = str(error.value)
            assert told.startswith(f"output_dir: {folder} is in use by process {os.getpid()} on ")
            assert ", Slurm job 77, since 20" in told
            assert told.endswith("; let it end, or choose another output_dir")
    assert list(tmp_path.iterdir()) == []
    check_unclaimed(folder)
    with claimed(folder):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_of_many_starts_exactly_one_wins(tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]) -> None:
    dead = replace(module._this_process(), pid=2**22 + 1)
    for round_, make in enumerate([lambda f: None, lambda f: write(f, dead, 3), lambda f: write(f, another(), 9, 1e4)]):
        folder = tmp_path / f"run{round_}"
        make(folder)
        (tmp_path / "go").unlink(missing_ok=True)
        started = [hold(folder, 3) for _ in range(6)]
        time.sleep(1.5)
        (tmp_path / "go").touch()
        lines = [process.stdout.readline() for process in started]
        assert lines.count("got it\n") == 1, lines
        winner = started[lines.index("got it\n")]
        assert all(f"is in use by process {winner.pid} on " in line for line in lines if line != "got it\n")
        assert len(list(folder.glob(".claim-*"))) == 1


def test_a_killed_holder_of_this_machine_is_followed_at_once(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "go").touch()
    process = hold(tmp_path / "run")
    assert process.stdout.readline() == "got it\n"
    process.kill()
    while process.poll() is None and not _is_zombie(process.pid):
        time.sleep(0.01)
    with claimed(tmp_path / "run"):  # also while its parent has not taken notice
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".claim-00000002"]


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_it_back(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    (tmp_path / "go").touch()
    process = hold(tmp_path / "run")
    assert process.stdout.readline() == "got it\n"
    process.send_signal(number)
    assert process.wait(5) == 128 + number
    assert not (tmp_path / "run").exists()


def test_a_process_id_that_came_again_is_not_the_holder(tmp_path: Path) -> None:
    write(tmp_path / "run", replace(module._this_process(), started="1"))
    check_unclaimed(tmp_path / "run")


@pytest.mark.parametrize("age_s", [0.0, STALE_S - 20.0])
def test_another_machines_holder_that_shows_life(tmp_path: Path, age_s: float) -> None:
    write(tmp_path / "run", another(job="9"), age_s=age_s)
    with pytest.raises(TempoError) as error:
        claimed(tmp_path / "run").__enter__()
    told = str(error.value)
    assert "is in use by process 1 on node7, Slurm job 9, since 2031-01-02T03:04:05+00:00 (last sign of life" in told
    assert told.endswith(f"if it is dead, the folder is free {STALE_S} s after that sign")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".claim-00000001"]


def test_another_machines_holder_that_fell_silent_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "run", another(), 4, STALE_S + 20)
    with claimed(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".claim-00000005"]


def test_age_is_told_by_the_file_systems_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", another())
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is far ahead
    with pytest.raises(TempoError, match="in use by"):
        check_unclaimed(tmp_path / "run")


@pytest.mark.parametrize(
    ("job", "restarts", "free"),
    [("77", "3", True), ("77", "2", False), ("78", "3", False), (None, None, False)],
)
def test_a_requeued_job_follows_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None, restarts: str | None, free: bool
) -> None:
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    write(tmp_path / "run", another(job="77", restarts=2))
    if free:
        check_unclaimed(tmp_path / "run")
    else:
        with pytest.raises(TempoError, match="in use by"):
            check_unclaimed(tmp_path / "run")


def test_a_torn_claim_counts_until_it_is_old(tmp_path: Path) -> None:
    (tmp_path / ".claim-00000001").write_text('{"host": "no')
    with pytest.raises(TempoError, match="in use by an unknown process"):
        check_unclaimed(tmp_path)
    os.utime(tmp_path / ".claim-00000001", (1, 1))
    check_unclaimed(tmp_path)


def test_a_lost_claim_ends_the_run(tmp_path: Path) -> None:
    with claimed(tmp_path / "run") as held:
        rival = write(tmp_path / "run", another(), 2)
        with pytest.raises(RunError, match=r"was taken over by process 1 on node7, since .*; it ends rather than"):
            held.check()
        rival.unlink()
        held.check()
        (tmp_path / "run" / ".claim-00000001").unlink()
        with pytest.raises(RunError, match=r"run: this run's claim \.claim-00000001 is gone; it ends rather than"):
            held.check()
        (tmp_path / "run").rmdir()
        with pytest.raises(RunError, match="is gone"):
            held.check()


def test_a_claim_that_another_took_over_is_left_to_it(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"):
        write(tmp_path / "run", another(), 1)
    assert (tmp_path / "run" / ".claim-00000001").exists()


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    with claimed(tmp_path / "run"):
        file = tmp_path / "run" / ".claim-00000001"
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert file.stat().st_mtime > 1


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with claimed(tmp_path / "run") as held:
        held.check()
        with pytest.raises(TempoError, match="in use by"):
            claimed(tmp_path / "run").__enter__()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".claim-00000001"]


def test_an_answer_that_was_lost_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems may do what is asked and report that it exists already."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", twice)
    with claimed(tmp_path / "run") as held:
        held.check()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x")):
        with pytest.raises(TempoError, match=rf"^output_dir: {folder} cannot be written: \w"):
            claimed(folder).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
