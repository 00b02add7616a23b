"""What is asked of a rollout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptDraw:
    """A prompt to sample from.

    Attributes:
        seed: of its first sample (``sampling.sample_seed``).
        source: data set of the record; prompts of one are expected to have responses of like lengths.
    """

    record_id: str
    prompt_token_ids: list[int]
    labeled: bool
    seed: int
    source: str = ""
