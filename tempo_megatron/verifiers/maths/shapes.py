r"""What an answer can be: one expression, a quantity, a list, blanks, a tuple, a matrix, a relation, a set-builder."""

from __future__ import annotations

from dataclasses import dataclass, field

from tempo_megatron.verifiers.maths.units import Unit


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression, or a text."""

    text: str


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with its unit."""

    value: Shape
    unit: Unit


@dataclass(frozen=True, slots=True)
class Items:
    r"""Several answers in any order: ``1, 2``, ``\{1, 2\}``, ``a \cup b``, ``1 \pm 2``.

    ``union`` tells the third, and ``either`` that one of several inequalities or equations holds, not all of them.
    ``by_or``: they were joined by "or", whether that matters or not.
    """

    items: tuple[Shape, ...]
    union: bool = False
    either: bool = False
    by_or: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Blanks:
    """The answers to several blanks, in order: ``5; 10``."""

    items: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Ordered items between brackets: a tuple, a point, an interval; ``brackets`` such as ``[)``."""

    brackets: str
    items: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of cells, whatever the brackets around them; also the cases of a function."""

    rows: tuple[tuple[Shape, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """``sides[0] operators[0] sides[1] ...`` of expressions; operators are =, <, <=, >, >=, !=."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Named:
    r"""What a name stands for or lies in, where that is no one expression: ``x = 1, 2``, ``x \in [1, 2]``."""

    name: str
    value: Shape


@dataclass(frozen=True, slots=True)
class SetBuilder:
    r"""``\{x \mid 1 < x < 2\}``."""

    name: str
    condition: Shape


@dataclass(frozen=True, slots=True)
class Approximation:
    r"""``5\pi \approx 15.7``, where that is true."""

    exact: Shape
    decimal: Shape


Shape = Expression | Quantity | Items | Blanks | Sequence | Matrix | Relation | Named | SetBuilder | Approximation
