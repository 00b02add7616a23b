"""The queue of runs, with jobs that only leave a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_megatron.demo.study.run import DONE, Job, run_jobs
from tempo_megatron.errors import RunError, TempoError

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """(name, *needs, code=0) -> a job that adds its name to ``order`` and exits with ``code``."""

    def make(name: str, *needs: str, code: int = 0) -> Job:
        folder = tmp_path / name
        script = (
            f"import pathlib, sys; pathlib.Path({str(folder)!r}).mkdir(exist_ok=True); "
            f"open({str(tmp_path / 'order')!r}, 'a').write({name!r} + ' '); print('said by', {name!r}); "
            f"sys.exit({code})"
        )
        # -I -S: no site packages, which would take longer to load than the job runs
        return Job(folder, ("-I", "-S", "-c", script), tuple(tmp_path / need for need in needs))

    return make


def order(tmp_path: Path) -> list[str]:
    return (tmp_path / "order").read_text().split()


def test_a_job_runs_after_those_it_needs(tmp_path: Path, make_job: MakeJob) -> None:
    jobs = [make_job("c", "a", "b"), make_job("b", "a"), make_job("a")]
    run_jobs(jobs, 1, tmp_path / "logs")
    assert order(tmp_path) == ["a", "b", "c"]
    assert all(job.is_done for job in jobs)
    assert (tmp_path / "logs" / "c.log").read_text() == "said by c\n"


def test_independent_jobs_run_at_once_up_to_the_limit(tmp_path: Path) -> None:
    """Each waits for the other's file: one at a time they would wait for ever."""
    jobs = []
    for name, other in (("a", "b"), ("b", "a")):
        script = (
            f"import os, time, pathlib\npathlib.Path({str(tmp_path / name)!r}).mkdir()\n"
            f"end = time.monotonic() + 60\n"
            f"while not os.path.exists({str(tmp_path / other)!r}): assert time.monotonic() < end; time.sleep(0.01)"
        )
        jobs.append(Job(tmp_path / name, ("-I", "-S", "-c", script)))
    run_jobs(jobs, 2, tmp_path / "logs")
    assert all(job.is_done for job in jobs)


def test_goes_on_where_it_was_stopped(tmp_path: Path, make_job: MakeJob) -> None:
    first = make_job("a")
    run_jobs([first], 1, tmp_path / "logs")
    (tmp_path / "b").mkdir()  # was cut off before it had ended: no marker
    run_jobs([first, make_job("b", "a")], 1, tmp_path / "logs")
    assert order(tmp_path) == ["a", "b"]


def test_a_failed_job_stops_only_those_that_need_it(tmp_path: Path, make_job: MakeJob) -> None:
    jobs = [make_job("bad", code=4), make_job("after-bad", "bad"), make_job("good"), make_job("after-good", "good")]
    with pytest.raises(RunError, match=r"1 runs of the study failed: .*bad") as failure:
        run_jobs(jobs, 1, tmp_path / "logs")
    assert failure.value.exit_code == 3
    assert order(tmp_path) == ["bad", "good", "after-good"]
    assert [job.is_done for job in jobs] == [False, False, True, True]


def test_a_failed_job_is_run_again(tmp_path: Path, make_job: MakeJob) -> None:
    with pytest.raises(RunError):
        run_jobs([make_job("a", code=1)], 1, tmp_path / "logs")
    run_jobs([make_job("a")], 1, tmp_path / "logs")
    assert order(tmp_path) == ["a", "a"]


def test_a_folder_with_other_settings_is_refused_before_anything_runs(tmp_path: Path, make_job: MakeJob) -> None:
    run_jobs([make_job("a")], 1, tmp_path / "logs")
    changed = make_job("a", code=5)
    with pytest.raises(TempoError, match="holds a run of other settings; choose another --output"):
        run_jobs([make_job("new"), changed], 1, tmp_path / "logs")
    assert order(tmp_path) == ["a"]


def test_settings_of_a_config_and_of_what_it_builds_on_count_but_not_its_comments(tmp_path: Path) -> None:
    base, config = tmp_path / "base.yaml", tmp_path / "a.yaml"
    base.write_text("stage: sft\nsteps: 1\nactor: {init: x}\n")
    config.write_text("base: base.yaml\n")

    def job() -> Job:
        return Job(tmp_path / "run", ("-m", "x", "train", "--config", str(config), "output_dir=y"))

    job().folder.mkdir()
    (job().folder / DONE).write_text(json.dumps({"key": job().key}))
    config.write_text("# a remark\nbase: base.yaml\n")
    assert job().is_done
    base.write_text(base.read_text().replace("steps: 1", "steps: 2"))
    with pytest.raises(TempoError, match="other settings"):
        _ = job().is_done


def test_a_seed_whose_cold_start_failed_is_left_out_and_told(
    tmp_path: Path, make_job: MakeJob, capsys: pytest.CaptureFixture
) -> None:
    jobs = []
    for seed, loss in ((1, 0.28), (2, 0.47)):
        sft = tmp_path / f"seed-{seed}" / "sft"
        lines = "".join(json.dumps({"step": i, "sft/loss": 1.0 if i < 60 else loss}) + "\n" for i in range(110))
        write = f"import pathlib; pathlib.Path({str(sft / 'metrics.jsonl')!r}).write_text({lines!r})"
        sft.mkdir(parents=True)
        jobs.append(Job(sft, ("-c", write)))
        arm = tmp_path / f"seed-{seed}" / "arm"
        arm.mkdir()
        jobs.append(Job(arm, ("-c", ""), (sft,)))
    for _ in range(2):  # as well when the cold starts are there already
        run_jobs(jobs, 1, tmp_path / "logs")
        assert [job.is_done for job in jobs] == [True, True, True, False]
        told = " ".join(capsys.readouterr().out.split())
        assert "seed-2/sft: its cold start failed: a training loss of 0.47 at the end, above 0.35" in told
        assert "seed-1/sft: its" not in told
