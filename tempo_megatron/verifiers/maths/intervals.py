r"""Inequalities and set-builders as the sets that they describe: ``1 < x <= 2`` is ``(1, 2]``."""

from __future__ import annotations

from tempo_megatron.verifiers.maths.names import is_name
from tempo_megatron.verifiers.maths.shape import name_of, shape
from tempo_megatron.verifiers.maths.shapes import Expression, Items, Named, Relation, Sequence, SetBuilder, Shape

_INFINITY = Expression(r"\infty")
_MINUS_INFINITY = Expression(r"-\infty")


def solutions(of: Shape) -> tuple[str | None, Shape | None]:
    """The variable that ``of`` is about and the set of its values; (None, None) where it describes no such set."""
    if isinstance(of, Relation):
        return _interval(of)
    if isinstance(of, Items) and of.either:
        found = [solutions(item) for item in of.items]
        names, parts = {name for name, _ in found}, tuple(part for _, part in found if part is not None)
        if len(names) == 1 and len(parts) == len(found):
            return names.pop(), Items(parts, union=True)
    if isinstance(of, SetBuilder):
        name, values = solutions(of.condition)
        if name is None and name_of(of.condition) == of.name:
            name, values = of.name, _values(of.condition)
        return (None, values) if name == of.name else (None, None)
    return None, None


def _values(condition: Shape) -> Shape | None:
    r"""Of ``\{x \mid x = 1, 2\}``."""
    if isinstance(condition, Named):
        return condition.value
    one = isinstance(condition, Relation) and len(condition.sides) == 2
    return Items((shape(condition.sides[1]),)) if isinstance(condition, Relation) and one else None


def _interval(relation: Relation) -> tuple[str | None, Shape | None]:
    sides, operators = list(relation.sides), list(relation.operators)
    if operators[0] in (">", ">="):
        sides.reverse()
        operators = [{">": "<", ">=": "<="}.get(o, o) for o in reversed(operators)]
    if not set(operators) <= {"<", "<="}:
        return None, None
    if any(side.startswith("(") and is_name(side) for side in sides):
        return None, None  # a tuple of names
    if len(sides) == 3 and is_name(sides[1]):
        brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
        return sides[1], Sequence(brackets, (shape(sides[0]), shape(sides[2])))
    if len(sides) == 2 and is_name(sides[0]):
        return sides[0], Sequence("()" if operators[0] == "<" else "(]", (_MINUS_INFINITY, shape(sides[1])))
    if len(sides) == 2 and is_name(sides[1]):
        return sides[1], Sequence("()" if operators[0] == "<" else "[)", (shape(sides[0]), _INFINITY))
    return None, None
