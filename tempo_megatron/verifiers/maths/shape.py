r"""Takes the text of an answer apart: lists, tuples, intervals, unions, matrices, relations, units, one expression."""

from __future__ import annotations

import re
from functools import lru_cache

from tempo_megatron.verifiers.maths.arithmetic import UnreadableError
from tempo_megatron.verifiers.maths.names import is_name
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
from tempo_megatron.verifiers.maths.text import split_top_level
from tempo_megatron.verifiers.maths.units import split_unit
from tempo_megatron.verifiers.maths.value import constant, is_near

_BLANK = re.compile(";")
_COMMA = re.compile(r",|\\lor(?![a-zA-Z])")
_SEPARATOR = re.compile("[,;]")
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_RELATION = re.compile(r"<=|>=|!=|\\(?:le|ge|ne|lt|gt|in|approx)(?![a-zA-Z])|[<>=]")
_OPERATORS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\lt": "<", r"\gt": ">"}
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array|cases)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_CONDITION = re.compile(r"\\text\s*\{\s*,?\s*(?:if|when|for|where)\s*\}")
_PAIRS = {"(": ")]", "[": ")]"}
_POINT = re.compile(r"([ABD-Z](?:_[0-9])?)\s*(\(.*\))", re.DOTALL)  # C(10,5) may be a binomial
_BUILDER = re.compile(r"(.{1,40}?)\s*(?:\\mid(?![a-zA-Z])|\\vert(?![a-zA-Z])|\||:)\s*(.+)", re.DOTALL)
_REALS = re.compile(r"\s*\\in\s*(?:\\mathbb\s*\{\s*R\s*\}|\\mathbb\s*R|\\R|\\text\s*\{\s*R\s*\}|R)\Z")


@lru_cache(maxsize=4096)
def shape(text: str) -> Shape:
    """The structure of cleaned ``text``."""
    text = text.strip()
    if re.match(r"\+\s*[0-9.\\]", text) and not _PLUS_MINUS.search(text):
        text = text[1:].strip()
    parts, _ = split_top_level(text, _BLANK)
    if len(parts) > 1:
        return _blanks(parts)
    parts, separators = split_top_level(text, _COMMA)
    if len(parts) > 1:
        return _items(parts, either=r"\lor" in separators)
    parts, operators = split_top_level(text, _RELATION)
    if len(parts) > 1:
        return _relation(text, parts, operators)
    value, unit = split_unit(text)
    if unit is not None:
        return Quantity(shape(value), unit)
    parts, _ = split_top_level(text, _UNION)
    if len(parts) > 1:
        return Items(tuple(shape(p) for p in parts), union=True)
    return _bracketed(text) or _plus_minus(text) or Expression(text)


def name_of(of: Shape) -> str | None:
    """The variable of an assignment such as ``x = 3`` or ``f(x) = 2x``, else None."""
    if isinstance(of, Named):
        return of.name
    if not isinstance(of, Relation) or set(of.operators) != {"="} or not is_name(of.sides[0]):
        return None
    letter = re.compile(rf"(?<![\\a-zA-Z{{]){of.sides[0]}(?![a-zA-Z])") if len(of.sides[0]) == 1 else None
    is_equation = letter is not None and any(letter.search(side) for side in of.sides[1:])  # x = 2x - 1
    return None if is_equation else of.sides[0]


def _blanks(parts: list[str]) -> Shape:
    """``x = 1; y = 2`` may come in any order: the names tell which is which."""
    items = [shape(p) for p in parts]
    if all(name_of(i) is not None for i in items):
        return _items(parts, either=False)
    return Blanks(tuple(items))


def _items(parts: list[str], *, either: bool) -> Shape:
    """``x = 1, 2`` and ``x = 1, x = 2`` are the values of x; "or" matters between inequalities and several names."""
    items = [shape(p) for p in parts]
    if isinstance(items[-1], Quantity) and all(isinstance(i, Expression) for i in items[:-1]):
        items = [*(Quantity(i, items[-1].unit) for i in items[:-1]), items[-1]]  # 3, 5 cm
    name = name_of(items[0])
    if name is not None and {name_of(i) for i in items} <= {name, None} and all(map(_has_one_value, items)):
        values = [_assigned(i) for i in items]
        return Named(name, Items(tuple(m for p, i in zip(parts, values, strict=True) for m in _two_signs(p, i))))
    matters = len({name_of(i) for i in items} - {None}) > 1 or not all(map(_has_one_value, items))
    flat = [member for part, item in zip(parts, items, strict=True) for member in _two_signs(part, item)]
    return Items(tuple(flat), either=either and matters, by_or=either)


def _has_one_value(of: Shape) -> bool:
    return not isinstance(of, Relation) or of.operators == ("=",)


def _assigned(of: Shape) -> Shape:
    if isinstance(of, Named):
        return of.value
    return shape(of.sides[-1]) if isinstance(of, Relation) else of


def _two_signs(part: str, item: Shape) -> tuple[Shape, ...]:
    r"""The members of ``\pm 2`` in a list."""
    return item.items if isinstance(item, Items) and not item.union and _PLUS_MINUS.search(part) else (item,)


def _relation(text: str, parts: list[str], operators: list[str]) -> Shape:
    """An Expression is what can't be read: it equals its own text only."""
    if not parts[0] and operators[0] in ("=", r"\approx"):
        return shape(text[len(operators[0]) :])
    if operators == [r"\in"] and is_name(parts[0]):
        members = shape(parts[1])
        known = isinstance(members, Items | Sequence) or parts[1].startswith((r"\mathbb", r"\emptyset"))
        return Named(parts[0], members) if known else Expression(text)
    if operators[-1] == r"\approx" and all(parts):
        return _approximation(parts, operators) or Expression(text)
    if not {r"\in", r"\approx"}.isdisjoint(operators) or not all(parts):
        return Expression(text)
    if operators == ["="] and is_name(parts[1]) and not is_name(parts[0]):
        parts = parts[::-1]
    return Relation(tuple(parts), tuple(_OPERATORS.get(o, o) for o in operators))


def _approximation(parts: list[str], operators: list[str]) -> Shape | None:
    (value, _), (decimal, _) = split_unit(parts[-2]), split_unit(parts[-1])
    try:
        if not is_near(constant(value.strip()), decimal.strip()):
            return None
    except (UnreadableError, ZeroDivisionError):
        return None
    exact = shape(" ".join(word for pair in zip(parts[:-1], [*operators[:-1], ""], strict=True) for word in pair))
    name, rounded = name_of(exact), shape(parts[-1])
    return Approximation(exact, rounded if name is None else Relation((name, parts[-1]), ("=",)))


def _bracketed(text: str) -> Shape | None:
    if matrix := _MATRIX.fullmatch(_without_brackets(text)):
        rows = [r for r in re.split(r"\\\\", matrix[2]) if r.strip()]
        return Matrix(tuple(tuple(_cell(cell) for cell in row.split("&")) for row in rows))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _set(text[2:-2].strip())
    if text.startswith(r"\langle") and text.endswith(r"\rangle"):
        parts, _ = split_top_level(text[7:-7], _SEPARATOR)
        return Sequence("<>", tuple(shape(p) for p in parts))
    if len(text) > 2 and text[0] in _PAIRS and text[-1] in _PAIRS[text[0]]:
        parts, _ = split_top_level(text[1:-1], _SEPARATOR)
        if len(parts) > 1:
            return Sequence(text[0] + text[-1], tuple(shape(p) for p in parts))
    if (point := _POINT.fullmatch(text)) and isinstance(place := _bracketed(point[2]), Sequence):
        return Named(point[1], place)
    return None


def _cell(text: str) -> Shape:
    return shape(_CONDITION.sub(" ", text).strip(" ,;."))


def _set(members: str) -> Shape:
    builder = _BUILDER.fullmatch(members)
    if builder and is_name(variable := _REALS.sub("", builder[1])):
        return SetBuilder(variable, shape(builder[2]))
    inner = shape(members)
    if isinstance(inner, Blanks):
        return Items(inner.items)
    nested = members.startswith(r"\{") and not split_top_level(members, _SEPARATOR)[1]
    return inner if isinstance(inner, Items) and not inner.union and not nested else Items((inner,))


def _without_brackets(text: str) -> str:
    inner = text[1:-1].strip()
    return inner if text[:1] in "([" and text[-1:] in ")]" and inner.startswith(r"\begin") else text


def _plus_minus(text: str) -> Shape | None:
    if len(_PLUS_MINUS.findall(text)) != 1:
        return None
    plus, minus = (_PLUS_MINUS.sub(sign, text).strip() for sign in ("+", "-"))
    return Items((Expression(plus.removeprefix("+").strip()), Expression(minus)))
