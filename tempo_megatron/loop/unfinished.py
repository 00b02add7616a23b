"""What an EM step has done so far, as a checkpoint within it holds it: its rollouts, and what was found of them.

Facts of rows are rank 0's; tokens are those of the rows that a rank owns. Whoever goes on, on however many ranks, has
the step's rollouts at the ranks that took them over, from where they are placed as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.diagnostics import Calibration
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import NOWHERE, RolloutBatch
from tempo_megatron.loop.collect import Collected
from tempo_megatron.loop.data import Pool, PromptData
from tempo_megatron.loop.driver import StepOutcome
from tempo_megatron.loop.estep import RecalibratedCritic
from tempo_megatron.loop.placement import Homes
from tempo_megatron.loop.session import Session
from tempo_megatron.loop.verification import CheckCounts
from tempo_megatron.parallel.distributed import on_rank0, rank, world_size
from tempo_megatron.parallel.exchange import move_rows
from tempo_megatron.training.engine import StepResult

#: Facts of a batch that are tensors, by field.
_FACTS = (
    "group",
    "response_lengths",
    "response_bytes",
    "labeled",
    "outcome",
    "answer_cluster",
    "oracle_outcome",
)
_FACT = "fact."  # before their names in a file

#: (old rank, its tensors), of those that this rank takes over.
SavedRows = Sequence[tuple[int, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Unfinished:
    """A step that a run goes on with.

    Attributes:
        collected: its rollouts, not placed yet; None once the policy has been refined.
        recalibrated: None: the E-step is still to come, or there is none.
        early_values: of the critic before the E-step, and the rank that has each row's, where they were taken first.
        outcome: of a step whose M-step is done, but for what the controller adds.
    """

    collected: Collected | None = None
    recalibrated: RecalibratedCritic | None = None
    early_values: tuple[Ragged, Tensor] | None = None
    outcome: StepOutcome | None = None


# ---------------------------------------------------------------- to a checkpoint


def pack_rollouts(
    session: Session,
    collected: Collected,
    recalibrated: RecalibratedCritic | None = None,
    early_values: Ragged | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The step's state, JSON types, and this rank's tensors, of the batch as it is placed now, or not placed yet."""
    batch = collected.batch
    owner = _owners(session, batch)
    tensors = {
        **_held("ids", batch.response_token_ids.only(owner == rank())),
        **_held("log_probs", batch.rollout_log_probs.only(owner == rank())),
    }
    facts = {name: getattr(batch, name) for name in _FACTS}
    facts |= {"owner": owner, "for_actor": collected.for_actor, "for_critic": collected.for_critic}
    state: dict[str, Any] = {
        "record_ids": batch.record_ids,
        "finish_reason": batch.finish_reason,
        "weights_version": batch.weights_version,
        "checks": asdict(collected.checks),
        "rounds": collected.rounds,
        "dropped_prompts": collected.dropped_prompts,
    }
    if recalibrated is not None:
        state["calibration"] = asdict(recalibrated.calibration)
        state["critic_steps"] = [
            {"loss": s.loss, "sums": s.sums, "grad_norm": s.grad_norm, "lr": s.lr} for s in recalibrated.steps
        ]
    if early_values is not None:
        critic = _homes(session, batch).owners
        tensors |= _held("early_values", early_values.only(critic == rank()))
        facts["early_values_owner"] = critic
    if rank() == 0:
        tensors |= {f"{_FACT}{name}": tensor for name, tensor in facts.items()}
    return state, {name: tensor.contiguous() for name, tensor in tensors.items()}


def pack_outcome(outcome: StepOutcome) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same of a step whose M-step is done."""
    return {"outcome": asdict(outcome)}, {}


def _owners(session: Session, batch: RolloutBatch) -> Tensor:
    """``[N]`` the one rank that saves a row's tokens: the one that sampled it, or the first that trains on it."""
    if bool((batch.actor_home == NOWHERE).all() & (batch.critic_home == NOWHERE).all()):
        return batch.source
    actor = Homes(session.engines["actor"].groups.grid, batch.actor_home)
    if "critic" not in session.engines:
        return actor.owners
    return torch.where(batch.actor_home == NOWHERE, _homes(session, batch).owners, actor.owners)


def _homes(session: Session, batch: RolloutBatch) -> Homes:
    return Homes(session.engines["critic"].groups.grid, batch.critic_home)


def _held(name: str, rows: Ragged) -> dict[str, Tensor]:
    at = (rows.lengths > 0).nonzero().flatten()
    return {f"{name}.at": at, f"{name}.lengths": rows.lengths[at], name: rows.values}


# ---------------------------------------------------------------- from a checkpoint


def unpack(session: Session, state: Mapping[str, Any], saved: SavedRows) -> Unfinished:
    """What ``pack_rollouts`` or ``pack_outcome`` gave, on the ranks of now. Collective."""
    if "outcome" in state:
        return Unfinished(outcome=StepOutcome(**state["outcome"]))
    facts = on_rank0(lambda: _facts(saved))
    collected = _unpack_collected(session, state, facts, saved)
    if "calibration" not in state:
        return Unfinished(collected)
    steps = [StepResult(outputs={}, **fields) for fields in state["critic_steps"]]
    recalibrated = RecalibratedCritic(Calibration(**state["calibration"]), steps)
    early = None
    if "early_values_owner" in facts:
        early = _taken("early_values", saved, len(collected.batch)), facts["early_values_owner"] % world_size()
    return Unfinished(collected, recalibrated, early)


def _facts(saved: SavedRows) -> dict[str, Tensor]:
    """Of the old rank 0, whose rows the new one takes over."""
    return {name.removeprefix(_FACT): t for name, t in dict(saved)[0].items() if name.startswith(_FACT)}


def _unpack_collected(
    session: Session, state: Mapping[str, Any], facts: Mapping[str, Tensor], saved: SavedRows
) -> Collected:
    n = len(state["record_ids"])
    prompts = _prompts(session)
    batch = RolloutBatch(
        record_ids=state["record_ids"],
        prompt_token_ids=[prompts[record] for record in state["record_ids"]],
        response_token_ids=_taken("ids", saved, n),
        responses=Ragged.empty(n, torch.uint8),  # they were judged
        finish_reason=state["finish_reason"],
        rollout_log_probs=_taken("log_probs", saved, n),
        source=facts["owner"] % world_size(),
        weights_version=state["weights_version"],
        actor_home=torch.full((n,), NOWHERE),
        critic_home=torch.full((n,), NOWHERE),
        **{name: facts[name] for name in _FACTS},
    )
    checks = {**state["checks"], "failures": Counter(state["checks"]["failures"])}
    return Collected(
        batch,
        for_actor=facts["for_actor"],
        for_critic=facts["for_critic"],
        checks=CheckCounts(**checks),
        rounds=state["rounds"],
        dropped_prompts=state["dropped_prompts"],
    )


def _prompts(session: Session) -> dict[str, list[int]]:
    data = session.data
    assert isinstance(data, PromptData)
    pools: list[Pool] = [pool for pool in (data.labeled, data.unlabeled) if pool is not None]
    return {r.id: ids for pool in pools for r, ids in zip(pool.records, pool.token_ids, strict=True)}


def _taken(name: str, saved: SavedRows, n: int) -> Ragged:
    """The rows of N that this rank has taken over."""
    parts = [tensors for _, tensors in saved]
    at = torch.cat([p[f"{name}.at"] for p in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    if not len(at):
        kind = {"ids": torch.int32}.get(name, torch.float32)
        return Ragged.empty(n, kind)
    rows = Ragged.of_lengths(torch.cat([p[name] for p in parts]), torch.cat([p[f"{name}.lengths"] for p in parts]))
    held = torch.zeros(n, dtype=torch.bool)
    held[at] = True
    return rows.rows(at.argsort()).among(held)


def placed_values(session: Session, batch: RolloutBatch, early: tuple[Ragged, Tensor]) -> Ragged:
    """Values that were taken over, at the ranks that compute the critic's outputs for the rows. Collective."""
    values, source = early
    return move_rows(values, batch.response_lengths + 1, source, _homes(session, batch).readers)
