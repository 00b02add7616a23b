"""The command: what it refuses, what it writes; no run is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_megatron import cli
from tempo_megatron.demo.study import command
from tempo_megatron.demo.study.command import parse_seeds, run_study
from tempo_megatron.demo.study.results import Results, Run
from tempo_megatron.demo.study.run import Job
from tempo_megatron.errors import RunError, TempoError

WriteArm = Callable[..., Path]
MakeRun = Callable[..., Run]


def report(output: Path, part: str = "claims", seeds: str | None = None) -> str:
    assert run_study(part=part, seeds=seeds, output=output, jobs=1, report_only=True) == 0
    return (output / "study.md").read_text()


# ---------------------------------------------------------------- the report


def test_report_of_claims(
    tmp_path: Path, claims: Callable[..., Results], write_arm: WriteArm, capsys: pytest.CaptureFixture
) -> None:
    for run in claims(5).runs.values():
        write_arm("claims", run)
    page = report(tmp_path, seeds="11,12,13,14,15")
    assert "**TEMPO keeps improving: holds.**" in page
    assert "![The paper's claims](study/claims.png)" in page
    assert (tmp_path / "study" / "claims.png").read_bytes().startswith(b"\x89PNG")
    assert "Seeds: 11, 12, 13, 14, 15; none of them was used to choose the settings." in page
    figures = json.loads((tmp_path / "study.json").read_text())["claims"]
    assert len(figures["runs"]) == 30 and figures["missing"] == []
    assert [v["outcome"] for v in figures["verdicts"]] == ["holds", "holds", "holds", "not judged"]
    assert figures["runs"][0]["curves"]["D_U/mean@16"][0] == [0, pytest.approx(0.42)]
    assert figures["differences_to_tempo"]["ppo"]["D_U/mean@16"]["interval"]["seeds"] == 5
    assert "TEMPO keeps improving: holds" in capsys.readouterr().out
    assert_tables_are_well_formed(page)


def assert_tables_are_well_formed(page: str) -> None:
    lines = page.split("\n")
    starts = [i - 1 for i, line in enumerate(lines) if set(line) == {"|", "-"}]
    assert len(starts) == 6
    for start in starts:
        rows = lines[start : lines.index("", start)]
        assert len(rows) > 2 and len({row.count("|") for row in rows}) == 1


def test_report_of_a_study_without_a_finished_run(tmp_path: Path) -> None:
    page = report(tmp_path, part="all")
    assert "Missing, not run: tempo (seed 11)" in page
    assert page.count("**TEMPO keeps improving: not shown: too few seeds.**") == 1
    assert "![" not in page and not (tmp_path / "study").exists()


def test_pictures_of_every_part(tmp_path: Path, make_run: MakeRun, write_arm: WriteArm) -> None:
    write_arm("claims", make_run("tempo", 11, (0.4, 0.9)))  # one seed: no bands
    write_arm("guard", make_run("paper", 11, (0.4, 0.0)))
    write_arm("guard", make_run("paper-guarded", 11, (0.4, 0.9), updates=(0, 15), min_accuracy=0.8))
    write_arm("ablations", make_run("every-8", 11, (0.4, 0.8)))
    write_arm("recalibration", make_run("recalibrated-base", 11, (0.4, 0.8)))
    write_arm("recalibration", make_run("frozen-base", 11, (0.4, 0.5), auroc=0.6))
    write_arm("precision", make_run("bf16", 11, (0.4, 0.8), mismatch=1e-3))
    page = report(tmp_path, part="all", seeds="11")
    assert sorted(p.name for p in (tmp_path / "study").iterdir()) == [
        "ablations.png", "claims.png", "guard.png", "precision.png", "recalibration.png",
    ]  # fmt: skip
    assert "paper, guarded, seed 11: the guard ended the run at policy update 15 of 90" in page


def test_seeds_on_which_settings_were_chosen_are_told(tmp_path: Path) -> None:
    assert "5 were used to choose the settings, too, and are no fresh evidence" in report(tmp_path, seeds="5,11")


# ---------------------------------------------------------------- the command


def test_defaults_and_the_order_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[Job] = []
    monkeypatch.setattr(command, "run_jobs", lambda jobs, processes, logs: queued.extend(jobs))
    output = tmp_path / "study"
    assert run_study(part="claims", seeds=None, output=output, jobs=3, report_only=False) == 0
    assert json.loads((output / "asked.json").read_text()) == {"claims": [11, 12, 13, 14, 15, 16]}
    assert len(queued) == 6 * (3 + 6)
    assert run_study(part="guard", seeds="11", output=output, jobs=3, report_only=False) == 0
    page = (output / "study.md").read_text()  # keeps the chapter of what was asked for before
    assert "## The paper's claims" in page and "## The guard against collapse" in page


def test_parts_share_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[Job] = []
    monkeypatch.setattr(command, "run_jobs", lambda jobs, processes, logs: queued.extend(jobs))
    run_study(part="all", seeds="11", output=tmp_path / "study", jobs=1, report_only=False)
    folders = [job.folder for job in queued]
    assert len(folders) == len(set(folders))
    assert sum(folder.name == "tempo" for folder in folders) == 1


def test_failed_runs_end_with_exit_code_3_after_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(jobs: list[Job], processes: int, logs: Path) -> None:
        raise RunError("2 runs of the study failed: a, b")

    monkeypatch.setattr(command, "run_jobs", fail)
    assert cli.main(["demo", "--study", "--seeds", "11", "--output", str(tmp_path)]) == 3
    assert "error: 2 runs of the study failed: a, b" in capsys.readouterr().err
    assert (tmp_path / "study.md").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--part", "claim"],
            "command line: --part claim must be one of claims, guard, ablations, recalibration, precision, all",
        ),
        (["--seeds", "11,x"], "command line: --seeds 11,x: 'x' is no seed; integers from 0 are, as in 11,12,13"),
        (["--seeds", "11,-1"], "'-1' is no seed"),
        (["--seeds", ""], "'' is no seed"),
        (["--seeds", "11,12,11"], "command line: --seeds 11,12,11: 11 stands twice; seeds must differ"),
        (["--jobs", "0"], "command line: --jobs 0 must be at least 1"),
        (["--report-only", "--output", "/nonexistent/study"], "there is no such folder; a report needs the runs"),
        (["--real"], "command line: --real is not for --study"),
        (["--prepare-only"], "command line: --prepare-only is not for --study"),
        (["--seed", "0"], "command line: --seed is not for --study, which has --seeds and --jobs"),
        (["--nproc", "2"], "command line: --nproc is not for --study"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["demo", "--study", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize("option", [["--part", "guard"], ["--seeds", "11"], ["--jobs", "1"]])
def test_options_of_the_study_need_it(option: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["demo", *option]) == 2
    assert f"command line: {option[0]} belongs to --study" in capsys.readouterr().err


def test_another_working_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TempoError, match=r"configs/study: no such folder in .*; the study runs at the root"):
        run_study(part="claims", seeds=None, output=tmp_path, jobs=1, report_only=True)


def test_a_broken_record_of_what_was_asked_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "asked.json").write_text('{"claims": 11}')
    with pytest.raises(TempoError, match=r"asked.json: must be a JSON object of lists of seeds"):
        report(tmp_path)


def test_seeds_are_integers_in_the_given_order() -> None:
    assert parse_seeds("12, 11,0") == [12, 11, 0]
