"""The command line of ``train --dry-run --nodes N``: which job is walked through, and as which of its ranks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from tempo_megatron.errors import TempoError

HELP = """With --dry-run: walk through one step of a job of this size as a few of its ranks, one after the other, in
this process. Needs no GPU and no file of the job but its configuration (and a config.json of the model)."""


@dataclass(frozen=True)
class ScaledJob:
    """What is walked through.

    Attributes:
        nodes, gpus_per_node: of the job.
        ranks: to play; none given: a few telling ones.
        model: folder with the config.json (and perhaps a tokenizer) of roles whose ``init`` is not on this machine.
        micro_batches: of each pass that are walked; the others are the same work on other lengths.
        json: file for all that was found.
    """

    nodes: int
    gpus_per_node: int
    ranks: tuple[int, ...] = ()
    model: Path | None = None
    micro_batches: int = 3
    json: Path | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def add_scaled_arguments(train: argparse.ArgumentParser) -> None:
    """The options of ``train --dry-run`` on a job that is larger than this machine."""
    group = train.add_argument_group("a dry run at scale", HELP)
    group.add_argument("--nodes", type=int, metavar="N", help="nodes of the job")
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks of each; default: 8")
    group.add_argument("--ranks", metavar="N,N,...", help="ranks to play; default: first, neighbours, last stage, last")
    group.add_argument(
        "--model", type=Path, metavar="DIR", help="config.json (and tokenizer) where actor.init or critic.init are not"
    )
    group.add_argument("--micro-batches", type=int, metavar="N", help="walked of each pass; default: 3")
    group.add_argument("--json", type=Path, metavar="FILE", help="all that was found, for every rank that was played")


def scaled_job(arguments: argparse.Namespace) -> ScaledJob | None:
    """The job of the command line; None where there is none.

    Raises:
        TempoError: options that do not go together, or numbers that cannot be.
    """
    options = ("gpus_per_node", "ranks", "model", "micro_batches", "json")
    given = [name for name in options if getattr(arguments, name) is not None]
    if arguments.nodes is None:
        if given:
            raise TempoError(f"command line: --{given[0].replace('_', '-')} needs --nodes, the nodes of the job")
        return None
    if not arguments.dry_run:
        raise TempoError("command line: --nodes needs --dry-run; a job's nodes are given to sbatch, srun or torchrun")
    for name in ("nodes", "gpus_per_node", "micro_batches"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise TempoError(f"command line: --{name.replace('_', '-')} {number} must be at least 1")
    chosen = {name: getattr(arguments, name) for name in ("model", "micro_batches", "json") if name in given}
    gpus = 8 if arguments.gpus_per_node is None else arguments.gpus_per_node
    return ScaledJob(arguments.nodes, gpus, _ranks(arguments.ranks, arguments.nodes * gpus), **chosen)


def _ranks(text: str | None, world_size: int) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        ranks = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise TempoError(f"command line: --ranks {text} must be numbers between commas, such as 0,137,511") from None
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise TempoError(f"command line: --ranks {rank} is not one of the job's ranks 0 to {world_size - 1}")
    return ranks
