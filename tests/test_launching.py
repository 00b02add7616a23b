from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.launching import LaunchTimeout, launch, launch_ranks, patience, runs

HANGING = """
import os, pathlib, subprocess, sys, time
def waits_for_ever():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path(sys.argv[1], os.environ.get("RANK", "0")).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
waits_for_ever()
"""


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    return script


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and runs(psutil.Process(pid))


def test_one_process_gives_output_status_and_environment(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; print(os.environ['COLOR'], os.getcwd()); print('bad', file=sys.stderr); sys.exit(3)"
    )
    result = launch(script, 1, 30, env={"COLOR": "red"}, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (3, f"red {tmp_path}\n", "bad\n")
    assert 0 < result.seconds < 30
    with pytest.raises(AssertionError, match="exit status 3"):
        result.check()


def test_ranks_are_started_by_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; print(f\"{sys.argv[1]} {os.environ['RANK']}/{os.environ['WORLD_SIZE']}\\n\", end='')"
    )
    result = launch([script, "rank"], 2, 60).check()
    assert sorted(result.stdout.split("\n")) == ["", "rank 0/2", "rank 1/2"]


def test_a_failing_rank_fails_the_launch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(5)\ntime.sleep(600)")
    assert launch(script, 2, 60).returncode != 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs gets no more time for the machine's being busy."""
    monkeypatch.setattr("tests.launching.MOST_PATIENCE", 1)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_hang_names_the_line_of_every_rank_and_leaves_nothing(hanging: Path, impatient: None, nproc: int) -> None:
    with pytest.raises(LaunchTimeout) as caught:
        launch([hanging, hanging.parent], nproc, patience(2 if nproc == 1 else 4))
    message = str(caught.value)
    pids = [[int(pid) for pid in (hanging.parent / str(rank)).read_text().split()] for rank in range(nproc)]
    for rank, (pid, _) in enumerate(pids):
        after = message.split(f"--- rank {rank}, process {pid}\n")[1].split("--- rank")[0]
        assert f'File "{hanging}", line 6 in waits_for_ever' in after
    assert not [pid for rank in pids for pid in rank if _alive(pid)]


def test_forked_ranks_are_programs_of_their_own_with_the_imports_done() -> None:
    result = launch_ranks("tests.launching_worker", "tell", nproc=2, timeout_s=60, env={"COLOR": "red"}).check()
    assert sorted(result.stdout.splitlines()) == ["rank 0/2 red torch", "rank 1/2 red torch"]
    alone = launch_ranks("tests.launching_worker", "tell", nproc=1, timeout_s=60, env={"COLOR": "blue"}).check()
    assert alone.stdout == "rank None/None blue torch\n"


def test_a_failing_forked_rank_ends_the_others_and_is_told() -> None:
    result = launch_ranks("tests.launching_worker", "fail", nproc=2, timeout_s=60)
    assert result.returncode == 5
    assert "rank 1 says why" in result.stderr
    assert result.seconds < 30


def test_a_hang_of_forked_ranks_names_the_lines_and_leaves_nothing(tmp_path: Path, impatient: None) -> None:
    def both_hang(_: object) -> None:
        while not all((tmp_path / str(rank)).exists() for rank in range(2)):
            time.sleep(0.01)

    with pytest.raises(LaunchTimeout) as caught:
        launch_ranks("tests.launching_worker", "hang", tmp_path, nproc=2, timeout_s=0.5, while_running=both_hang)
    for rank in range(2):
        pid, child = map(int, (tmp_path / str(rank)).read_text().split())
        after = str(caught.value).split(f"--- rank {rank}, process {pid}\n")[1].split("--- rank")[0]
        assert "in waits_for_ever" in after
        assert not _alive(pid) and not _alive(child)
    assert launch_ranks("tests.launching_worker", "tell", nproc=1, timeout_s=60, env={"COLOR": ""}).returncode == 0
