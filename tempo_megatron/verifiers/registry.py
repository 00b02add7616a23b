"""The kinds of answer by name: every module of ``verifiers.kinds`` adds its own."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType

from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers import kinds
from tempo_megatron.verifiers.verdict import Kind, Verdict


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


def _kind(name: str) -> Kind:
    try:
        return _registry()[name]
    except KeyError:
        raise TempoError(f"unknown answer_type {name!r}; known kinds: {', '.join(kind_names())}") from None


def answer_problem(answer: str, kind: str) -> str | None:
    """Why ``answer`` can't be an answer of ``kind``, or None.  Raises TempoError for an unknown kind."""
    return _kind(kind).answer_problem(answer)


def verify(response: str, answer: str, kind: str) -> Verdict:
    """Checks ``response`` against the known ``answer``.

    Time and memory are linear in the response, whatever it holds.

    Raises:
        TempoError: unknown kind, or ``answer`` itself is malformed.
    """
    if problem := answer_problem(answer, kind):
        raise TempoError(f"answer {answer[:80]!r} of kind {kind!r}: {problem}")
    return _kind(kind).grade(response, answer)


def extract(response: str, kind: str) -> str | None:
    from tempo_megatron.verifiers.boxed import final_answer
    from tempo_megatron.verifiers.kinds.guess_check import _RESPONSE
    from tempo_megatron.verifiers.kinds.integer import normal_integer

    if kind == "guess_check":
        m = _RESPONSE.fullmatch(response)
        return m[1] if m and len(m[1]) == len(m[2]) else None
    return normal_integer(final_answer(response))
