"""``tempo-megatron demo --study``: run what is asked for, report all that was ever asked of this output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tempo_megatron.demo.study.plan import PARTS, Part
from tempo_megatron.demo.study.report import write_study
from tempo_megatron.demo.study.results import read_results
from tempo_megatron.demo.study.run import STUDY_CONFIGS, Job, jobs_of, run_jobs
from tempo_megatron.errors import RunError, TempoError

#: First of the seeds that a part takes by default; those below were used to choose settings, or left for it.
FIRST_SEED = 11
SPARE_SEEDS = 1  # a cold start may fail
ALL = "all"
#: Part -> seeds that were asked for, in the output folder: a report of one part keeps the chapters of the others.
ASKED = "asked.json"

Seeds = Mapping[str, list[int]]


def run_study(*, part: str, seeds: str | None, output: Path, jobs: int, report_only: bool) -> int:
    """Run a part, or all, and write the report.

    Args:
        part: a key of ``PARTS``, or ``all``.
        seeds: such as ``11,12,13``; None: those asked for before (report only), else as many as the part needs.
        jobs: processes at a time.

    Returns:
        exit status 0.

    Raises:
        TempoError: a wrong argument or working folder, or ``output`` holds runs of other settings.
        RunError: runs failed; the report of the others has been written.
    """
    parts = _parts(part)
    given = None if seeds is None else parse_seeds(seeds)
    if jobs < 1:
        raise TempoError(f"command line: --jobs {jobs} must be at least 1")
    if not STUDY_CONFIGS.is_dir():
        raise TempoError(
            f"{STUDY_CONFIGS}: no such folder in {Path.cwd()}; the study runs at the root of the repository"
        )
    if report_only and not output.is_dir():
        raise TempoError(f"--output {output}: there is no such folder; a report needs the runs of a study")
    before = _asked_before(output)
    asked = {p.name: given or (before.get(p.name) if report_only else None) or _default_seeds(p) for p in parts}
    failure: RunError | None = None
    if not report_only:
        queue = _queue(output, asked)
        output.mkdir(parents=True, exist_ok=True)
        (output / ASKED).write_text(json.dumps({**before, **asked}) + "\n")
        try:
            run_jobs(queue, jobs, output / "logs")
        except RunError as error:
            failure = error
    reported = {**before, **asked}
    results = [read_results(output, p, reported[p.name]) for p in PARTS.values() if p.name in reported]
    Console().print(f"report: {write_study(output, results)}", highlight=False, soft_wrap=True)
    if failure is not None:
        raise failure
    return 0


def parse_seeds(text: str) -> list[int]:
    """``11,12`` -> ``[11, 12]``; raises TempoError for anything but different integers from 0."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise TempoError(f"command line: --seeds {text}: {word!r} is no seed; integers from 0 are, as in 11,12,13")
    seeds = [int(word) for word in words]
    repeated = next((seed for i, seed in enumerate(seeds) if seed in seeds[:i]), None)
    if repeated is not None:
        raise TempoError(f"command line: --seeds {text}: {repeated} stands twice; seeds must differ")
    return seeds


def _parts(name: str) -> list[Part]:
    if name == ALL:
        return list(PARTS.values())
    if name not in PARTS:
        raise TempoError(f"command line: --part {name} must be one of {', '.join(PARTS)}, {ALL}")
    return [PARTS[name]]


def _default_seeds(part: Part) -> list[int]:
    return list(range(FIRST_SEED, FIRST_SEED + part.seeds + SPARE_SEEDS))


def _queue(output: Path, asked: Seeds) -> list[Job]:
    """The jobs of all parts; those that parts share once."""
    jobs = [job for name, seeds in asked.items() for job in jobs_of(output, seeds, PARTS[name].arms)]
    return list({job.folder: job for job in jobs}.values())


def _asked_before(output: Path) -> dict[str, list[int]]:
    file = output / ASKED
    if not file.exists():
        return {}
    try:
        asked = json.loads(file.read_text())
        return {name: [int(seed) for seed in asked[name]] for name in PARTS if name in asked}
    except (ValueError, TypeError):
        raise TempoError(
            f"{file}: must be a JSON object of lists of seeds; remove it and name --part and --seeds"
        ) from None
