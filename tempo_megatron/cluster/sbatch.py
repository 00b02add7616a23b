"""A batch script for one job: what ``tempo-megatron submit`` hands to Slurm.  Text in, text out."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tempo_megatron.errors import TempoError

if TYPE_CHECKING:
    from tempo_megatron.config.job import LaunchConfig, SlurmConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """What one batch script runs.

    Attributes:
        name: of the job, and of its script and log.
        command: of ``python -m tempo_megatron``, word by word.
        slurm: what is asked of Slurm.
        launch: its ``nproc_per_node`` counts where there are no GPUs.
        workdir: absolute; relative paths of the configuration are relative to it.
        folder: of the script and ``texts``, relative to ``workdir``.
        log: where Slurm writes what the job says; Slurm's patterns (``%x``, ``%j``) allowed.
        texts: file name -> what is in it, written beside the script.
        saves: it can save and stop when it is told to.
        elements: of a job array: one start each, with it behind the first word of ``command``.
    """

    name: str
    command: Sequence[str]
    slurm: SlurmConfig
    launch: LaunchConfig
    workdir: Path
    folder: Path
    log: Path
    texts: Mapping[str, str] = field(default_factory=dict)
    saves: bool = True
    elements: Sequence[str] = ()

    @property
    def ranks_per_node(self) -> int:
        return ranks_per_node(self.slurm, self.launch)


def ranks_per_node(slurm: SlurmConfig, launch: LaunchConfig) -> int:
    """One a GPU, or ``launch.nproc_per_node`` on nodes without."""
    return slurm.gpus_per_node or launch.nproc_per_node


def render(job: Job) -> str:
    """The script, with ``batch.sh`` in it: Slurm copies it when it is submitted, and needs nothing else.

    Raises:
        TempoError: a path that Slurm cannot take.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell script: shlex quotes what goes in
    )
    slurm = job.slurm
    program = [slurm.python or ("python" if slurm.container_image else sys.executable), "-m", "tempo_megatron"]
    words = [*program, job.command[0]] if job.elements else [*program, *job.command]
    return environment.get_template("job.sbatch.j2").render(
        options=[_option(option) for option in _options(job)],
        about=f"{slurm.nodes} nodes x {job.ranks_per_node} ranks.",
        library=(HERE / "batch.sh").read_text("utf-8"),
        variables={name: shlex.quote(value) for name, value in _variables(job).items()}
        | ({"SRUN_OPTIONS": f"({shlex.join(slurm.srun_options)})"} if slurm.srun_options else {}),
        setup=slurm.setup,
        elements=[shlex.quote(element) for element in job.elements],
        command=shlex.join(words),
        arguments="".join(f" {shlex.quote(word)}" for word in job.command[1:]) if job.elements else "",
    )


def _options(job: Job) -> list[str]:
    """Of sbatch, in the order in which a person looks for them."""
    slurm = job.slurm
    options = [f"--job-name={job.name}", f"--nodes={slurm.nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    if slurm.gpus_per_node:
        options.append(f"--gpus-per-node={slurm.gpus_per_node}")
    if slurm.cpus_per_task is not None:
        options.append(f"--cpus-per-task={slurm.cpus_per_task}")
    if slurm.exclusive:
        options += ["--exclusive", "--mem=0"]
    options.append(f"--time={slurm.time}")
    given = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "constraint": slurm.constraint}
    options += [f"--{name}={value}" for name, value in given.items() if value is not None]
    if job.saves:
        options.append(f"--signal=B:{job.launch.save_signal}@{slurm.signal_lead_s}")
    if job.elements:
        options.append(f"--array=0-{len(job.elements) - 1}")
    options += ["--requeue" if slurm.requeue else "--no-requeue", "--open-mode=append"]
    return [*options, f"--chdir={job.workdir}", f"--output={job.log}", *slurm.options]


def _variables(job: Job) -> Mapping[str, str]:
    slurm = job.slurm
    variables = {"RANKS_PER_NODE": str(job.ranks_per_node), "SAVE_SIGNAL": job.launch.save_signal}
    variables["REQUEUE"] = str(int(slurm.requeue))
    if slurm.container_image is not None:
        variables["CONTAINER_IMAGE"] = slurm.container_image
        if slurm.container_mounts:
            variables["CONTAINER_MOUNTS"] = ",".join(slurm.container_mounts)
    return variables


def _option(option: str) -> str:
    """As sbatch reads it out of a script: in quotes where there are spaces."""
    if re.search(r"[\"'\\\n]", option):
        raise TempoError(f"command line: {option!r}: Slurm cannot take quotes, backslashes and line breaks here")
    return f'"{option}"' if re.search(r"[\s#]", option) else option
