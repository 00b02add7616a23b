"""What a verifier says of a response, and what a kind of answer has to provide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

#: Longer final answers are refused unread: no true answer has this length, and what is extracted is sent on and logged.
MAX_ANSWER_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one check.

    Attributes:
        correct: the response's final answer is the right one.
        extracted: the final answer in normal form, so that equal answers are equal strings (voting, clusters);
            None when the response has none.
        reason: a few words for logs and reports.
        details: further measurements in [0, 1], by name; the same names for every response of one kind.
        verified: False if the check itself failed; ``correct`` then says nothing.
    """

    correct: bool
    extracted: str | None
    reason: str
    details: dict[str, float] = field(default_factory=dict)
    verified: bool = True


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of answer.

    Attributes:
        name: what the ``answer_type`` column calls it.
        grade: ``(response, answer) -> Verdict``; the answer has passed ``answer_problem``.
        answer_problem: why a given text can't be an answer of this kind (what would be right), or None.  A malformed
            answer would otherwise make every response wrong in silence.
    """

    name: str
    grade: Callable[[str, str], Verdict]
    answer_problem: Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Clustered:
    """A response's place among the samples of its prompt.

    Attributes:
        cluster: the same number for equal answers; None without an answer.
        extracted: as in :class:`Verdict`.
    """

    cluster: int | None
    extracted: str | None
