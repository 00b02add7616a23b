"""``tempo-megatron doctor`` without ``--mismatch``: this node, this job and a config."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tempo_megatron.doctor.accelerator import check_accelerator
from tempo_megatron.doctor.finding import Finding, Verdict, fault, of_verdict, ok, warning
from tempo_megatron.doctor.folders import check_folder
from tempo_megatron.doctor.machine import check_host_name, check_memory, check_process_limits, check_shared_memory
from tempo_megatron.doctor.packages import check_packages, installed
from tempo_megatron.doctor.slurm import check_slurm
from tempo_megatron.errors import RunError, TempoError

if TYPE_CHECKING:
    from tempo_megatron.config.schema import Config

#: What tells a process that it is a rank, of torchrun, srun or this program.
OF_RANKS = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_", "TEMPO_MEGATRON_")

COLORS: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "fault": "red"}


def examine_node(config: Config | None, ranks: int) -> list[Finding]:
    """Everything that one process can see.

    Args:
        ranks: of this node.
    """
    dtypes: set[str] = {config.actor.dtype, config.rollout.dtype} if config is not None else set()
    master = os.environ.get("MASTER_ADDR")
    findings = [
        *check_packages(installed()),
        *check_accelerator(dtypes),
        check_memory(ranks),
        check_shared_memory(ranks),
        *check_process_limits(),
        *check_host_name([socket.gethostname()], master),
        *check_folder(Path(tempfile.gettempdir()), "temporary folder", speed=True),
    ]
    if config is not None:
        findings += check_folder(Path(config.output_dir), "output_dir", speed=True)
    return findings + check_slurm()


def examine_inputs(config: Config, world_size: int) -> list[Finding]:
    """Models, tokenizer, template and data as ``train --dry-run`` reads them, in its words; by a process of its own."""
    from tempo_megatron.config.load import dump_config

    alone = config.model_copy(update={"launch": config.launch.model_copy(update={"nproc_per_node": world_size})})
    environment = {key: value for key, value in os.environ.items() if not key.startswith(OF_RANKS)}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump_config(alone))
        file.flush()
        command = [sys.executable, "-m", "tempo_megatron", "train", "--config", file.name, "--dry-run"]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    if done.returncode != 0:
        return [fault("config", (lines or [f"exit code {done.returncode}"])[-1], "what train would refuse")]
    marks = ("checked: ", "warning: ")
    told = [line.partition(mark) for line in lines for mark in marks if mark in line]
    return [ok("config", t) if mark == "checked: " else warning("config", t, "") for _, mark, t in told]


def show(findings: list[Finding], json_file: Path | None) -> None:
    """The table on stdout, and all of it in ``json_file``.

    Raises:
        TempoError: the file cannot be written.
    """
    table = Table(show_edge=False, pad_edge=False)
    for name in ("check", "", "what is there, and what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        told = Text(finding.told)
        if finding.remedy:
            told.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(Text(finding.check), Text(finding.verdict, style=COLORS[finding.verdict]), told)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)
    if json_file is not None:
        counts = {verdict: len(of_verdict(findings, verdict)) for verdict in COLORS}
        record = {"host": socket.gethostname(), "counts": counts, "findings": [vars(f) for f in findings]}
        try:
            json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise TempoError(f"--json: {json_file}: {error.strerror}") from None


def conclude(findings: list[Finding]) -> None:
    """Raises RunError where there is a fault."""
    faults, warnings = len(of_verdict(findings, "fault")), len(of_verdict(findings, "warning"))
    if faults:
        raise RunError(f"doctor: {faults} fault{'s' * (faults > 1)} and {warnings} warning{'s' * (warnings != 1)}")
