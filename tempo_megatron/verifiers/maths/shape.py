r"""The structure of an answer: a list, a tuple, an interval, a union, a matrix, a relation, or one expression."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from tempo_megatron.verifiers.maths.text import split_top_level

_COMMA = re.compile(r"[,;]")
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_RELATION = re.compile(r"<=|>=|!=|\\(?:le|ge|ne|lt|gt|in|approx)(?![a-zA-Z])|[<>=]")
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_NAME = re.compile(r"(?:[a-zA-Z]|\\[a-z]{2,8})(?:_\{?[a-zA-Z0-9]{1,3}\}?)?(?:\([a-zA-Z](?:\s*,\s*[a-zA-Z])*\))?'?")
_NAMES = re.compile(r"\([a-zA-Z](?:\s*,\s*[a-zA-Z]){1,3}\)")
_OPERATORS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\lt": "<", r"\gt": ">"}
_PAIRS = {"(": ")]", "[": ")]"}


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression, or a text."""

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    r"""Several answers in any order: ``1, 2``, ``\{1, 2\}``, ``a \cup b``, ``1 \pm 2``; ``union`` tells the third."""

    items: tuple[Shape, ...]
    union: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """Ordered items between brackets: a tuple, a point, an interval; ``brackets`` such as ``[)``."""

    brackets: str
    items: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of expressions, whatever the brackets around them."""

    rows: tuple[tuple[Shape, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """``sides[0] operators[0] sides[1] ...`` of expressions; operators are =, <, <=, >, >=, !=."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """The variable of an assignment such as ``x = 3`` or ``f(x) = 2x``, else None."""
        return self.sides[0] if set(self.operators) == {"="} and is_name(self.sides[0]) else None

    @property
    def assigned(self) -> Shape:
        """The value of an assignment: what stands last."""
        return shape(self.sides[-1])


Shape = Expression | Items | Sequence | Matrix | Relation


def is_name(text: str) -> bool:
    """Is ``text`` what a value could be assigned to?"""
    if _NAMES.fullmatch(text):
        return True
    return _NAME.fullmatch(text) is not None and not text.startswith((r"\pi", r"\infty"))


@lru_cache(maxsize=4096)
def shape(text: str) -> Shape:
    """The structure of cleaned ``text``."""
    text = text.strip()
    parts, _ = split_top_level(text, _COMMA)
    if len(parts) > 1:
        return _items([shape(p) for p in parts])
    parts, operators = split_top_level(text, _RELATION)
    if len(parts) > 1:
        return _relation(parts, operators)
    parts, _ = split_top_level(text, _UNION)
    if len(parts) > 1:
        return Items(tuple(shape(p) for p in parts), union=True)
    return _bracketed(text) or _plus_minus(text) or Expression(text)


def _items(items: list[Shape]) -> Shape:
    """``x = 1, 2`` and ``x = 1, x = 2`` are the values of x."""
    names = {i.name if isinstance(i, Relation) else "" for i in items}
    first = items[0].name if isinstance(items[0], Relation) else None
    if first is not None and names <= {first, ""}:
        items = [i.assigned if isinstance(i, Relation) else i for i in items]
    return Items(tuple(items))


def _relation(parts: list[str], operators: list[str]) -> Shape:
    if operators[0] == r"\in" and len(parts) == 2 and is_name(parts[0]):
        return shape(parts[1])
    if r"\approx" in operators:
        return shape(parts[0]) if operators == [r"\approx"] and not is_name(parts[0]) else Expression(" ".join(parts))
    if r"\in" in operators or not all(parts):
        return Expression(" ".join(parts))
    return Relation(tuple(parts), tuple(_OPERATORS.get(o, o) for o in operators))


def _bracketed(text: str) -> Shape | None:
    if matrix := _MATRIX.fullmatch(_without_brackets(text)):
        rows = [r for r in re.split(r"\\\\", matrix[2]) if r.strip()]
        return Matrix(tuple(tuple(shape(cell) for cell in row.split("&")) for row in rows))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = shape(text[2:-2])
        return inner if isinstance(inner, Items) and not inner.union else Items((inner,))
    if text.startswith(r"\langle") and text.endswith(r"\rangle"):
        parts, _ = split_top_level(text[7:-7], _COMMA)
        return Sequence("<>", tuple(shape(p) for p in parts))
    if len(text) > 2 and text[0] in _PAIRS and text[-1] in _PAIRS[text[0]]:
        parts, _ = split_top_level(text[1:-1], _COMMA)
        if len(parts) > 1:
            return Sequence(text[0] + text[-1], tuple(shape(p) for p in parts))
    return None


def _without_brackets(text: str) -> str:
    inner = text[1:-1].strip()
    return inner if text[:1] in "([" and text[-1:] in ")]" and inner.startswith(r"\begin") else text


def _plus_minus(text: str) -> Shape | None:
    if len(_PLUS_MINUS.findall(text)) != 1:
        return None
    plus, minus = (_PLUS_MINUS.sub(sign, text).strip() for sign in ("+", "-"))
    return Items((Expression(plus.removeprefix("+").strip()), Expression(minus)))


def as_interval(relation: Relation) -> Sequence | None:
    r"""The interval that an inequality of one variable describes: ``1 < x <= 2`` is ``(1, 2]``."""
    sides, operators = list(relation.sides), list(relation.operators)
    if operators and operators[0] in (">", ">="):
        sides.reverse()
        operators = [{">": "<", ">=": "<="}.get(o, o) for o in reversed(operators)]
    if not operators or not set(operators) <= {"<", "<="}:
        return None
    if len(sides) == 3 and is_name(sides[1]):
        brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
        return Sequence(brackets, (shape(sides[0]), shape(sides[2])))
    if len(sides) == 2 and is_name(sides[0]):
        return Sequence("()" if operators[0] == "<" else "(]", (Expression(r"-\infty"), shape(sides[1])))
    if len(sides) == 2 and is_name(sides[1]):
        return Sequence("()" if operators[0] == "<" else "[)", (shape(sides[0]), Expression(r"\infty")))
    return None
