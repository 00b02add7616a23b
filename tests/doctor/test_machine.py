"""Checks of a node and its folders, each met by its real cause where that can be had."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tempo_megatron.doctor import folders, machine
from tempo_megatron.doctor.finding import GIB, MIB, Finding, of_verdict
from tempo_megatron.doctor.folders import check_folder
from tempo_megatron.doctor.machine import check_host_name, check_memory, check_process_limits, check_shared_memory
from tempo_megatron.doctor.start import start_findings
from tests.launching import ROOT, patience

needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"]).returncode != 0,
    reason="needs a mount namespace of its own (root)",
)


def with_tmpfs(place: Path | str, options: str, *command: str) -> subprocess.CompletedProcess[str]:
    """A command that sees a tmpfs at ``place``, and nobody else does."""
    mount = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", options, str(place), sys.executable, *command],
        capture_output=True, text=True, cwd=ROOT, timeout=patience(60), env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def the_fault(findings: list[Finding]) -> Finding:
    (found,) = of_verdict(findings, "fault")
    return found


# ---------------------------------------------------------------- folders


def test_a_good_folder_is_left_as_it_was(tmp_path: Path) -> None:
    found = check_folder(tmp_path / "runs" / "x", "output_dir", speed=True)
    assert {finding.verdict for finding in found} <= {"ok", "warning"}  # a slow or a full disk is no matter of the test
    assert list(tmp_path.iterdir()) == []
    told = " ".join(finding.told for finding in found)
    assert all(word in told for word in ("free", "links once only", "clock", "/s, synced"))


@needs_mounts
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("size=1m", "1 MiB of 1 MiB free; remove files there, or choose another folder"),
        ("ro", "cannot be written: Read-only file system; choose another folder"),
        ("nr_inodes=10,size=1g", "but room for 9 more files only; remove files there"),
    ],
    ids=["full", "read-only", "no inodes"],
)
def test_a_folder_that_cannot_take_a_run(tmp_path: Path, options: str, told: str) -> None:
    code = (
        "from pathlib import Path; from tempo_megatron.doctor.folders import check_folder\n"
        f"for f in check_folder(Path({str(tmp_path)!r}), 'output_dir', speed=False):\n"
        "    if f.verdict == 'fault': print(f)"
    )
    shown = with_tmpfs(tmp_path, options, "-c", code).stdout
    assert shown.startswith(f"output_dir {tmp_path}: ")
    assert told in shown
    assert shown.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written: Permission denied" in the_fault(check_folder(tmp_path, "output_dir", speed=False)).told


@pytest.mark.parametrize(
    ("skew_s", "verdict", "told"),
    [(0.0, "ok", "this node's"), (-60.0, "warning", "60 s ahead of"), (3600.0, "fault", "3600 s behind")],
    ids=["same", "ahead", "behind"],
)
def test_a_clock_that_is_not_the_file_systems(tmp_path: Path, skew_s: float, verdict: str, told: str) -> None:
    found = check_folder(tmp_path, "output_dir", speed=False, clock=lambda: time.time() + skew_s)
    (clock,) = [finding for finding in found if "its clock" in finding.told]
    assert clock.verdict == verdict
    assert told in clock.told


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    told = [finding.told for finding in of_verdict(check_folder(tmp_path, "output_dir", speed=False), "warning")]
    assert "has no hard links" in told


def test_a_file_system_that_links_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: None)
    assert "once more" in the_fault(check_folder(tmp_path, "output_dir", speed=False)).told


def test_a_slow_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(0.6)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(folders, "PROBE_BYTES", MIB)
    told = [finding.told for finding in of_verdict(check_folder(tmp_path, "output_dir", speed=True), "warning")]
    assert any("two synced files and a rename take" in text for text in told)
    assert any("MiB/s, synced" in text for text in told)


# ---------------------------------------------------------------- memory


def proc_of(tmp_path: Path, free: int, group: str) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {free // 1024} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(group)
    return tmp_path / "proc"


@pytest.mark.parametrize(
    ("free", "verdict"), [(32 * GIB, "ok"), (6 * GIB, "warning"), (GIB, "fault")], ids=["enough", "little", "none"]
)
def test_memory_of_the_node(tmp_path: Path, free: int, verdict: str) -> None:
    found = check_memory(4, proc_of(tmp_path, free, "0::/\n"), tmp_path / "none")
    assert found.verdict == verdict
    assert found.told == f"{free / GIB:.1f} GiB of 64.0 GiB free, for 4 ranks on this node"


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "cache"),
    [
        ("0::/job/step\n", "job", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/job\n", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2, of a parent", "v1"],
)
def test_memory_of_the_control_group(tmp_path: Path, line: str, folder: str, limit: str, used: str, cache: str) -> None:
    place = tmp_path / "cgroup" / folder
    place.mkdir(parents=True)
    for name, text in ((limit, 8 * GIB), (used, 9 * GIB - MIB), ("memory.stat", f"x 1\n{cache} {2 * GIB}")):
        (place / name).write_text(f"{text}\n")
    found = check_memory(4, proc_of(tmp_path, 32 * GIB, line), tmp_path / "cgroup")
    assert found.verdict == "fault"
    assert "1.0 GiB left of the control group's limit" in found.told


def test_memory_of_this_node_is_read() -> None:
    assert " free, for 1 rank on this node" in check_memory(1).told


@needs_mounts
def test_shared_memory_that_is_full(tmp_path: Path) -> None:
    """``train`` and ``evaluate`` themselves, before they start anything."""
    (tmp_path / "model").mkdir()
    shape = '"num_attention_heads": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2'
    shape += ', "vocab_size": 10, "max_position_embeddings": 64'
    (tmp_path / "model" / "config.json").write_text(f'{{"architectures": ["LlamaForCausalLM"], {shape}}}')
    for name in ("model/model.safetensors", "train.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "sft.yaml").write_text(
        f"stage: sft\noutput_dir: {tmp_path}/out\nsteps: 3\nactor: {{init: {tmp_path}/model}}\n"
        f"data: {{train_files: [{tmp_path}/train.parquet], max_prompt_tokens: 8, max_response_tokens: 8}}\n"
        "launch: {nproc_per_node: 2}\n"
    )
    evaluate = ["evaluate", tmp_path / "model", "--set", f"aime={tmp_path}/train.parquet", "--output", tmp_path / "out"]
    evaluate += ["data.max_prompt_tokens=8", "data.max_response_tokens=8", "launch.nproc_per_node=2"]
    for words in (["train", "--config", tmp_path / "sft.yaml"], evaluate):
        done = with_tmpfs("/dev/shm", "size=20m", "-m", "tempo_megatron", *map(str, words))
        assert done.returncode == 3
        assert done.stderr.startswith("error: /dev/shm: 20 MiB of 20 MiB free, for 2 ranks; 16 MiB a rank are needed: ")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_shared_memory_that_is_little(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert check_shared_memory(free // (32 * MIB), tmp_path).verdict == "warning"
    assert check_shared_memory(free // (8 * MIB), tmp_path).verdict == "fault"
    assert check_shared_memory(1, tmp_path / "gone").told == "is not there (No such file or directory)"


# ---------------------------------------------------------------- limits and names


def test_limits_that_are_too_low() -> None:
    def get(number: int) -> tuple[int, int]:
        return (64, 64) if number == resource.RLIMIT_NOFILE else resource.getrlimit(number)

    found = the_fault(check_process_limits(get))
    assert found.told == "open files: 64 (ulimit -H -n), a rank needs at least 256"
    assert found.remedy == "raise the hard limit"
    assert check_process_limits()[0].verdict == "ok"


def test_host_names_that_mean_nothing() -> None:
    (known,) = check_host_name(["localhost"])
    assert known.verdict == "ok"
    (unknown,) = check_host_name(["no-such-host.invalid"])
    assert (unknown.verdict, "no-such-host.invalid (" in unknown.told) == ("warning", True)
    (master,) = check_host_name(["localhost"], master="no-such-host.invalid")
    assert (master.verdict, "MASTER_ADDR" in master.remedy) == ("fault", True)


# ---------------------------------------------------------------- at the start of a run


def test_the_start_of_a_run_is_not_delayed(tmp_path: Path) -> None:
    start_findings(tmp_path, 1)
    began = time.process_time()
    start_findings(tmp_path, 1)
    assert time.process_time() - began < 0.1


def test_the_temporary_folder_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED_FAULT", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone" / "away"))
    monkeypatch.setattr(folders, "ROOM_FAULT", 1 << 60)
    found = [finding for finding in start_findings(tmp_path, 1) if finding.verdict == "fault"]
    assert [finding.check.split("/")[0] for finding in found] == ["output_dir ", "temporary folder "]
