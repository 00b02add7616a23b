r"""The structure of an answer: a list, a tuple, an interval, a union, a matrix, a relation, or one expression."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from tempo_megatron.verifiers.maths.text import split_top_level
from tempo_megatron.verifiers.maths.value import UnreadableError, constant, is_near

_COMMA = re.compile(r"[,;]|\\lor(?![a-zA-Z])")
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_RELATION = re.compile(r"<=|>=|!=|\\(?:le|ge|ne|lt|gt|in|approx)(?![a-zA-Z])|[<>=]")
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_GREEK = (
    "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|(?:var)?rho|(?:var)?sigma"
    "|tau|upsilon|(?:var)?phi|chi|psi|omega|ell"
)
_NAME = re.compile(rf"(?:[a-zA-Z]|\\(?:{_GREEK}))(?:_\{{?[a-zA-Z0-9]{{1,3}}\}}?)?(?:\([a-zA-Z](?:\s*,\s*[a-zA-Z])*\))?")
_NAMES = re.compile(rf"\((?:[a-zA-Z]|\\(?:{_GREEK}))(?:\s*,\s*(?:[a-zA-Z]|\\(?:{_GREEK}))){{1,3}}\)")
_OPERATORS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\lt": "<", r"\gt": ">"}
_PAIRS = {"(": ")]", "[": ")]"}


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression, or a text."""

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    r"""Several answers in any order: ``1, 2``, ``\{1, 2\}``, ``a \cup b``, ``1 \pm 2``.

    ``union`` tells the third, and ``either`` that one of several inequalities holds, not all of them.
    """

    items: tuple[Shape, ...]
    union: bool = False
    either: bool = False


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
        """The value of an assignment with two sides."""
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
    if re.match(r"\+\s*[0-9.\\]", text) and not _PLUS_MINUS.search(text):
        text = text[1:].strip()
    parts, separators = split_top_level(text, _COMMA)
    if len(parts) > 1:
        return _items(parts, either=r"\lor" in separators)
    parts, operators = split_top_level(text, _RELATION)
    if len(parts) > 1:
        return _relation(text, parts, operators)
    parts, _ = split_top_level(text, _UNION)
    if len(parts) > 1:
        return Items(tuple(shape(p) for p in parts), union=True)
    return _bracketed(text) or _plus_minus(text) or Expression(text)


def _items(parts: list[str], *, either: bool) -> Shape:
    """``x = 1, 2`` and ``x = 1, x = 2`` are the values of x; "or" matters between inequalities only."""
    items = [shape(p) for p in parts]
    names = {i.name if isinstance(i, Relation) and len(i.sides) == 2 else "" for i in items}
    first = items[0].name if isinstance(items[0], Relation) else None
    if first is not None and names <= {first, ""}:
        items = [i.assigned if isinstance(i, Relation) and i.name == first else i for i in items]
    inequalities = any(isinstance(i, Relation) and i.operators != ("=",) for i in items)
    flat = [member for part, item in zip(parts, items, strict=True) for member in _two_signs(part, item)]
    return Items(tuple(flat), either=either and inequalities)


def _two_signs(part: str, item: Shape) -> tuple[Shape, ...]:
    r"""The members of ``\pm 2`` in a list."""
    return item.items if isinstance(item, Items) and not item.union and not part.startswith(r"\{") else (item,)


def _relation(text: str, parts: list[str], operators: list[str]) -> Shape:
    """An Expression is what can't be read: it equals its own text only."""
    if not parts[0] and operators[0] == "=":
        return shape(text[1:])
    if operators == [r"\in"] and is_name(parts[0]):
        members = shape(parts[1])
        known = isinstance(members, Items | Sequence) or parts[1].startswith((r"\mathbb", r"\emptyset"))
        return members if known else Expression(text)
    if operators == [r"\approx"] and _is_approximation(*parts):
        return shape(parts[0])
    if not {r"\in", r"\approx"}.isdisjoint(operators) or not all(parts):
        return Expression(text)
    return Relation(tuple(parts), tuple(_OPERATORS.get(o, o) for o in operators))


def _is_approximation(exact: str, decimal: str) -> bool:
    try:
        return is_near(constant(exact), decimal)
    except (UnreadableError, ZeroDivisionError):
        return False


def _bracketed(text: str) -> Shape | None:
    if matrix := _MATRIX.fullmatch(_without_brackets(text)):
        rows = [r for r in re.split(r"\\\\", matrix[2]) if r.strip()]
        return Matrix(tuple(tuple(shape(cell) for cell in row.split("&")) for row in rows))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        members = text[2:-2].strip()
        inner = shape(members)
        nested = members.startswith(r"\{") and not split_top_level(members, _COMMA)[1]
        return inner if isinstance(inner, Items) and not inner.union and not nested else Items((inner,))
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
