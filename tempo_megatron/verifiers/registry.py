"""The kinds of answer by name: every module of ``verifiers.kinds`` adds its own."""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from functools import cache
from importlib import import_module
from types import MappingProxyType

from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers import kinds
from tempo_megatron.verifiers.reasoning import answer_part
from tempo_megatron.verifiers.verdict import CheckFailedError, Kind, Verdict


@cache
def _registry() -> Mapping[str, Kind]:
    found: dict[str, Kind] = {}
    for module in pkgutil.iter_modules(kinds.__path__, prefix=f"{kinds.__name__}."):
        kind: Kind = import_module(module.name).KIND
        if kind.name in found:
            raise ValueError(f"{module.name}: kind {kind.name!r} is defined twice")
        found[kind.name] = kind
    return MappingProxyType(found)


def kind_names() -> list[str]:
    """Names of all kinds, sorted."""
    return sorted(_registry())


def kind_named(name: str) -> Kind:
    """The kind of that name.  Raises TempoError for an unknown one."""
    try:
        return _registry()[name]
    except KeyError:
        raise TempoError(f"unknown answer_type {name!r}; known kinds: {', '.join(kind_names())}") from None


def answer_problem(answer: str, kind: str) -> str | None:
    """Why ``answer`` can't be an answer of ``kind``, or None.  Raises TempoError for an unknown kind."""
    return kind_named(kind).answer_problem(answer)


def self_problem(answer: str, kind: str) -> str | None:
    """Why ``answer`` can't serve as the known answer of a prompt, or None: it is malformed, a response that gives just
    this answer would not be right, or no other response could be told wrong.

    Slower than ``answer_problem``, by the check of one response.  Raises TempoError for an unknown kind.
    """
    of = kind_named(kind)
    if problem := of.answer_problem(answer):
        return problem
    response = of.state(answer)
    if response is None:
        return None
    verdict = verify(response, answer, kind)
    if not verdict.correct:
        return f"a response that gives this very answer would not be right: {verdict.reason}"
    if verdict.extracted is not None and not of.compute(verdict.extracted):
        return "can't be computed: only the same text would be right, and any other response unverified"
    return None


def extract(response: str, kind: str) -> str | None:
    """The final answer of ``response`` in normal form, or None.  Raises TempoError for an unknown kind."""
    return kind_named(kind).extract(answer_part(response))


def verify(response: str, answer: str, kind: str) -> Verdict:
    """Checks ``response``, or what it says after its reasoning, against the known ``answer``.

    Bounded text is parsed, but without a limit on time: hostile responses go through ``verifiers.service``.

    Raises:
        TempoError: unknown kind, or ``answer`` itself is malformed.
    """
    if problem := answer_problem(answer, kind):
        raise TempoError(f"answer {answer[:80]!r} of kind {kind!r}: {problem}")
    try:
        return kind_named(kind).grade(answer_part(response), answer)
    except CheckFailedError as failed:
        return Verdict(False, None, str(failed), verified=False)


def cluster_answers(extracted: Sequence[str | None], kind: str) -> list[int | None]:
    """Groups equal answers: an answer joins the first cluster whose every member is equal to it, in both directions.

    Args:
        extracted: ``Verdict.extracted`` or ``Kind.extract`` of each response; None where there is no answer.
        kind: of the answers.

    Returns:
        Cluster of each answer, numbered by first appearance; None where there is no answer, or one that can't be
        compared.

    Raises:
        TempoError: unknown kind.
    """
    steps, replies = clusters([text for text in extracted if text is not None], kind), None
    try:
        while True:
            questions = next(steps) if replies is None else steps.send(replies)
            replies = [_answered(question, kind) for question in questions]
    except StopIteration as done:
        found: dict[str, int] = done.value
    return [None if text is None else found.get(text) for text in extracted]


#: One text: can it be compared?  Two: are they the same answer?
Question = tuple[str] | tuple[str, str]
_MAX_FAILURES = 2


def clusters(texts: Sequence[str], kind: str) -> Generator[list[Question], list[bool | None], dict[str, int]]:
    """Steps of grouping ``texts``: yields questions, is sent their answers (None: failed), returns text -> cluster.

    Raises TempoError for an unknown kind.
    """
    left = list(dict.fromkeys(texts))
    if kind_named(kind).equal_is_identity:
        return {text: i for i, text in enumerate(left)}
    if len(left) > 1:
        left = _answering(left, (yield [(text,) for text in left]), True)
    found: dict[str, int] = {}
    failures: Counter[str] = Counter()
    count = 0
    while left:
        first, others = left[0], left[1:]
        replies = (yield [(first, text) for text in others]) if others else []
        failed = _answering(others, replies, None)
        if len(failed) == len(others) > 1:  # more likely the fault of the one than of all others
            failures.update(failed)
            left = [text for text in others if failures[text] < _MAX_FAILURES]
            continue
        members, equal = [first], _answering(others, replies, True)
        while equal:
            member, equal = equal[0], equal[1:]
            members.append(member)
            equal = _answering(equal, (yield [(member, text) for text in equal]), True) if equal else []
        found |= dict.fromkeys(members, count)
        count += 1
        left = [text for text in others if text not in members and text not in failed]
    return found


def _answering(texts: Sequence[str], replies: Sequence[bool | None], reply: bool | None) -> list[str]:
    return [text for text, got in zip(texts, replies, strict=True) if got is reply]


def answered(question: Sequence[str], kind: str) -> bool:
    """The answer to a question of ``clusters``.  Raises what the kind raises where it can't be compared."""
    if len(question) == 1:
        kind_named(kind).compute(question[0])
        return True
    a, b = question
    equal = kind_named(kind).equal
    return bool(equal(a, b) and equal(b, a))


def _answered(question: Question, kind: str) -> bool | None:
    try:
        return answered(question, kind)
    except CheckFailedError:
        return None
