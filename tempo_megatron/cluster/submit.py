"""``tempo-megatron submit``: resolved settings and a batch script in the run's folder, and their submission.

What ``train`` would refuse before a model is built is refused here, on the login node, before it waits in a queue.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tempo_megatron.cluster.sbatch import Job, ranks_per_node, render
from tempo_megatron.errors import TempoError

if TYPE_CHECKING:
    from tempo_megatron.config.schema import Config

#: In the run's folder: what was submitted, and Slurm's logs.
FOLDER = "submit"
#: A stage begins when the one before it has ended well, and goes with it.
AFTER = ("--kill-on-invalid-dep=yes",)
SBATCH_TIMEOUT_S = 120

HELP = """Write the resolved settings and a batch script that needs no other file into the run's folder, and submit it.

Several files are a chain of stages: each job begins when the one before it has ended well; a stage may start from an
earlier one (actor.init: its output_dir). The settings' section slurm is what is asked of Slurm; docs/slurm.md says what
becomes of a job that is signalled, preempted or loses a node.

  tempo-megatron submit --config configs/aime/qwen3-8b/rlvr.yaml --dry-run
  tempo-megatron submit --config configs/aime/qwen3-8b/{rlvr,tempo}.yaml --nodes 4 slurm.partition=h100
  tempo-megatron submit --evaluate runs/a runs/b slurm.time=2:00:00
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command; ``overrides`` may stand among the files."""
    parser.description, parser.formatter_class = HELP, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="YAML files, one for each stage")
    parser.add_argument("--evaluate", nargs="+", default=[], metavar="MODEL", help="an array: evaluate each of them")
    parser.add_argument("--nodes", type=int, metavar="N", help="slurm.nodes")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="slurm.gpus_per_node; 0: CPU ranks")
    parser.add_argument("--dry-run", action="store_true", help="write the files, submit nothing")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that win over the files"
    )


def run_submit(arguments: argparse.Namespace) -> int:
    """Exit code 0, or TempoError before anything is submitted that could not be."""
    files, models, overrides = _sorted_words(arguments)
    if models:
        if len(files) > 1:
            raise TempoError(f"command line: --evaluate takes one --config, for all models; {len(files)} are given")
        jobs = [evaluation_array(models, files[0] if files else None, overrides)]
    elif files:
        jobs = chain(files, overrides)
    else:
        raise TempoError("command line: give --config FILE..., or --evaluate MODEL...")
    scripts = [_write(job) for job in jobs]
    if arguments.dry_run:
        _tell_how(scripts)
    else:
        _submit(jobs, scripts)
    return 0


def _sorted_words(arguments: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Files, models and overrides: argparse takes ``key=value`` behind ``--config`` for one more file."""
    sizes = {"nodes": arguments.nodes, "gpus_per_node": arguments.gpus_per_node}
    overrides = [f"slurm.{name}={size}" for name, size in sizes.items() if size is not None]
    told: tuple[list[str], list[str]] = ([], [])
    for words, kept in zip((arguments.config, arguments.evaluate), told, strict=True):
        for word in words:
            (overrides if "=" in word and not Path(word).exists() else kept).append(word)
    return *told, [*overrides, *arguments.overrides]


# ---------------------------------------------------------------- what is run


def chain(files: Sequence[str], overrides: Sequence[str]) -> list[Job]:
    """A training job for each file, in order.

    Raises:
        TempoError: what ``train`` would refuse, of any of them.
    """
    from tempo_megatron.config.check import check_config
    from tempo_megatron.config.load import dump_config, load_config

    jobs: list[Job] = []
    earlier: dict[str, Config] = {}
    for file in files:
        config = load_config(file, overrides)
        folder = os.path.normpath(config.output_dir)
        if folder in earlier:
            raise TempoError(f"{file}: output_dir: {config.output_dir!r} is that of an earlier stage; they must differ")
        _check_requeue(config, file)
        earlier[folder] = _from_the_first(config, earlier)
        try:
            check_config(earlier[folder], config.slurm.nodes * ranks_per_node(config.slurm, config.launch))
            _check_memory(earlier[folder])
        except TempoError as error:
            raise TempoError(f"{file}: {error}") from None
        command = ["train", "--config", str(Path(config.output_dir) / FOLDER / "config.yaml")]
        jobs.append(_job(config, config.output_dir, command, texts={"config.yaml": dump_config(config)}))
    return jobs


def _from_the_first(config: Config, earlier: dict[str, Config]) -> Config:
    """The settings to check: a model that an earlier stage will have made has the shape of what that starts from."""
    changed = config.model_copy(deep=True)
    if (source := earlier.get(os.path.normpath(config.actor.init))) is not None:
        changed.actor.init = source.actor.init
    if changed.critic is not None and (source := earlier.get(os.path.normpath(changed.critic.init))) is not None:
        changed.critic.init = (source.critic or source.actor).init
    return changed


def _check_requeue(config: Config, file: str) -> None:
    if config.slurm.requeue and config.resume != "auto":
        raise TempoError(
            f"{file}: resume: {config.resume!r} would hold for every start of a job that is requeued; it must be auto "
            "(or slurm.requeue: false)"
        )


def _check_memory(config: Config) -> None:
    """Refuse what cannot fit on the nodes that the settings describe."""
    slurm = config.slurm
    if slurm.gpu is None:
        return
    from tempo_megatron.planner.hardware import CARDS
    from tempo_megatron.planner.refuse import Machine, refuse_what_cannot_fit

    host = sys.maxsize if slurm.host_memory_gib is None else int(slurm.host_memory_gib * (1 << 30))
    node = Machine(CARDS[slurm.gpu].memory, host, f"an {slurm.gpu} (slurm.gpu)", "a node (slurm.host_memory_gib)")
    refuse_what_cannot_fit(config, slurm.nodes * slurm.gpus_per_node, slurm.gpus_per_node, node)


def evaluation_array(models: Sequence[str], file: str | None, overrides: Sequence[str]) -> Job:
    """One job array; element i evaluates model i. What is asked of Slurm are the first one's settings.

    Raises:
        TempoError: what ``evaluate`` would refuse, of any of them.
    """
    from tempo_megatron.config.check import check_evaluation
    from tempo_megatron.config.evaluation import EvaluationRequest, evaluation_config

    configs = [evaluation_config(EvaluationRequest(model, file, overrides=overrides)) for model in models]
    slurm = configs[0].slurm
    for config in configs:
        check_evaluation(config, slurm.nodes * ranks_per_node(slurm, configs[0].launch))
    outputs = [config.output_dir for config in configs]
    if len(set(outputs)) < len(outputs):
        raise TempoError(f"command line: --evaluate {' '.join(models)}: two of them have one output folder: {outputs}")
    command = ["evaluate", *(["--config", file] if file is not None else []), *overrides]
    return _job(configs[0], outputs[0], command, saves=False, elements=models)


def _job(
    config: Config,
    output_dir: str,
    command: Sequence[str],
    *,
    texts: dict[str, str] | None = None,
    saves: bool = True,
    elements: Sequence[str] = (),
) -> Job:
    workdir = Path.cwd()
    folder = Path(output_dir) / FOLDER
    parts = [part for part in Path(os.path.abspath(output_dir)).parts[-3:] if part not in ("/", "runs")]
    return Job(
        name=re.sub(r"[^\w.-]+", "-", "-".join(parts)),
        command=command,
        slurm=config.slurm,
        launch=config.launch,
        workdir=workdir,
        folder=folder,
        log=workdir / folder / f"%x-{'%A_%a' if elements else '%j'}.out",
        texts=texts or {},
        saves=saves,
        elements=elements,
    )


# ---------------------------------------------------------------- files, Slurm


def _write(job: Job) -> Path:
    """The script's path; what stands beside it is written, too."""
    script = job.folder / f"{job.name}.sbatch"
    texts = {**{job.folder / name: text for name, text in job.texts.items()}, script: render(job)}
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, "utf-8")
    except OSError as error:
        raise TempoError(f"{job.folder}: cannot be written: {error.strerror or error}") from None
    size = f"{job.slurm.nodes} nodes x {job.ranks_per_node} ranks, {job.slurm.time}"
    what = f"{len(job.elements)} elements of {size}" if job.elements else size
    print(f"{job.name}: {what}: {', '.join(map(str, texts))}")
    return script


def _tell_how(scripts: Sequence[Path]) -> None:
    print("nothing is submitted; to do so:")
    for i, script in enumerate(scripts):
        given = f"id=$(sbatch --parsable{_after('$id') if i else ''} {shlex.quote(str(script))})"
        print(f"  {given if len(scripts) > 1 else f'sbatch {shlex.quote(str(script))}'}")


def _after(job_id: str) -> str:
    return f" --dependency=afterok:{job_id} {' '.join(AFTER)}"


def _submit(jobs: Sequence[Job], scripts: Sequence[Path]) -> None:
    for script in scripts:  # all of a chain or nothing
        _sbatch("--test-only", str(script))
    last: str | None = None
    for job, script in zip(jobs, scripts, strict=True):
        after = _after(last).split() if last is not None else []
        job_id = _sbatch("--parsable", *after, str(script)).strip().partition(";")[0]
        waits = f", after {last}" if last is not None else ""
        print(f"submitted job {job_id}{waits}: {job.log}".replace("%x", job.name).replace("%j", job_id))
        last = job_id


def _sbatch(*words: str) -> str:
    command = shlex.join(["sbatch", *words])
    try:
        done = subprocess.run(["sbatch", *words], capture_output=True, text=True, timeout=SBATCH_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise TempoError("sbatch: not found; submit where Slurm is, or give --dry-run to write the script") from None
    except subprocess.TimeoutExpired:
        raise TempoError(f"{command}: no answer of Slurm after {SBATCH_TIMEOUT_S} s (scontrol ping)") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise TempoError(f"{command}: Slurm refuses: {said}")
    return done.stdout
