"""``doctor`` on the ranks of a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempo_megatron.doctor.finding import Finding, ok, warning
from tempo_megatron.loop.examine_job import judge_clocks, merged
from tests.launching import LaunchResult, launch_ranks
from tests.loop.conftest import Bad


def examine(bad: Bad, folder: Path, nproc: int, *overrides: str) -> tuple[LaunchResult, dict[str, list[dict]]]:
    """What ``doctor`` shows, and its JSON's findings by check."""
    words = ["--config", bad.config("tempo"), f"output_dir={folder / 'run'}", *overrides]
    result = launch_ranks(
        "tempo_megatron", "doctor", "--json", folder / "doctor.json", *map(str, words), nproc=nproc, timeout_s=120
    )
    findings: dict[str, list[dict]] = {}
    for finding in json.loads((folder / "doctor.json").read_text())["findings"]:
        findings.setdefault(finding["check"], []).append(finding)
    return result, findings


@pytest.mark.slow(15)
def test_two_ranks_with_two_layouts(bad: Bad, tmp_path: Path) -> None:
    result, findings = examine(bad, tmp_path, 2, "critic.parallel.tensor_model_parallel_size=2")
    assert (result.returncode, result.stderr.count("error")) == (0, 0)
    groups = {check for check in findings if check.startswith("all-reduce")}
    assert groups == {"all-reduce world", "all-reduce actor DP", "all-reduce critic TP"}
    assert all(findings[check][0]["told"].startswith("2 ranks, 1 group: ") for check in groups)
    assert {"packages", "torch", "memory", "/dev/shm", "limits", "host names", "clocks"} <= set(findings)
    assert findings["memory"][0]["told"].endswith("for 2 ranks on this node")
    told = " ".join(finding["told"] for finding in findings["config"])
    assert all(word in told for word in ("tensors", "tokenizer:", "chat template applied"))
    assert "all-reduce critic TP" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow(15)
def test_what_train_would_refuse_is_a_fault(bad: Bad, tmp_path: Path) -> None:
    result, findings = examine(bad, tmp_path, 1, f"data.train_files=[{bad.data('truncated')}]")
    assert result.returncode == 3
    (finding,) = findings["config"]
    assert finding["verdict"] == "fault"
    assert str(bad.data("truncated")) in finding["told"]
    assert result.stderr.splitlines()[-1].startswith("error: doctor: 1 fault")


def test_what_all_hosts_say_is_said_once() -> None:
    same, own = ok("memory", "enough"), warning("driver", "500", "a newer one")
    assert merged({"a": [same], "b": [same, own], "c": [same, own]}) == [
        same,
        Finding("driver on b, c", "warning", "500", "a newer one"),
    ]
    assert merged({"a": [own]}) == [own]


@pytest.mark.parametrize(
    ("clocks", "verdict", "told"),
    [
        ([100.0, 104.0, 101.0], "ok", "of 2 hosts differ by less than 5 s"),
        ([100.0, 130.0, 101.0], "warning", "n1 is 30 s ahead of n0"),
        ([400.0, 130.0, 101.0], "fault", "n0 is 299 s ahead of n1; watchdog.clock_s: 240"),
    ],
    ids=["alike", "seconds", "minutes"],
)
def test_clocks_of_hosts(clocks: list[float], verdict: str, told: str) -> None:
    (found,) = judge_clocks(["n0", "n1", "n1"], clocks, 240)
    assert (found.verdict, found.told) == (verdict, told)
