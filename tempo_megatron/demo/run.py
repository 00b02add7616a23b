"""``tempo-megatron demo``: prepared data and model, the stages through the ordinary ``train`` command, the report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tempo_megatron.cluster.lifetime import LAUNCHER
from tempo_megatron.errors import TempoError
from tempo_megatron.telemetry.findings import critic_findings
from tempo_megatron.telemetry.metrics import read_metrics
from tempo_megatron.telemetry.report import write_report
from tempo_megatron.telemetry.results import evaluations_of, explanation, results_table
from tempo_megatron.telemetry.run_folder import load_run

SUMMARY = "summary.json"
PREPARED = "prepared.json"


@dataclass(frozen=True)
class Demo:
    """A demo: where its configs lie, how its inputs are made and which file each evaluation set reads.

    Attributes:
        stages: in order; each starts from the one before, the first from ``OUTPUT/model``.
        prepare: (output, seed) -> writes ``OUTPUT/data`` and ``OUTPUT/model``.
        train_files: stage -> file in ``OUTPUT/data``.
        eval_files: files of the stages' evaluation sets, in the configs' order.
        main_set: the set that ``start`` and ``final`` of summary.json are about.
        notes: a word on each set, for the table.
        about: what is run and what its start and end are, in sentences.
    """

    name: str
    configs: Path
    stages: tuple[str, ...]
    prepare: Callable[[Path, int], None]
    train_files: Mapping[str, str]
    eval_files: tuple[str, ...]
    main_set: str
    notes: Mapping[str, str]
    about: tuple[str, ...]


def _prepare_toy(output: Path, seed: int) -> None:
    from tempo_megatron.demo.model import write_model
    from tempo_megatron.demo.task import write_task

    write_task(output / "data", seed)
    write_model(output / "model", seed)


def _prepare_real(output: Path, seed: int) -> None:
    from tempo_megatron.demo.real import write_arithmetic, write_smollm2

    write_arithmetic(output / "data", seed)
    print("unpacking SmolLM2-135M-Instruct to float32, about a minute", flush=True)
    write_smollm2(output / "model")


DEMO = Demo(
    name="TEMPO demo",
    configs=Path("configs/demo"),
    stages=("sft", "rlvr", "tempo"),
    prepare=_prepare_toy,
    train_files={"sft": "sft.parquet", "rlvr": "train.parquet", "tempo": "train.parquet"},
    eval_files=("eval_du.parquet", "eval_dl.parquet", "eval_hu.parquet"),
    main_set="D_U",
    notes={"D_U": "no labels used", "D_L": "labelled", "held-out": "never trained on"},
    about=(
        "A toy task that is engineered so that checking an answer is easier than finding it, and a model of 150 "
        "thousand parameters. Three stages: sft (imitates an imperfect solver), rlvr (PPO on the labelled problems), "
        "tempo (EM on the labelled and the unlabelled ones).",
        "Start is after rlvr, before the first step of tempo; end is after its last. D_U: unlabelled problems that "
        "tempo trains on. D_L: labelled ones. held-out: of D_U's kind, never trained on.",
        "This is one run of one seed. What several seeds give is in docs/study.md.",
    ),
)

REAL_DEMO = Demo(
    name="TEMPO demo on SmolLM2-135M-Instruct",
    configs=Path("configs/demo-real"),
    stages=("tempo",),
    prepare=_prepare_real,
    train_files={"tempo": "train.parquet"},
    eval_files=("eval_du.parquet",),
    main_set="D_U",
    notes={"D_U": "no labels used"},
    about=(
        "A few EM steps on small sums, to show that the path holds for a real model; it is not a result.",
        "Start is SmolLM2-135M-Instruct as published, with a fresh value head on the critic; end is after the last "
        "step. D_U: unlabelled sums that tempo trains on.",
    ),
)


def run_demo(
    demo: Demo, *, seed: int, output: Path | None, nproc: int, prepare: bool, train: bool, report: bool
) -> int:
    """Run the wanted parts; an interrupted demo of the same seed goes on where it was.

    Returns:
        exit status: 0, or that of the stage that failed.
    """
    began = time.monotonic()
    output = output or Path("runs") / demo.configs.name
    if prepare:
        _prepare(demo, output, seed)
    if train:
        for stage in demo.stages:
            config = ["--config", str(demo.configs / f"{stage}.yaml"), *_overrides(demo, stage, output, seed)]
            ranks = f"launch.nproc_per_node={nproc}"
            status = _call([sys.executable, "-m", "tempo_megatron", "train", *config, ranks])
            if status != 0:
                return status
    if report:
        _report(demo, output, seed, time.monotonic() - began if train else None)
    return 0


def _call(command: list[str]) -> int:
    """Run a stage; on Ctrl-C the stage has the signal too, and says what there is to say."""
    process = subprocess.Popen(command, env={**os.environ, LAUNCHER: str(os.getpid())})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _prepare(demo: Demo, output: Path, seed: int) -> None:
    """Make the inputs, unless an unfinished demo of this seed has them; another one is kept aside."""
    marker = output / PREPARED
    if marker.is_file() and not (output / SUMMARY).exists() and json.loads(marker.read_text()) == {"seed": seed}:
        return
    if output.exists() and not marker.is_file():
        raise TempoError(f"{output}: is there and holds no demo; choose another --output or remove it")
    partial = output.with_name(f".{output.name}.partial")  # what fails or is stopped leaves `output` as it was
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    demo.prepare(partial, seed)
    (partial / PREPARED).write_text(json.dumps({"seed": seed}))
    if output.exists():
        previous = output.with_name(f"{output.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(output, previous)
    os.replace(partial, output)


def _overrides(demo: Demo, stage: str, output: Path, seed: int) -> list[str]:
    """``key=value`` arguments that put a stage's config on this output folder and seed."""
    before = demo.stages.index(stage) - 1
    source = output / (demo.stages[before] if before >= 0 else "model")
    pairs: dict[str, Any] = {
        "output_dir": output / stage,
        "seed": seed,
        "data.train_files": f"[{output / 'data' / demo.train_files[stage]}]",
        "actor.init": source,
    }
    if stage != "sft":
        pairs["critic.init"] = source
        for i, file in enumerate(demo.eval_files):
            pairs[f"evaluation.sets.{i}.files"] = f"[{output / 'data' / file}]"
    return [f"{key}={value}" for key, value in pairs.items()]


def _report(demo: Demo, output: Path, seed: int, wall_s: float | None) -> None:
    """Print the table, write summary.json and report.html."""
    runs = [output / stage for stage in demo.stages]
    metrics = runs[-1] / "metrics.jsonl"
    evaluations = [r for r in read_metrics(metrics) if any(k.startswith("eval/") for k in r)]
    if not evaluations:
        raise TempoError(f"{metrics}: no evaluation in it (evaluation.at_start and at_end make them)")
    first, last = evaluations[0], evaluations[-1]
    if wall_s is None:
        wall_s = sum(json.loads((run / "run.json").read_text())["wall_s"] for run in runs)
    main_set = f"eval/{demo.main_set}/"
    summary = {
        "seed": seed,
        "start": _under(main_set, first),
        "final": _under(main_set, last),
        "all_sets": {"start": _under("eval/", first), "final": _under("eval/", last)},
        "steps": last["step"],
        "policy_updates": last["policy_updates"],
        "peak_memory_gib": round(max(_peak_gib(run) for run in runs), 2),
        "wall_s": round(wall_s, 1),
    }
    (output / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    loaded = [load_run(run) for run in runs]
    title = f"{demo.name}, seed {seed}"
    report = write_report(loaded, output / "report.html", summary, title, demo.about)
    found = evaluations_of(loaded[-1])
    assert found is not None  # there are evaluations, see above
    console = Console()
    console.print(results_table(found.results, title=title, notes=demo.notes))
    for line in (*demo.about, *explanation(found.results)):
        console.print(Text(line), soft_wrap=not console.is_terminal)
    for finding in critic_findings(loaded[-1]):
        console.print(Text.assemble(("warning: ", "bold"), str(finding)), soft_wrap=not console.is_terminal)
    console.print(f"{wall_s:.0f} s, peak memory of rank 0 {summary['peak_memory_gib']} GiB")
    console.print(f"{output / SUMMARY}, {report}", soft_wrap=True)


def _under(prefix: str, record: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}


def _peak_gib(run: Path) -> float:
    """Largest resident set (CPU) or allocation (GPU) of rank 0 in any phase of a run, GiB.

    The run's last checkpoint comes after its last record: only run.json knows of that, and of nothing before a resume.
    """
    recorded = [v for record in read_metrics(run / "metrics.jsonl") for v in _under("memory/", record).values()]
    return max(*recorded, json.loads((run / "run.json").read_text())["peak_memory_gib"])
