"""What one ``generate`` call returns, and the same with what was found out about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from tempo_megatron.data.ragged import Ragged

NOWHERE = -1


@dataclass(frozen=True)
class Rollouts:
    """N sampled responses; nobody has judged them yet.

    Facts of rows are known on every rank. Tokens are held by some ranks only (``Ragged``: a row that a rank does not
    hold has no tokens there): at first by the ``source`` that sampled them, then by the ranks that train them.

    Attributes:
        record_ids: ``[N]`` id of the prompt record.
        group: ``[N]`` int64, same number for samples of the same prompt draw (0, 1, ...).
        prompt_token_ids: N lists of prompt token ids, the data pool's own.
        response_token_ids: sampled token ids, int32; the stop token is the last one when ``finish_reason`` is
            ``"stop"``.
        responses: N texts of the responses (special tokens skipped), as bytes in UTF-8; only where they were sampled.
        response_bytes: ``[N]`` int64, lengths of the texts.
        finish_reason: ``[N]``, ``"stop"`` or ``"length"``.
        rollout_log_probs: float32, log p of each sampled token as processed by vLLM's sampler (after temperature,
            top-k, top-p).
        response_lengths: ``[N]`` int64 sampled tokens.
        source: ``[N]`` int64, the rank that sampled the row.
        labeled: ``[N]`` bool.
        weights_version: of the policy weights that sampled this.
    """

    record_ids: list[str]
    group: Tensor
    prompt_token_ids: list[list[int]]
    response_token_ids: Ragged
    responses: Ragged
    response_bytes: Tensor
    finish_reason: list[str]
    rollout_log_probs: Ragged
    response_lengths: Tensor
    source: Tensor
    labeled: Tensor
    weights_version: int

    def __len__(self) -> int:
        return len(self.record_ids)

    @property
    def truncated(self) -> Tensor:
        """``[N]`` bool: cut off at the limit of the response's length."""
        return torch.tensor([reason == "length" for reason in self.finish_reason], dtype=torch.bool)

    def rows(self, index: Tensor | list[int]) -> Self:
        """The rows at ``index`` (int64 positions), in that order."""
        picks = [int(i) for i in index]
        at = torch.tensor(picks, dtype=torch.int64)
        values = {}
        for f in fields(self):
            v = getattr(self, f.name)
            if isinstance(v, Tensor):
                v = v[at]
            elif isinstance(v, Ragged):
                v = v.rows(at)
            elif isinstance(v, list):
                v = [v[i] for i in picks]
            values[f.name] = v
        return type(self)(**values)

    def with_outcomes(
        self, outcome: Tensor, *, answer_cluster: Tensor | None = None, oracle_outcome: Tensor | None = None
    ) -> RolloutBatch:
        """These rows with what the verifier says of them; see ``RolloutBatch``.

        Args:
            outcome: ``[N]`` float32.
            answer_cluster: ``[N]`` int64, or None: answers were not compared.
            oracle_outcome: ``[N]`` float32, or None: nobody asked for them.
        """
        n = len(self)
        return RolloutBatch(
            **{f.name: getattr(self, f.name) for f in fields(Rollouts)},
            outcome=outcome,
            answer_cluster=torch.full((n,), -1, dtype=torch.int64) if answer_cluster is None else answer_cluster,
            oracle_outcome=torch.full((n,), torch.nan) if oracle_outcome is None else oracle_outcome,
            actor_home=torch.full((n,), NOWHERE),
            critic_home=torch.full((n,), NOWHERE),
        )


@dataclass(frozen=True)
class RolloutBatch(Rollouts):
    """Rollouts with their outcomes: what the E-step and the M-step train on.

    Attributes:
        outcome: ``[N]`` float32, 1 correct, 0 wrong; NaN on unlabelled rows and where the check itself failed.
        answer_cluster: ``[N]`` int64, the same number for equal answers within a group, -1 without an answer
            (and everywhere, in methods that do not compare answers).
        oracle_outcome: ``[N]`` float32, true outcome of unlabelled rows in the oracle's runs, else NaN.
        actor_home, critic_home: ``[N]`` int64, the role's data-parallel shard whose ranks hold and train the row;
            ``NOWHERE`` until it is placed, and where the role does not train it.
    """

    outcome: Tensor
    answer_cluster: Tensor
    oracle_outcome: Tensor
    actor_home: Tensor
    critic_home: Tensor

    @staticmethod
    def concat(batches: Sequence[RolloutBatch]) -> RolloutBatch:
        """One batch of all rows; groups are renumbered so that they stay apart. All must have one version."""
        versions = {b.weights_version for b in batches}
        if len(versions) != 1:
            raise ValueError(f"rollouts of different weight versions {sorted(versions)} can't be one batch")
        values: dict[str, Any] = {"weights_version": versions.pop()}
        offset, groups = 0, []
        for b in batches:
            groups.append(b.group + offset)
            offset += int(b.group.max()) + 1 if len(b) else 0
        values["group"] = torch.cat(groups)
        for f in fields(RolloutBatch):
            if f.name in values:
                continue
            parts = [getattr(b, f.name) for b in batches]
            if isinstance(parts[0], Tensor):
                values[f.name] = torch.cat(parts)
            elif isinstance(parts[0], Ragged):
                values[f.name] = Ragged.concat(parts)
            else:
                values[f.name] = [x for p in parts for x in p]
        return RolloutBatch(**values)
