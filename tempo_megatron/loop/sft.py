"""Supervised cold start: next-token loss on the responses of a prompt+response parquet."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from tempo_megatron.algorithm.policy_loss import aggregate
from tempo_megatron.data.sampler import PromptSampler
from tempo_megatron.errors import TempoError
from tempo_megatron.loop.batching import entropy_here, first_columns, moved_role, over_shards
from tempo_megatron.loop.data import SftData
from tempo_megatron.loop.driver import Driver, StepOutcome
from tempo_megatron.loop.session import Session
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.rollout.limits import check_model
from tempo_megatron.training.microbatch import Sequences


class SFTLoop(Driver):
    """Optimizer steps over shuffled epochs of the data."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        assert isinstance(session.data, SftData)
        self.prompts, self.responses = session.data.prompts, session.data.responses
        self.sampler = PromptSampler(len(self.prompts), session.config.seed)
        if session.resumed is not None:
            self.sampler.load_state_dict(session.resumed["sampler"])
        self._warn_of_later_stages()

    def _warn_of_later_stages(self) -> None:
        """A cold start needs no vLLM, but nobody wants one of a model that no stage after it can sample from."""
        session = self.session
        try:
            check_model(str(session.hf_dir), session.hf_config, 1, on_cpu=not use_cuda())
        except TempoError as error:
            session.progress.note(f"warning: stages after sft and evaluate refuse this model: {error}")

    @property
    def policy_updates(self) -> int:
        return self.step

    def is_done(self) -> bool:
        return self.step >= self.config.steps

    def state_dict(self) -> dict[str, Any]:
        return {"policy_updates": self.step, "critic_updates": 0, "sampler": self.sampler.state_dict()}

    def train_step(self) -> StepOutcome:
        session, actor = self.session, self.session.engines["actor"]
        rows = self.sampler.draw(self.config.data.sft_batch_size)
        sequences = Sequences.of([self.prompts[i] for i in rows], [self.responses[i] for i in rows])
        lengths = sequences.response_lengths
        tokens = int(lengths.sum())
        with session.ledger.phase("train"):
            result = actor.step(sequences, partial(nll, lengths=lengths, tokens=tokens))
            session.ledger.add_tokens("train", int(np.sum(sequences.lengths)))
        self.moved |= moved_role("actor", [result])
        chance = math.exp(-result.loss)
        metrics = {
            "sft/loss": result.loss,
            "sft/token_probability": chance,
            "sft/grad_norm": result.grad_norm,
            "sft/lr": result.lr,
            "sft/entropy": over_shards(entropy_here(result), actor) / tokens,
            "sft/tokens": tokens,
        }
        return StepOutcome(metrics, {"loss": result.loss, "p(token)": chance}, policy_updated=True)


def nll(
    outputs: dict[str, Tensor], rows: list[int], *, lengths: Tensor, tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood per response token of the whole batch."""
    log_probs = outputs["log_probs"]
    mask = first_columns(lengths, rows, log_probs)
    return (-aggregate(log_probs, mask, "token-mean") / tokens).to(log_probs.dtype), {}
