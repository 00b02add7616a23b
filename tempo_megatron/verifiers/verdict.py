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
        verified: False when the check itself failed (time, memory, a dead worker, a library's error), as ``reason``
            says.  ``correct`` is then False but means nothing: in training the response has no outcome, in
            evaluation it counts as wrong and the share of such responses is shown.
    """

    correct: bool
    extracted: str | None
    reason: str
    details: dict[str, float] = field(default_factory=dict)
    verified: bool = True


@dataclass(frozen=True, slots=True)
class Clustered:
    """Where one of several responses to a prompt belongs.

    Attributes:
        cluster: index among the prompt's distinct answers, in order of first appearance; None when unreadable.
        extracted: the final answer in normal form; None when the response has none.
    """

    cluster: int | None
    extracted: str | None


class CheckFailedError(Exception):
    """A kind could not decide; the message says why.  The response is then unverified, not wrong."""


def _same_text(a: str, b: str) -> bool:
    return a == b


def _nothing() -> None:
    return None


def _always(text: str) -> bool:
    return True


def itself(answer: str) -> str | None:
    """``answer`` as the whole response."""
    return answer


def boxed(answer: str) -> str | None:
    """``answer`` in a box."""
    return rf"\boxed{{{answer}}}"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of answer.

    Attributes:
        name: what the ``answer_type`` column calls it.
        grade: ``(response, answer) -> Verdict``; the answer has passed ``answer_problem``.  May raise CheckFailedError.
        answer_problem: why a given text can't be an answer of this kind (what would be right), or None.  A malformed
            answer would otherwise make every response wrong in silence.
        extract: the final answer of a response in normal form, without knowing the right one; None when there is none.
        equal: are two extracted texts the same answer?  ``grade`` decides by the same code.  May raise
            CheckFailedError.
        compute: what ``equal`` has to do with one text, to find out whether it can be compared at all; may raise.
            False: it equals the same text only, so that a known answer like this leaves other responses unverified.
        warm_up: slow imports, done before a time limit runs.
        state: a response that gives this known answer; None where there is nothing to try.
    """

    name: str
    grade: Callable[[str, str], Verdict]
    answer_problem: Callable[[str], str | None]
    extract: Callable[[str], str | None]
    equal: Callable[[str, str], bool] = _same_text
    warm_up: Callable[[], object] = _nothing
    compute: Callable[[str], bool] = _always
    state: Callable[[str], str | None] = boxed

    @property
    def equal_is_identity(self) -> bool:
        """Are two extracted texts the same answer only when they are the same text?"""
        return self.equal is _same_text
