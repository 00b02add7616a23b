"""How long a prompt's responses are expected to be: who takes the longest first has no straggler at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tempo_megatron.rollout.prompts import PromptDraw

#: Rollouts after which a mean forgets: the policy, and with it its lengths, moves.
_MEMORY = 4


@dataclass
class _Mean:
    """Of the last few values, more or less."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, _MEMORY)
        self.value += (value - self.value) / self.count


class ExpectedLengths:
    """Mean response lengths of earlier rollouts, by record and by source.

    It decides the order of sampling alone, on which no row depends; so no checkpoint has it, and a resumed run begins
    with the lengths of the prompts. Every rank sees the same lengths, and so has the same order.
    """

    def __init__(self) -> None:
        self._records: dict[str, _Mean] = {}
        self._sources: dict[tuple[str, bool], _Mean] = {}

    def order(self, prompts: Sequence[PromptDraw]) -> list[int]:
        """Positions of the prompts, the longest expected response first; where nothing tells, the longest prompt."""

        def expectation(position: int) -> tuple[float, int]:
            draw = prompts[position]
            known = self._records.get(draw.record_id) or self._sources.get((draw.source, draw.labeled))
            return (known.value if known else anyones, len(draw.prompt_token_ids))

        values = [mean.value for mean in self._sources.values()]
        anyones = sum(values) / len(values) if values else 0.0
        return sorted(range(len(prompts)), key=expectation, reverse=True)

    def observe(self, prompts: Sequence[PromptDraw], lengths: Sequence[float]) -> None:
        """``lengths``: of each prompt, the mean number of tokens of its responses."""
        by_source: dict[tuple[str, bool], list[float]] = {}
        for draw, length in zip(prompts, lengths, strict=True):
            self._records.setdefault(draw.record_id, _Mean()).add(length)
            by_source.setdefault((draw.source, draw.labeled), []).append(length)
        for source, found in by_source.items():
            self._sources.setdefault(source, _Mean()).add(sum(found) / len(found))
