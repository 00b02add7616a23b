"""The outcomes of one evaluation set, as every figure reads them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NO_ANSWER = -1


@dataclass(frozen=True)
class Samples:
    """n samples of each of P prompts.

    Attributes:
        record_ids, sources: ``[P]`` the prompts and the data sets that they come from.
        correct: ``[P, n]`` bool; partial or signed scores would make pass@k meaningless.
        answers: ``[P, n]`` int64 in ``[0, n)``: samples of one prompt with equivalent answers have the same number;
            ``NO_ANSWER`` where none could be read.
        verified: ``[P, n]`` bool, False where the verifier failed; such a sample is not correct.
        truncated: ``[P, n]`` bool.
        response_tokens: ``[P, n]`` int64.
        values: ``[P, n]`` float64, the critic's terminal values, or None without a critic.
        details: further measurements of the verifier, ``[P, n]`` float64 each.

    Raises:
        ValueError: the arrays do not fit together, ``correct`` is not bool, or an answer's number is out of range.
    """

    record_ids: Sequence[str]
    sources: Sequence[str]
    correct: Bools
    answers: Ints
    verified: Bools
    truncated: Bools
    response_tokens: Ints
    values: Floats | None = None
    details: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_correct(self.correct)
        shape = self.correct.shape
        if len(self.record_ids) != shape[0] or len(self.sources) != shape[0]:
            raise ValueError(f"{len(self.record_ids)} ids and {len(self.sources)} sources for {shape[0]} prompts")
        tables = [self.answers, self.verified, self.truncated, self.response_tokens, *self.details.values()]
        for table in tables if self.values is None else [*tables, self.values]:
            if table.shape != shape:
                raise ValueError(f"a table of shape {table.shape} beside correct of shape {shape}")
        check_answers(self.answers)

    @property
    def prompts(self) -> int:
        return self.correct.shape[0]

    @property
    def samples_per_prompt(self) -> int:
        return self.correct.shape[1]

    def of_source(self, source: str) -> Samples:
        """The prompts of one source."""
        at = np.flatnonzero(np.array(self.sources) == source)
        return Samples(
            record_ids=[self.record_ids[i] for i in at],
            sources=[source] * len(at),
            correct=self.correct[at],
            answers=self.answers[at],
            verified=self.verified[at],
            truncated=self.truncated[at],
            response_tokens=self.response_tokens[at],
            values=None if self.values is None else self.values[at],
            details={name: table[at] for name, table in self.details.items()},
        )


def check_correct(correct: Bools) -> None:
    """ValueError unless ``correct`` is a non-empty ``[P, n]`` table of bool."""
    if correct.dtype != np.bool_ or correct.ndim != 2 or not correct.size:
        raise ValueError(f"correct must be a non-empty [P, n] bool array, got {list(correct.shape)} {correct.dtype}")


def check_answers(answers: Ints) -> None:
    """ValueError unless every number is ``NO_ANSWER`` or in ``[0, n)``, ``[P, n]``."""
    if answers.size and not NO_ANSWER <= int(answers.min()) <= int(answers.max()) < answers.shape[1]:
        raise ValueError(f"answers must be numbered {NO_ANSWER} or 0 to {answers.shape[1] - 1}")


def number_answers(rows: Sequence[Sequence[Hashable | None]]) -> Ints:
    """``[P, n]`` numbers of P rows of n answers: equal ones of a row get one number, None gets ``NO_ANSWER``."""
    numbered = []
    for row in rows:
        seen: dict[Hashable, int] = {}
        numbered.append([NO_ANSWER if answer is None else seen.setdefault(answer, len(seen)) for answer in row])
    return np.array(numbered, dtype=np.int64)
