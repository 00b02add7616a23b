"""``tempo-megatron doctor``: its arguments, and who runs what."""

from __future__ import annotations

import argparse
import os
from typing import Any

from tempo_megatron.cluster.launch import RankInfo, rank_environment
from tempo_megatron.cluster.local import spawn_ranks
from tempo_megatron.errors import TempoError

HELP = """Examine what a run rests on: packages and their pins, GPUs, memory and its limits, shared memory, folders and
their file systems, clocks, host names, Slurm's settings. With --config also its models, tokenizer, data and output
folder, and on the ranks of a job (torchrun, srun, or launch.nproc_per_node of them) an all-reduce over every group.
Exit code 0, or 3 where there is a fault. A part of it is done at the start of every run.

  tempo-megatron doctor
  tempo-megatron doctor --config configs/x.yaml --json doctor.json
  srun python -m tempo_megatron doctor --config configs/x.yaml

"""

#: Options that belong to ``--mismatch``, and what they are where they are not given.
OF_MISMATCH: dict[str, Any] = {"set": [], "prompts": None, "tokens": None, "output": None}
SIZES = {"prompts": 8, "tokens": 64}


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises TempoError for options that belong to the other mode."""
    if arguments.mismatch is not None and arguments.json is not None:
        raise TempoError("command line: --json is not for --mismatch, which has --output")
    for name, absent in OF_MISMATCH.items():
        if arguments.mismatch is None and getattr(arguments, name) != absent:
            raise TempoError(f"command line: --{name} belongs to --mismatch")
    if arguments.mismatch is None and arguments.overrides and arguments.config is None:
        raise TempoError(f"command line: {arguments.overrides[0]} needs --config, whose settings it changes")


def positive(arguments: argparse.Namespace, option: str) -> int:
    """A size of ``--mismatch``, or its default. Raises TempoError below 1."""
    given: int | None = getattr(arguments, option)
    if given is not None and given < 1:
        raise TempoError(f"command line: --{option} {given} must be at least 1")
    return SIZES[option] if given is None else given


def run_doctor(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    """Raises RunError where there is a fault, TempoError on bad arguments."""
    config, world_size = None, place.world_size if place else 1
    if arguments.config is not None:
        from tempo_megatron.config.check import check_config
        from tempo_megatron.config.load import load_config

        config = load_config(arguments.config, arguments.overrides)
        world_size = place.world_size if place else config.launch.nproc_per_node
        check_config(config, world_size)
        os.environ.update(rank_environment(config.launch.threads_per_rank))
    if config is None:
        if world_size > 1:
            raise TempoError(f"doctor: {world_size} ranks need --config, which says what groups they make")
        from tempo_megatron.doctor.command import conclude, examine_node, show

        findings = examine_node(None, ranks=1)
        show(findings, arguments.json)
        conclude(findings)
        return 0
    from tempo_megatron.loop import load_examination, run_examination

    if place is None and world_size > 1:
        return spawn_ranks(world_size, arguments.words, load_examination)
    run_examination(config, arguments.json)
    return 0
