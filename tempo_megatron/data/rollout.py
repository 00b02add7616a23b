"""What one ``generate`` call returns, and the same with what was found out about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """N sampled responses, padded to the longest response L of the batch; nobody has judged them yet.

    Every rank holds the same rows on the CPU; the trainer's ranks take their share by row.

    Attributes:
        record_ids: ``[N]`` id of the prompt record.
        group: ``[N]`` int64, same number for samples of the same prompt draw (0, 1, ...).
        prompt_token_ids: N lists of prompt token ids.
        response_token_ids: N lists of sampled token ids; the stop token is the last one when
            ``finish_reason`` is ``"stop"``.
        responses: N texts of the responses (special tokens skipped).
        finish_reason: ``[N]``, ``"stop"`` or ``"length"``.
        rollout_log_probs: ``[N, L]`` float32, log p of each sampled token as processed by vLLM's
            sampler (after temperature, top-k, top-p); 0 where the mask is False.
        response_mask: ``[N, L]`` bool, True on sampled tokens.
        labeled: ``[N]`` bool.
        weights_version: of the policy weights that sampled this.
    """

    record_ids: list[str]
    group: Tensor
    prompt_token_ids: list[list[int]]
    response_token_ids: list[list[int]]
    responses: list[str]
    finish_reason: list[str]
    rollout_log_probs: Tensor
    response_mask: Tensor
    labeled: Tensor
    weights_version: int

    def __len__(self) -> int:
        return len(self.record_ids)

    @property
    def response_lengths(self) -> Tensor:
        """``[N]`` int64."""
        return self.response_mask.sum(1)

    @property
    def truncated(self) -> Tensor:
        """``[N]`` bool: cut off at the limit of the response's length."""
        return torch.tensor([reason == "length" for reason in self.finish_reason], dtype=torch.bool)

    def rows(self, index: Tensor | list[int]) -> Self:
        """The rows at ``index`` (int64 positions), in that order; L stays."""
        picks = [int(i) for i in index]
        at = torch.tensor(picks, dtype=torch.int64)
        values = {}
        for f in fields(self):
            v = getattr(self, f.name)
            if isinstance(v, Tensor):
                v = v[at]
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
        )


@dataclass(frozen=True)
class RolloutBatch(Rollouts):
    """Rollouts with their outcomes: what the E-step and the M-step train on.

    Attributes:
        outcome: ``[N]`` float32, 1 correct, 0 wrong; NaN on unlabelled rows and where the check itself failed.
        answer_cluster: ``[N]`` int64, the same number for equal answers within a group, -1 without an answer
            (and everywhere, in methods that do not compare answers).
        oracle_outcome: ``[N]`` float32, true outcome of unlabelled rows in the oracle's runs, else NaN.
    """

    outcome: Tensor
    answer_cluster: Tensor
    oracle_outcome: Tensor

    @staticmethod
    def concat(batches: Sequence[RolloutBatch]) -> RolloutBatch:
        """One batch of all rows; groups are renumbered so that they stay apart. All must have one version."""
        versions = {b.weights_version for b in batches}
        if len(versions) != 1:
            raise ValueError(f"rollouts of different weight versions {sorted(versions)} can't be one batch")
        longest = max(b.response_mask.shape[1] for b in batches)
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
                if parts[0].dim() == 2:
                    parts = [torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in parts]
                values[f.name] = torch.cat(parts)
            else:
                values[f.name] = [x for p in parts for x in p]
        return RolloutBatch(**values)
