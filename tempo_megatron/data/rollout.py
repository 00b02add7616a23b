"""What one ``generate`` call returns, as every later phase of the step sees it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass
class RolloutBatch:
    """N sampled responses, padded to the longest response L of the batch.

    Every rank holds the same batch on the CPU; the trainer's ranks take their share by row.

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
        outcome: ``[N]`` float32, 1 correct, 0 wrong; NaN on unlabelled rows and until verified.
        answer_cluster: ``[N]`` int64, the same number for equal answers within a group, -1 without an answer
            (and everywhere, in methods that do not compare answers).
        oracle_outcome: ``[N]`` float32, true outcome of unlabelled rows in the oracle's runs, else NaN.
        weights_version: number of policy updates behind the weights that sampled this.
    """

    record_ids: list[str]
    group: torch.Tensor
    prompt_token_ids: list[list[int]]
    response_token_ids: list[list[int]]
    responses: list[str]
    finish_reason: list[str]
    rollout_log_probs: torch.Tensor
    response_mask: torch.Tensor
    labeled: torch.Tensor
    outcome: torch.Tensor
    answer_cluster: torch.Tensor
    oracle_outcome: torch.Tensor
    weights_version: int

    def __len__(self) -> int:
        return len(self.record_ids)

    @property
    def response_lengths(self) -> torch.Tensor:
        """``[N]`` int64."""
        return self.response_mask.sum(1)

    def rows(self, index: torch.Tensor | list[int]) -> RolloutBatch:
        """The rows at ``index`` (int64 positions), in that order; L stays."""
        picks = [int(i) for i in index]
        at = torch.tensor(picks, dtype=torch.int64)
        values = {}
        for f in fields(self):
            v = getattr(self, f.name)
            if isinstance(v, torch.Tensor):
                v = v[at]
            elif isinstance(v, list):
                v = [v[i] for i in picks]
            values[f.name] = v
        return RolloutBatch(**values)

    @staticmethod
    def concat(batches: list[RolloutBatch]) -> RolloutBatch:
        """One batch of all rows; groups are renumbered so that they stay apart. All must have one version."""
        versions = {b.weights_version for b in batches}
        if len(versions) != 1:
            raise ValueError(f"rollouts of different weight versions {sorted(versions)} can't be one batch")
        longest = max(b.response_mask.shape[1] for b in batches)
        values: dict = {"weights_version": versions.pop()}
        offset, groups = 0, []
        for b in batches:
            groups.append(b.group + offset)
            offset += int(b.group.max()) + 1 if len(b) else 0
        values["group"] = torch.cat(groups)
        for f in fields(RolloutBatch):
            if f.name in values:
                continue
            parts = [getattr(b, f.name) for b in batches]
            if isinstance(parts[0], torch.Tensor):
                if parts[0].dim() == 2:
                    parts = [torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in parts]
                values[f.name] = torch.cat(parts)
            else:
                values[f.name] = [x for p in parts for x in p]
        return RolloutBatch(**values)
