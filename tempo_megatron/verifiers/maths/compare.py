r"""Is one mathematical answer equal to another?  ``docs/verifiers.md`` tells the rules in words."""

from __future__ import annotations

import re
from functools import lru_cache

from tempo_megatron.verifiers.maths.shape import (
    Expression,
    Items,
    Matrix,
    Relation,
    Sequence,
    Shape,
    as_interval,
    shape,
)
from tempo_megatron.verifiers.maths.text import clean, words
from tempo_megatron.verifiers.maths.units import split_unit, units_agree
from tempo_megatron.verifiers.maths.value import (
    UnreadableError,
    constant,
    ratio_is_constant,
    rational,
    rounds_to,
    same,
)

_WORDS = re.compile(r"[A-Za-z][A-Za-z'. -]*[A-Za-z.]")
_LONG_WORD = re.compile(r"[A-Za-z]{3}")  # shorter ones may be products of variables
_LETTER = re.compile(r"\(?\s*([A-Z])\s*\)?")
_BLANKS = re.compile(r"(?<![0-9]) | (?![0-9])")  # all but those between two digits
_RATIO = re.compile(r"[0-9]+(?:\s*:\s*[0-9]+)+")  # compared as a text
_MAX_ITEMS = 32
_FLIPPED = {">": "<", ">=": "<="}


def normal_form(raw: str) -> str | None:
    """A short spelling of an answer, the same for equal rationals; None when it is unreadable."""
    text = clean(raw)
    if text is None:
        return None
    value = rational(text)
    if value is None or ("." in text and len(text) > 6):  # longer decimals may stand for a rounded number
        return text
    return str(value)


@lru_cache(maxsize=8192)
def equal(gold: str, got: str) -> bool:
    """May ``got`` stand for the answer ``gold``?  Both as they were written, or in normal form.

    Not symmetric: an answer's own unit may be left out, an unknown unit may not be added.  An unreadable text equals
    only itself.
    """
    a, b = clean(gold), clean(got)
    if a is None or b is None:
        return False
    if a == b:
        return True
    value, unit = split_unit(a)
    other_value, other_unit = split_unit(b)
    return units_agree(unit, other_unit) and _equal_texts(value, other_value)


@lru_cache(maxsize=8192)
def is_computable(raw: str) -> bool:
    """Can every expression of this answer be given a value, or compared as a text?"""
    text = clean(raw)
    return text is not None and _is_computable(shape(split_unit(text)[0].strip()))


def _is_computable(of: Shape) -> bool:
    if isinstance(of, Items | Sequence):
        return all(map(_is_computable, of.items))
    if isinstance(of, Matrix):
        return all(_is_computable(cell) for row in of.rows for cell in row)
    if isinstance(of, Relation):
        sides = of.sides[1:] if of.name is not None else of.sides
        return all(_is_computable(Expression(side)) for side in sides)
    if _is_text(of.text) or of.text.lstrip("+-") in (r"\infty", r"\emptyset") or _RATIO.fullmatch(of.text):
        return True
    try:
        return same(of.text, of.text)
    except (UnreadableError, ZeroDivisionError):
        return False


def _equal_texts(a: str, b: str) -> bool:
    return _equal(shape(a.strip()), shape(b.strip()))


def _equal(gold: Shape, got: Shape) -> bool:
    if gold == got:
        return True
    if isinstance(gold, Relation) or isinstance(got, Relation):
        return _equal_relations(gold, got)
    if isinstance(gold, Expression) and isinstance(got, Expression):
        return _equal_expressions(gold.text, got.text)
    if isinstance(gold, Items) or isinstance(got, Items):
        return _equal_items(gold, got)
    if isinstance(gold, Sequence) and isinstance(got, Sequence):
        return gold.brackets == got.brackets and _pairwise(gold.items, got.items)
    if isinstance(gold, Matrix) and isinstance(got, Matrix):
        return len(gold.rows) == len(got.rows) and all(map(_pairwise, gold.rows, got.rows))
    return False


def _pairwise(gold: tuple[Shape, ...], got: tuple[Shape, ...]) -> bool:
    return len(gold) == len(got) <= _MAX_ITEMS and all(map(_equal_members, gold, got))


def _equal_items(gold: Shape, got: Shape) -> bool:
    """As sets; one expression is the set of itself.  A list is no tuple: ``1, 2`` may be roots, ``(1, 2)`` a range."""
    if any(isinstance(side, Sequence | Matrix) for side in (gold, got)):
        return False
    kinds = {(side.union, side.either) for side in (gold, got) if isinstance(side, Items)}
    return len(kinds) == 1 and _equal_sets(_members(gold), _members(got))


def _members(of: Shape) -> list[Shape]:
    return list(of.items) if isinstance(of, Items) else [of]


def _equal_sets(gold: list[Shape], got: list[Shape]) -> bool:
    """Every one has its equal on the other side; what is there twice on one side may be there once on the other."""
    if max(len(gold), len(got)) > _MAX_ITEMS:
        return False
    wanted, left = _distinct(gold), _distinct(got)
    if len(wanted) != len(left):
        return False
    for member in wanted:
        found = next((i for i, other in enumerate(left) if _equal_members(member, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _distinct(members: list[Shape]) -> list[Shape]:
    kept: list[Shape] = []
    for member in members:
        if not any(_equal_members(other, member) for other in kept):
            kept.append(member)
    return kept


def _equal_members(gold: Shape, got: Shape) -> bool:
    """Within a list or a tuple, where names tell which is which and a set of one is no number."""
    return _is_named(gold) == _is_named(got) and isinstance(gold, Items) == isinstance(got, Items) and _equal(gold, got)


def _is_named(of: Shape) -> bool:
    return isinstance(of, Relation) and of.name is not None


def _equal_relations(gold: Shape, got: Shape) -> bool:
    if isinstance(gold, Relation) and isinstance(got, Relation):
        values = _value(gold), _value(got)
        if gold.name is not None and gold.name == got.name and values[0] and values[1]:
            return _equal(values[0], values[1])
        return _same_statement(gold, got)
    relation, other = (gold, got) if isinstance(gold, Relation) else (got, gold)
    assert isinstance(relation, Relation)
    if relation.name is not None:
        value = _value(relation) if _is_in_order(relation.name) else None
        return value is not None and (_equal(value, other) if relation is gold else _equal(other, value))
    if set(relation.operators) == {"="}:
        return relation is got and _is_calculation(relation) and _equal(gold, shape(relation.sides[-1]))
    interval = as_interval(relation)
    return interval is not None and isinstance(other, Sequence) and _equal(interval, other)


def _value(relation: Relation) -> Shape | None:
    """The value of an assignment, where all sides after the name are the same."""
    first, *others = relation.sides[1:]
    same_all = relation.name is not None and len(others) < 4 and all(_equal_texts(first, other) for other in others)
    return relation.assigned if same_all else None


def _is_in_order(name: str) -> bool:
    """Would a bare tuple name its values in this order?"""
    names = re.findall("[a-zA-Z]+", name) if name.startswith("(") else []
    return names == sorted(names)


def _is_calculation(relation: Relation) -> bool:
    """``3 + 4 = 7``: no variables, and true."""
    try:
        constants = [constant(s) for s in relation.sides]
        return len(constants) <= 4 and all(same(s, relation.sides[-1]) for s in relation.sides)
    except (UnreadableError, ZeroDivisionError):
        return False


def _same_statement(gold: Relation, got: Relation) -> bool:
    """Equations up to a factor, inequalities up to a positive one, chains link by link."""
    ours, theirs = _links(gold), _links(got)
    if len(ours) != len(theirs):
        return False
    for operator, sides in ours:
        found = next((link for link in theirs if link[0] == operator and _same_link(operator, sides, link[1])), None)
        if found is None:
            return False
        theirs.remove(found)
    return True


def _links(relation: Relation) -> list[tuple[str, tuple[str, str]]]:
    links = []
    for i, operator in enumerate(relation.operators):
        left, right = relation.sides[i], relation.sides[i + 1]
        if operator in _FLIPPED:
            links.append((_FLIPPED[operator], (right, left)))
        else:
            links.append((operator, (left, right)))
    return links


def _same_link(operator: str, gold: tuple[str, str], got: tuple[str, str]) -> bool:
    try:
        if ratio_is_constant(gold, got, positive=operator in ("<", "<=")):
            return True
    except (UnreadableError, ZeroDivisionError):
        return all(_equal_texts(a, b) for a, b in zip(gold, got, strict=True))
    return False


def _equal_expressions(gold: str, got: str) -> bool:
    x, y = rational(gold), rational(got)
    if x is not None and y is not None:
        return x == y or _rounded(gold, got) or _rounded(got, gold)
    if _is_text(gold) or _is_text(got):
        return _equal_words(gold, got)
    try:
        return _rounded(gold, got) or _rounded(got, gold) or same(gold, got)
    except (UnreadableError, ZeroDivisionError):
        return _BLANKS.sub("", gold) == _BLANKS.sub("", got)


def _rounded(exact: str, decimal: str) -> bool:
    """0.333333 for 1/3: only where the other side is not a decimal itself."""
    if rational(decimal) is None or re.fullmatch(r"[+-]?[0-9]*\.[0-9]*|[+-]?[0-9]+", exact):
        return False
    try:
        return rounds_to(constant(exact), decimal)
    except UnreadableError:
        return False


def _is_text(text: str) -> bool:
    return text.startswith(r"\text") or (_WORDS.fullmatch(text) is not None and _LONG_WORD.search(text) is not None)


def _equal_words(gold: str, got: str) -> bool:
    letters = [_LETTER.fullmatch(words(t).upper()) for t in (gold, got)]
    if letters[0] and letters[1]:
        return letters[0][1] == letters[1][1]
    return words(gold) == words(got) != ""
