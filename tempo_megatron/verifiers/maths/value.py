r"""The value of one expression: read by the parser of math-verify (``parse``), computed here with bounded numbers.

Nothing is ever handed to sympy's ``simplify``, ``solve`` or ``evalf``: what a hostile answer could make expensive, a
tower of powers or a sum to 10^9, is refused by an estimate of its size.  Two expressions are equal when they agree to
``_AGREE_DIGITS`` digits (exactly, where both are rational) at several points of their variables.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from tempo_megatron.verifiers.maths.arithmetic import (
    CONSTANTS,
    DIGITS,
    OPERATIONS,
    Number,
    TooLargeError,
    UnreadableError,
    agree,
    bits,
    bounded,
    inexact,
    is_complex,
    quotient,
    together,
)
from tempo_megatron.verifiers.maths.parse import read

_MAX_MIXED_BITS = 160  # of an exact constant among inexact numbers, where its last digits would be lost
_MAX_NODES = 400
_POINTS = 16
_INTEGER_POINTS = 2  # floors and periods may agree everywhere else
_MIN_POINTS = 3
_PRIME = 131_071  # denominators: no multiple of a round number is an integer at a point

_RATIONAL = re.compile(
    r"([+-]?)\s*(?:([0-9]+)|([0-9]*)\.([0-9]+)|([0-9]+)\.|([0-9]+)\s*/\s*([0-9]+)"
    r"|\\frac\s*(?:\{\s*([+-]?\s*[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([+-]?\s*[0-9]+)\s*\}|([0-9])))"
)


def rational(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal or a fraction of integers; None for anything else."""
    match = _RATIONAL.fullmatch(text.strip())
    if match is None:
        return None
    sign, integer, whole, decimals, whole_dot, *fraction = match.groups()
    if integer or whole_dot:
        value = Fraction(int(integer or whole_dot))
    elif decimals is not None:
        value = Fraction(int(whole + decimals), 10 ** len(decimals))
    else:
        over, under = [part.replace(" ", "") for part in fraction if part is not None]
        if int(under) == 0:
            return None
        value = Fraction(int(over), int(under))
    return -value if sign == "-" else value


def rounds_to(exact: Number, decimal: str) -> bool:
    """Is ``decimal``, with at least six significant digits, the rounding of ``exact``?"""
    text = decimal.strip().lstrip("+")
    digits = text.lstrip("-").replace(".", "").lstrip("0")
    if "." not in text or len(digits) < 6 or isinstance(exact, mpmath.mpc):
        return False
    half = Fraction(1, 2 * 10 ** len(text.split(".")[1]))
    value = rational(text)
    if value is None:
        return False
    with mpmath.workdps(DIGITS):
        return bool(abs(inexact(exact) - inexact(value)) <= inexact(half))


def is_near(exact: Number, decimal: str) -> bool:
    """Is ``decimal`` a number with a point that is ``exact`` rounded, or cut off, at its last digit?"""
    value = rational(decimal)
    if value is None or "." not in decimal or is_complex(exact):
        return False
    unit = Fraction(1, 10 ** len(decimal.split(".")[1]))
    with mpmath.workdps(DIGITS):
        is_rounded = abs(inexact(exact) - inexact(value)) <= inexact(unit / 2)
        is_cut = 0 <= abs(inexact(exact)) - abs(inexact(value)) < inexact(unit) and inexact(exact) * inexact(value) > 0
    return bool(is_rounded or is_cut)


@lru_cache(maxsize=4096)
def constant(text: str) -> Number:
    """The value of an expression without variables.  Raises UnreadableError."""
    exact = rational(text)
    if exact is not None:
        return exact
    tree = read(text)
    if _variables(tree):
        raise UnreadableError("not a number")
    return evaluate((tree,), 0)[0]


def same(a: str, b: str) -> bool:
    """Do two expressions agree wherever they are looked at?  Raises UnreadableError."""
    x, y = rational(a), rational(b)
    if x is not None and y is not None:
        return x == y
    return _same_at_points(read(a), read(b))


def ratio_is_constant(a: tuple[str, str], b: tuple[str, str], *, positive: bool) -> bool:
    """Is ``(a0 - a1) / (b0 - b1)`` one non-zero (positive) number at every point?  Raises UnreadableError."""
    trees = [read(text) for text in (*a, *b)]
    if not set().union(*map(_variables, trees)):
        raise UnreadableError("no variable")
    ratios = []
    for point in range(_POINTS):
        try:
            left, right, other_left, other_right = together(evaluate(trees, point))
        except (ZeroDivisionError, TooLargeError):
            continue
        if agree(left, right) or agree(other_left, other_right):
            return False  # true of everything
        with mpmath.workdps(DIGITS):
            ratios.append(quotient(left - right, other_left - other_right))
    if len(ratios) < _MIN_POINTS:
        raise UnreadableError("no value")
    if positive and any(is_complex(r) or r <= 0 for r in ratios):
        return False
    with mpmath.workdps(DIGITS):
        return all(agree(quotient(r, ratios[0]), Fraction(1)) for r in ratios)


def _same_at_points(a: Any, b: Any) -> bool:
    """Real-valued points decide; where they are too few, complex values do too."""
    variables = _variables(a) | _variables(b)
    real: list[bool] = []
    others: list[bool] = []
    for point in range(_POINTS if variables else 1):
        try:
            x, y = evaluate((a, b), point)
        except (ZeroDivisionError, TooLargeError):
            continue
        is_same = agree(x, y)
        if is_complex(x) or is_complex(y):
            others.append(is_same)
        elif is_same:
            real.append(True)
        else:
            return False
    needed = _MIN_POINTS if variables else 1
    decisive = real if len(real) >= needed else real + others
    if len(decisive) < needed:
        raise UnreadableError("no value")
    return all(decisive) and not (variables and _differ_at_integers(a, b))


def _differ_at_integers(a: Any, b: Any) -> bool:
    for point in range(_POINTS, _POINTS + _INTEGER_POINTS):
        try:
            x, y = evaluate((a, b), point)
        except (ZeroDivisionError, UnreadableError):
            continue
        if not is_complex(x) and not is_complex(y) and not agree(x, y):
            return True
    return False


def _variables(tree: Any) -> set[str]:
    return {s.name for s in tree.free_symbols} - {"i"}


def evaluate(trees: Sequence[Any], point: int) -> list[Number]:
    """The values of ``trees`` where each variable has its pseudo-random value number ``point``.

    Raises:
        UnreadableError: an operation that is not known, or a number that is too large, in itself or to be compared with
            the others.
        ZeroDivisionError: no value at this point.
    """
    with mpmath.workdps(DIGITS):
        return _Evaluation(point).run(trees)


class _Evaluation:
    """One bottom-up pass, with a budget of nodes for each tree."""

    def __init__(self, point: int) -> None:
        self.point, self.nodes, self.symbols = point, 0, 0
        self.bits = 0  # of the longest exact constant
        self.inexact = False

    def run(self, trees: Sequence[Any]) -> list[Number]:
        results = []
        for tree in trees:
            self.nodes = 0
            try:
                results.append(self.value(tree))
            except (TypeError, ValueError, OverflowError) as error:  # such as an order of complex numbers
                raise UnreadableError("no value") from error
        if self.inexact and self.bits > _MAX_MIXED_BITS:
            raise TooLargeError("too large to compute")
        return results

    def value(self, tree: Any) -> Number:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise UnreadableError("too many operations")
        if tree.is_Symbol:
            self.symbols += 1
            return mpmath.mpc(0, 1) if tree.name == "i" else _sample(tree.name, self.point)
        name = type(tree).__name__
        if tree.is_Rational:
            exact = Fraction(int(tree.p), int(tree.q))
            self.bits = max(self.bits, bits(exact))
            return exact
        if name in CONSTANTS:
            return CONSTANTS[name]()
        if type(type(tree)).__name__ == "UndefinedFunction":
            return self.unknown_function(name, [self.value(a) for a in tree.args])
        if name not in OPERATIONS:
            raise UnreadableError(f"{name} is not computed")
        symbols = self.symbols
        result = bounded(OPERATIONS[name](*[self.value(a) for a in tree.args]))
        if not isinstance(result, Fraction):
            self.inexact = True
        elif symbols == self.symbols:
            self.bits = max(self.bits, bits(result))
        return result

    def unknown_function(self, name: str, arguments: list[Number]) -> Number:
        """A pseudo-random value for f at exact arguments."""
        self.symbols += 1
        if not all(isinstance(a, Fraction) for a in arguments):
            raise UnreadableError(f"{name} of an inexact number")
        return _sample(f"{name}({', '.join(map(str, arguments))})", self.point)


def _sample(name: str, point: int) -> Fraction:
    """A fixed 'random' rational up to 3, at some points up to 30 or 300; at the last points an integer."""
    digest = int.from_bytes(hashlib.blake2b(f"{point}:{name}".encode(), digest_size=8).digest(), "big")
    if point >= _POINTS:
        return Fraction(digest % 20 + 2)
    value = Fraction(digest % (3 * _PRIME) + 1, _PRIME) * (1, 1, 1, 10, 100)[point % 5]
    return -value if _is_negative(name, point, digest) else value


def _is_negative(name: str, point: int, digest: int) -> bool:
    """All are positive at point 0 and negative at 1; any two letters have different signs at one of the next seven."""
    if point < 2:
        return point == 1
    if point < 9:
        code = ord(name) if len(name) == 1 else hashlib.blake2b(name.encode(), digest_size=1).digest()[0]
        return bool(code >> (point - 2) & 1)
    return bool(digest >> 40 & 1)
