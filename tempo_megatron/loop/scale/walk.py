"""One rank of the job: groups, models, optimizers, the passes of one step, what it saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tempo_megatron.algorithm.rewards import terminal_reward
from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.checkpoint.planned import PlannedShard, planned_shards
from tempo_megatron.config.schema import Config, ResidencyConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.locate import InitSource
from tempo_megatron.loop.batching import critic_values, policy_rows
from tempo_megatron.loop.estep import recalibrate_critic
from tempo_megatron.loop.mstep import refine_policy
from tempo_megatron.loop.placement import place
from tempo_megatron.loop.residency import Residency
from tempo_megatron.loop.runtime import Trainers
from tempo_megatron.loop.scale.checks import check_weight_map, group_members
from tempo_megatron.loop.scale.engine import Pass, PlayedEngine, Walk
from tempo_megatron.loop.scale.rows import Draw, Rows, sampled
from tempo_megatron.loop.sft import nll
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.played import played_rank
from tempo_megatron.reshard.holdings import Holdings
from tempo_megatron.telemetry.phases import PhaseLedger
from tempo_megatron.training.microbatch import Sequences

#: The draw whose micro-batches are walked through; of the others they are only counted.
WALKED: Draw = "longest"


@dataclass(frozen=True)
class Job:
    """What all ranks have in common.

    Attributes:
        hf_dirs: by role, the folder with its config.json.
        holdings: by role, what each rank has of its tensors.
        rows: of one step, by draw.
        shares: by draw, the vLLM replica that samples each prompt.
        micro_batches: that are walked of each kind of pass.
    """

    config: Config
    world_size: int
    hf_dirs: Mapping[Role, Path]
    holdings: Mapping[Role, Holdings]
    rows: Mapping[Draw, Rows]
    shares: Mapping[Draw, Sequence[int]]
    micro_batches: int


@dataclass(frozen=True)
class PlayedRole:
    """A role on one rank; bytes on the device.

    Attributes:
        place: its rank along each dimension of the layout that has several.
        groups: dimension -> ranks of the group that it is in.
        shards: what it holds of a checkpoint.
    """

    place: dict[str, int]
    groups: dict[str, list[int]]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    shards: list[PlannedShard]


@dataclass(frozen=True)
class PlayedRank:
    """What was found as one rank."""

    rank: int
    roles: dict[Role, PlayedRole]
    passes: dict[Draw, list[Pass]]
    peak_gib: float


class PlayedTrainers(Trainers):
    """The engines of a played rank, without weights."""

    def __init__(self, job: Job, walk: Walk) -> None:
        def enter(phase: str) -> None:
            walk.phase = phase

        self.config = job.config
        self.ledger = PhaseLedger(on_phase=enter)
        self.residency = Residency(ResidencyConfig(), Path(job.config.output_dir), phase=lambda: walk.phase)
        self.sources = {role: InitSource("hf", folder, folder) for role, folder in job.hf_dirs.items()}
        self.hf_config = load_hf_config(job.hf_dirs["actor"])
        self.engines, self.hf_dirs = {}, {}
        self.build_engines(trainable=True, engine=partial(PlayedEngine, walk))
        for role, engine in self.engines.items():
            with self.ledger.phase("load", f"the optimizer of the {role}"):
                engine.start_optimizer()


def play(job: Job, rank: int) -> PlayedRank:
    """Be ``rank`` for one step.

    Raises:
        TempoError: what the job would be refused for or would end with, with rank and phase.
    """
    with played_rank(rank, job.world_size) as wire:
        walk = Walk(wire, "groups", job.micro_batches)
        with _told(rank, walk):
            trainers = PlayedTrainers(job, walk)
            passes: dict[Draw, list[Pass]] = {}
            for draw, rows in job.rows.items():
                walk.passes, walk.micro_batches = [], job.micro_batches if draw == WALKED else 0
                train_step(trainers, rows, job.shares[draw], rank)
                passes[draw] = walk.passes
            roles = {role: _role(trainers, role, job.holdings[role], rank) for role in job.holdings}
        return PlayedRank(rank, roles, passes, trainers.ledger.peak_gib)


@contextmanager
def _told(rank: int, walk: Walk) -> Iterator[None]:
    """Whatever goes wrong is told in one line."""
    try:
        yield
    except TempoError as error:
        kind = RunError if isinstance(error, RunError) else TempoError
        raise kind(f"rank {rank}, {walk.phase}: {error}") from error
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise TempoError(f"rank {rank}, {walk.phase}: {type(error).__name__}: {' '.join(lines[:1])}") from error


def train_step(trainers: Trainers, rows: Rows, shares: Sequence[int], rank: int) -> None:
    """What ``EMLoop`` does of a step after sampling, with an E-step and an M-step; or what ``SFTLoop`` does."""
    config, seed = trainers.config, trainers.config.seed
    if config.stage == "sft":
        prompts = [draw.prompt_token_ids for draw in rows.prompts]
        sequences = Sequences.of(prompts, [[0] * n for n in rows.lengths.tolist()])
        with trainers.ledger.phase("train"):
            loss = partial(nll, lengths=rows.lengths, tokens=int(rows.lengths.sum()))
            trainers.engines["actor"].step(sequences, loss)
        return
    batch = sampled(config, rows, shares, rank)
    for_policy = policy_rows(config, torch.ones_like(batch.labeled), batch.labeled)
    with trainers.ledger.phase("place"):
        batch = place(trainers, batch, batch.labeled, for_policy, seed)
    estep = config.algorithm.estep
    early = critic_values(trainers, batch) if estep.order == "after_values" else None
    if "critic" in trainers.engines and estep.every is not None:
        recalibrate_critic(trainers, batch, batch.labeled, early, seed)
    chosen = for_policy.nonzero().flatten()
    policy = batch.rows(chosen)
    values = critic_values(trainers, policy) if early is None else early.rows(chosen)
    refine_policy(trainers, terminal_reward(config), policy, values, seed)


def _role(trainers: PlayedTrainers, role: Role, holdings: Holdings, rank: int) -> PlayedRole:
    engine, ledger = trainers.engines[role], trainers.ledger
    groups = engine.groups
    with ledger.phase("groups", f"of the {role}"):
        members = group_members(groups, rank)
    with ledger.phase("weight_map", f"of the {role}"):
        parameters = check_weight_map(engine, holdings, rank)
    with ledger.phase("checkpoint", f"of the {role}"):
        shards = planned_shards(engine)
    parts = engine.parts
    dimensions = [n for n in ("tp", "cp", "dp", "pp", "ep", "etp") if getattr(groups, f"{n}_size") > 1]
    return PlayedRole(
        place={name.upper(): getattr(groups, f"{name}_rank") for name in dimensions},
        groups=members,
        parameters=parameters,
        weights=parts.weights.nbytes(),
        gradients=parts.gradients.nbytes(),
        optimizer=parts.optimizer.nbytes(),
        shards=shards,
    )
