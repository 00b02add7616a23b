r"""Is one mathematical answer equal to another?  ``docs/verifiers.md`` tells the rules in words."""

from __future__ import annotations

import re
from functools import lru_cache

from tempo_megatron.verifiers.maths.arithmetic import UnreadableError
from tempo_megatron.verifiers.maths.intervals import solutions
from tempo_megatron.verifiers.maths.names import is_in_order
from tempo_megatron.verifiers.maths.shape import name_of, shape
from tempo_megatron.verifiers.maths.shapes import (
    Approximation,
    Blanks,
    Expression,
    Items,
    Matrix,
    Named,
    Quantity,
    Relation,
    Sequence,
    SetBuilder,
    Shape,
)
from tempo_megatron.verifiers.maths.text import clean, thousands_or_list, words
from tempo_megatron.verifiers.maths.units import units_agree
from tempo_megatron.verifiers.maths.value import (
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
_CHINESE = re.compile("[\u2460-\u2473\u4e00-\u9fff]")
_DECIMAL = re.compile(r"[+-]?[0-9]*\.[0-9]+")
#: Of what is said of things, not computed; compared as a text.
_STATEMENT = re.compile(
    r"\\(?:perp|parallel|cong|sim|subset(?:eq)?|Rightarrow|Leftrightarrow|triangle|mathbb|land|neg|forall|exists"
    r"|equiv|complement)(?![a-zA-Z])"
    r"|\\text\s*\{[^{}]*[a-zA-Z]{2}"
)
_LETTER_IN_BRACKETS = re.compile(r"\(\s*\\text\s*\{\s*[a-zA-Z]\s*\}\s*\)")
_RATIO = re.compile(r"[0-9]+(?:\s*:\s*[0-9]+)+")  # compared as a text
_MAX_ITEMS = 32
_MAX_SIDES = 4
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
    return any(_equal_texts(x, y) for x in thousands_or_list(a) for y in thousands_or_list(b))


@lru_cache(maxsize=8192)
def is_computable(raw: str) -> bool:
    """Can every expression of this answer be given a value, or compared as a text?"""
    text = clean(raw)
    return text is not None and _is_computable(shape(thousands_or_list(text)[0]))


def _is_computable(of: Shape) -> bool:
    if isinstance(of, Items | Blanks | Sequence):
        return all(map(_is_computable, of.items))
    if isinstance(of, Matrix):
        return all(_is_computable(cell) for row in of.rows for cell in row)
    if isinstance(of, Relation):
        sides = of.sides if name_of(of) is None else of.sides[1:]
        return all(_is_computable(shape(side)) for side in sides)
    if isinstance(of, SetBuilder):
        return _is_computable(of.condition)
    if isinstance(of, Quantity | Named):
        return _is_computable(of.value)
    if isinstance(of, Approximation):
        return _is_computable(of.exact)
    return _is_computable_expression(of.text)


def _is_computable_expression(text: str) -> bool:
    if _is_text(text) or text.lstrip("+-") in (r"\infty", r"\emptyset") or _RATIO.fullmatch(text):
        return True
    if _STATEMENT.search(text):
        return True
    try:
        return same(text, text)
    except (UnreadableError, ZeroDivisionError):
        return False


def _equal_texts(a: str, b: str) -> bool:
    return _equal(shape(a.strip()), shape(b.strip()))


def _equal(gold: Shape, got: Shape) -> bool:
    if gold == got:
        return True
    if isinstance(gold, Approximation) or isinstance(got, Approximation):
        return _equal_approximations(gold, got)
    if isinstance(gold, Relation | Named | SetBuilder) or isinstance(got, Relation | Named | SetBuilder):
        return _equal_statements(gold, got)
    if _is_either(gold) != _is_either(got):
        return _equal_values(*map(_values_of, (gold, got)))
    return _equal_bare(gold, got)


def _equal_bare(gold: Shape, got: Shape) -> bool:
    """Neither says what it is the value of."""
    if isinstance(gold, Quantity) or isinstance(got, Quantity):
        units = (of.unit if isinstance(of, Quantity) else None for of in (gold, got))
        return units_agree(*units) and _equal(*(of.value if isinstance(of, Quantity) else of for of in (gold, got)))
    if isinstance(gold, Expression) and isinstance(got, Expression):
        return _equal_expressions(gold.text, got.text)
    if isinstance(gold, Blanks):
        one_of = isinstance(got, Items) and (got.union or got.either or got.by_or)
        return isinstance(got, Blanks | Items) and not one_of and _pairwise(gold.items, got.items)
    if isinstance(gold, Items) or isinstance(got, Items):
        return _equal_items(gold, Items(got.items) if isinstance(got, Blanks) else got)
    if isinstance(gold, Sequence) and isinstance(got, Sequence):
        return gold.brackets == got.brackets and _pairwise(gold.items, got.items)
    if isinstance(gold, Matrix) and isinstance(got, Matrix):
        return len(gold.rows) == len(got.rows) and all(map(_pairwise, gold.rows, got.rows))
    return False


def _is_either(of: Shape) -> bool:
    return isinstance(of, Items) and of.either


def _equal_approximations(gold: Shape, got: Shape) -> bool:
    r"""``5\pi \approx 15.7`` says both; its rounded number stands for another rounded number only."""
    if isinstance(gold, Approximation) and isinstance(got, Approximation):
        return _equal(gold.exact, got.exact)
    if isinstance(gold, Approximation):
        return _equal(gold.exact, got) or (_is_decimal(got) and _equal(gold.decimal, got))
    assert isinstance(got, Approximation)
    return _equal(gold, got.exact) or (_is_decimal(gold) and _equal(gold, got.decimal))


def _is_decimal(of: Shape) -> bool:
    if isinstance(of, Relation):
        return _DECIMAL.fullmatch(of.sides[-1]) is not None
    value = of.value if isinstance(of, Quantity) else of
    return isinstance(value, Expression) and _DECIMAL.fullmatch(value.text.strip()) is not None


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
    return name_of(of) is not None


def _equal_statements(gold: Shape, got: Shape) -> bool:
    """Assignments, equations, inequalities and sets by a condition, or one of them and a bare value."""
    if isinstance(gold, Relation) and isinstance(got, Relation) and _same_statement(gold, got):
        return True
    if isinstance(gold, SetBuilder) and isinstance(got, SetBuilder) and gold.name == got.name:
        return _equal(gold.condition, got.condition)
    return _equal_values(_values_of(gold), _values_of(got))


def _equal_values(gold: tuple[str | None, Shape | None], got: tuple[str | None, Shape | None]) -> bool:
    """The same values, and of the same variable where both tell of which."""
    (gold_name, gold_values), (got_name, got_values) = gold, got
    if gold_values is None or got_values is None:
        return False
    name = gold_name or got_name
    if gold_name is not None and got_name is not None:
        return gold_name == got_name and _equal(gold_values, got_values)
    if name is not None and name.startswith("(") and not is_in_order(name):
        return False
    return _equal(gold_values, got_values)


def _values_of(of: Shape) -> tuple[str | None, Shape | None]:
    """The variable that an answer is about, if it tells, and what its values are; None: an equation says none."""
    if isinstance(of, Named):
        return of.name, of.value
    if isinstance(of, SetBuilder) or _is_either(of):
        return solutions(of)
    if not isinstance(of, Relation):
        return None, of
    if name_of(of) is not None:
        return name_of(of), _assigned(of)
    if set(of.operators) == {"="}:
        return None, shape(of.sides[-1]) if _is_identity(of) else None
    return solutions(of)


def _assigned(relation: Relation) -> Shape | None:
    """The value of an assignment, where all sides after the name are the same."""
    first, *others = relation.sides[1:]
    same_all = len(others) < _MAX_SIDES and all(_equal_texts(first, other) for other in others)
    return shape(relation.sides[-1]) if same_all else None


def _is_identity(relation: Relation) -> bool:
    """``3 + 4 = 7``, ``\\sin 2x = 2 \\sin x \\cos x``: always true, so that it says what its last side is."""
    if len(relation.sides) > _MAX_SIDES:
        return False
    try:
        return all(same(side, relation.sides[-1]) for side in relation.sides)
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
    if _CHINESE.search(text) or _LETTER_IN_BRACKETS.fullmatch(text):
        return True
    return text.startswith(r"\text") or (_WORDS.fullmatch(text) is not None and _LONG_WORD.search(text) is not None)


def _equal_words(gold: str, got: str) -> bool:
    letters = [_LETTER.fullmatch(words(t).upper()) for t in (gold, got)]
    if letters[0] and letters[1]:
        return letters[0][1] == letters[1][1]
    return words(gold) == words(got) != ""
