r"""The value of one expression: read by math-verify's parser, computed here with bounded numbers.

Nothing is ever handed to sympy's ``simplify``, ``solve`` or ``evalf``: what a hostile answer could make expensive, a
tower of powers or a sum to 10^9, is refused by an estimate of its size.  Two expressions are equal when they agree to
``_AGREE_DIGITS`` digits (exactly, where both are rational) at several points of their variables.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import mpmath

_DIGITS = 200
_AGREE_DIGITS = 120
_MAX_BITS = 40_000  # of an exact number
_MAX_LOG10 = 60  # of an inexact one: smaller and larger ones would be lost in the agreed digits
_MAX_NODES = 400
_POINTS = 6

Number = Any  # Fraction where exact, else mpmath's mpf or mpc

_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_RATIONAL = re.compile(
    r"([+-]?)\s*(?:([0-9]+)|([0-9]*)\.([0-9]+)|([0-9]+)\.|([0-9]+)\s*/\s*([0-9]+)"
    r"|\\frac\s*(?:\{\s*([+-]?\s*[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([+-]?\s*[0-9]+)\s*\}|([0-9])))"
)
_GLUED_NUMBERS = re.compile(r"(?<!_)[0-9.]\s+[0-9.]|[0-9]\s*\.\s*[0-9]+\s*\.")
_BIG_COMBINATORICS = re.compile(r"\\binom|\\gcd|\\lcm|\\max|\\min|\\sum|\\prod|\\int|\\lim|\\pmod|\\bmod|\\mod")
_INNER_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^\\circ")


class UnreadableError(Exception):
    """An expression that has no value here; the message says why."""


class TooLargeError(UnreadableError):
    """A number that is not worth computing; at other points of the variables it may be smaller."""


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
    with mpmath.workdps(_DIGITS):
        return bool(abs(_inexact(exact) - _inexact(value)) <= _inexact(half))


@cache
def warm_up() -> Callable[[str], Any]:
    """Imports math-verify and loads its grammar (a second or so); returns the parser of one expression."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)  # it warns that no timeout is set: ours is outside
    # No anchor but the box, nothing outside it, and units are ours ("3t" would lose its t)
    extraction = LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last", equations=False
        ),
    )

    def parse_one(text: str) -> Any:
        found = parse(rf"\boxed{{{text}}}", [extraction], fallback_mode="no_fallback", parsing_timeout=None)
        return found[0] if found else None

    parse_one(r"\frac{x+\sqrt{2}}{3}")
    return parse_one


@lru_cache(maxsize=4096)
def read(text: str) -> Any:
    """The sympy tree of one expression.  Raises UnreadableError."""
    if _GLUED_NUMBERS.search(text):
        raise UnreadableError("two numbers side by side")
    if _BIG_COMBINATORICS.search(text) and re.search(r"[0-9]{4}|\^", text):
        raise TooLargeError("too large to compute")
    exact = _INNER_DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    exact = _DECIMAL.sub(lambda d: rf"\frac{{{int(d[1] + d[2])}}}{{{10 ** len(d[2])}}}", exact)
    if re.search(r"[0-9]\s*\\frac\{[0-9]+\}\{10+\}", exact) and _DECIMAL.search(text):
        raise UnreadableError("two numbers side by side")
    tree = warm_up()(exact)
    if tree is None or not hasattr(tree, "args"):
        raise UnreadableError("not an expression")
    return tree


@lru_cache(maxsize=4096)
def constant(text: str) -> Number:
    """The value of an expression without variables.  Raises UnreadableError."""
    exact = rational(text)
    if exact is not None:
        return exact
    tree = read(text)
    if _variables(tree):
        raise UnreadableError("not a number")
    return evaluate(tree, 0)


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
        with mpmath.workdps(_DIGITS):
            left, right, other_left, other_right = (_inexact(evaluate(t, point)) for t in trees)
            over, under = left - right, other_left - other_right
            if under == 0 or over == 0:
                return False
            ratios.append(over / under)
    if positive and any(mpmath.im(r) != 0 or mpmath.re(r) <= 0 for r in ratios):
        return False
    return all(_agree(r, ratios[0]) for r in ratios)


def _same_at_points(a: Any, b: Any) -> bool:
    """Real-valued points decide; where either is complex at every point, complex values do."""
    variables = _variables(a) | _variables(b)
    real: list[bool] = []
    others: list[bool] = []
    for point in range(_POINTS if variables else 1):
        try:
            x, y = evaluate(a, point), evaluate(b, point)
        except (ZeroDivisionError, TooLargeError):
            continue
        (others if isinstance(x, mpmath.mpc) or isinstance(y, mpmath.mpc) else real).append(_agree(x, y))
    decisive = real or others
    if not decisive:
        raise UnreadableError("no value")
    return all(decisive)


def _agree(a: Number, b: Number) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    with mpmath.workdps(_DIGITS):
        x, y = _inexact(a), _inexact(b)
        return bool(abs(x - y) <= mpmath.mpf(10) ** -_AGREE_DIGITS * max(1, abs(x), abs(y)))


def _variables(tree: Any) -> set[str]:
    return {s.name for s in tree.free_symbols} - {"i"}


def evaluate(tree: Any, point: int) -> Number:
    """The value of ``tree`` where each variable has its pseudo-random value number ``point``.

    Raises:
        UnreadableError: an operation that is not known, or a number that is too large.
        ZeroDivisionError: no value at this point.
    """
    with mpmath.workdps(_DIGITS):
        return _Evaluation(point).value(tree)


class _Evaluation:
    """One bottom-up pass, with a budget of nodes."""

    def __init__(self, point: int) -> None:
        self.point, self.nodes = point, 0

    def value(self, tree: Any) -> Number:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise UnreadableError("too many operations")
        if tree.is_Symbol:
            return mpmath.mpc(0, 1) if tree.name == "i" else _sample(tree.name, self.point)
        name = type(tree).__name__
        if tree.is_Rational:
            return Fraction(int(tree.p), int(tree.q))
        if name in _CONSTANTS:
            return _CONSTANTS[name]()
        if name not in _OPERATIONS:
            raise UnreadableError(f"{name} is not computed")
        return _bounded(_OPERATIONS[name](*[self.value(a) for a in tree.args]))


def _sample(name: str, point: int) -> Fraction:
    """A fixed 'random' rational, positive at even points; up to 3 at the first two, then up to 30 and 300."""
    digest = hashlib.blake2b(f"{point}:{name}".encode(), digest_size=4).digest()
    value = Fraction(int.from_bytes(digest, "big") % 2999 + 1, 1000) * 10 ** (point // 2)
    return value if point % 2 == 0 else -value


def _inexact(value: Number) -> Any:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _bounded(value: Number) -> Number:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
            raise TooLargeError("too large to compute")
        return value
    size = abs(value)
    if not mpmath.isfinite(size):
        raise ZeroDivisionError
    if size > mpmath.mpf(10) ** _MAX_LOG10 or 0 < size < mpmath.mpf(10) ** -_MAX_LOG10:
        if size < mpmath.mpf(10) ** -_AGREE_DIGITS:
            return Fraction(0)  # sin(pi)
        raise TooLargeError("too large to compute")
    return value.real if isinstance(value, mpmath.mpc) and abs(value.imag) < mpmath.mpf(10) ** -_AGREE_DIGITS else value


def _add(*terms: Number) -> Number:
    exact = sum((t for t in terms if isinstance(t, Fraction)), Fraction(0))
    others = [t for t in terms if not isinstance(t, Fraction)]
    return sum(others, _inexact(exact)) if others else exact


def _multiply(*factors: Number) -> Number:
    result: Number = Fraction(1)
    for factor in factors:
        both = isinstance(result, Fraction) and isinstance(factor, Fraction)
        result = _bounded(result * factor if both else _inexact(result) * _inexact(factor))
    return result


def _power(base: Number, exponent: Number) -> Number:
    if base == 0 and isinstance(exponent, Fraction):
        if exponent <= 0:
            raise ZeroDivisionError
        return Fraction(0)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > 2 * _MAX_BITS and abs(base) != 1:
            raise TooLargeError("too large to compute")
        if exponent.denominator == 1:
            if base == -1:
                return Fraction(1 if exponent.numerator % 2 == 0 else -1)
            return Fraction(1) if base == 1 else base**exponent.numerator
        if exponent.denominator % 2 and base < 0 and exponent.denominator < 100:  # the real root, as in school
            root = _power(-base, exponent)
            return -root if exponent.numerator % 2 else root
    if abs(_inexact(exponent)) > 1000:
        raise TooLargeError("too large to compute")
    return mpmath.power(_inexact(base), _inexact(exponent))


def _factorial(n: Number) -> Number:
    if not isinstance(n, Fraction) or n.denominator != 1 or not 0 <= n <= 3000:
        raise UnreadableError("factorial of this number")
    return Fraction(math.factorial(int(n)))


def _binomial(n: Number, k: Number) -> Number:
    whole = isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1
    if not whole or not 0 <= n <= 3000 or not 0 <= k <= n:
        raise UnreadableError("binomial of these numbers")
    return Fraction(math.comb(int(n), int(k)))


def _floor(x: Number) -> Number:
    if isinstance(x, mpmath.mpc):
        raise UnreadableError("floor of a complex number")
    return Fraction(x.numerator // x.denominator) if isinstance(x, Fraction) else Fraction(int(mpmath.floor(x)))


def _log(x: Number, base: Number | None = None) -> Number:
    if x == 0 or base == 1:
        raise ZeroDivisionError
    natural = mpmath.log(_inexact(x))
    return natural if base is None else natural / mpmath.log(_inexact(base))


def _function(compute: Callable[[Any], Any]) -> Callable[[Number], Number]:
    return lambda x: compute(_inexact(x))


_CONSTANTS: dict[str, Callable[[], Number]] = {
    "Pi": lambda: +mpmath.pi,
    "Exp1": lambda: +mpmath.e,
    "ImaginaryUnit": lambda: mpmath.mpc(0, 1),
}
_ARITHMETIC: dict[str, Callable[..., Number]] = {
    "Add": _add,
    "Mul": _multiply,
    "Pow": _power,
    "exp": lambda x: _power(+mpmath.e, x),
    "log": _log,
    "Abs": lambda x: abs(x),
    "factorial": _factorial,
    "binomial": _binomial,
    "floor": _floor,
    "ceiling": lambda x: -_floor(-x),
    "Max": lambda *xs: max(xs, key=_inexact),
    "Min": lambda *xs: min(xs, key=_inexact),
    "UnevaluatedExpr": lambda x: x,
}
_OPERATIONS = _ARITHMETIC | {
    name: _function(getattr(mpmath, name))
    for name in (
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot"),
        *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
    )
}
