"""Supervised cold start: next-token loss on the responses of a prompt+response parquet."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempo_megatron.algorithm.policy_loss import aggregate
from tempo_megatron.data.sampler import PromptSampler
from tempo_megatron.loop.data import SftData
from tempo_megatron.loop.session import Session
from tempo_megatron.training.microbatch import Sequences


class SFTLoop:
    """Optimizer steps over shuffled epochs of the data; checkpoints and resumes like the other stages."""

    def __init__(self, session: Session) -> None:
        self.session = session
        assert isinstance(session.data, SftData)
        self.prompts, self.responses = session.data.prompts, session.data.responses
        self.sampler = PromptSampler(len(self.prompts), session.config.seed)
        self.step = 0
        if session.resumed is not None:
            self.step = session.resumed["step"]
            self.sampler.load_state_dict(session.resumed["sampler"])

    def run(self) -> None:
        session, config = self.session, self.session.config
        every = config.checkpoint.every or config.steps
        with session.running(self.step):
            while self.step < config.steps:
                metrics = self._train_step()
                self.step += 1
                session.record(self.step, self.step, metrics, {"loss": "sft/loss", "p(token)": "sft/token_probability"})
                if self.step % every == 0 or self.step == config.steps:
                    session.save(self._state())
            if config.checkpoint.export_hf:
                session.export_hf()

    def _state(self) -> dict[str, Any]:
        return {"step": self.step, "sampler": self.sampler.state_dict()}

    def _train_step(self) -> dict[str, Any]:
        session = self.session
        rows = self.sampler.draw(session.config.data.sft_batch_size)
        sequences = Sequences([self.prompts[i] for i in rows], [self.responses[i] for i in rows])
        lengths = torch.tensor([len(r) for r in sequences.responses])
        tokens = int(lengths.sum())
        with session.ledger.phase("train"):
            result = session.engines["actor"].step(sequences, partial(_nll, lengths=lengths, tokens=tokens))
            session.ledger.add_tokens("train", int(np.sum(sequences.lengths)))
        return {
            "sft/loss": result.loss,
            "sft/token_probability": math.exp(-result.loss),
            "sft/grad_norm": result.grad_norm,
            "sft/lr": result.lr,
            "sft/entropy": float(result.outputs["entropy"].sum()) / tokens,
            "sft/tokens": tokens,
        }


def _nll(
    tables: dict[str, Tensor], rows: list[int], *, lengths: Tensor, tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood per response token of the whole batch."""
    log_probs = tables["log_probs"]
    mask = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[rows].to(log_probs.device)[:, None]
    return (-aggregate(log_probs, mask, "token-mean") / tokens).to(log_probs.dtype), {}
