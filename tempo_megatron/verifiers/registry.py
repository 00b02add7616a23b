"""The kinds of answer by name: every module of ``verifiers.kinds`` adds its own."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from types import MappingProxyType

from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers import kinds
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


def verify(response: str, answer: str, kind: str) -> Verdict:
    """Checks ``response`` against the known ``answer``.

    Bounded text is parsed, but without a limit on time: hostile responses go through ``verifiers.service``.

    Raises:
        TempoError: unknown kind, or ``answer`` itself is malformed.
    """
    if problem := answer_problem(answer, kind):
        raise TempoError(f"answer {answer[:80]!r} of kind {kind!r}: {problem}")
    try:
        return kind_named(kind).grade(response, answer)
    except CheckFailedError as failed:
        return Verdict(False, None, str(failed), verified=False)


def cluster_answers(extracted: Sequence[str | None], kind: str) -> list[int | None]:
    """Groups equal answers: the first of each cluster represents it (as the known answer would when grading).

    Args:
        extracted: ``Verdict.extracted`` or ``Kind.extract`` of each response; None where there is no answer.
        kind: of the answers.

    Returns:
        Cluster of each answer, numbered by first appearance; None where there is no answer.

    Raises:
        TempoError: unknown kind.
    """
    equal = kind_named(kind).equal
    representatives: list[str] = []
    known: dict[str, int] = {}
    for text in extracted:
        if text is not None and text not in known:
            found = next((i for i, r in enumerate(representatives) if equal(r, text)), None)
            if found is None:
                representatives.append(text)
            known[text] = len(representatives) - 1 if found is None else found
    return [None if text is None else known[text] for text in extracted]
