"""Arithmetic with bounded numbers: exact where they are rational, else at 300 digits, of which 180 must agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

DIGITS = 300
_AGREE_DIGITS = 180
_MAX_BITS = 40_000  # of an exact number
_MAX_LOG10, _MIN_LOG10 = 60, -50  # of an inexact number, where its last digits would be lost
_MAX_FACTORIAL = 3000
_MAX_GAMMA = 100  # of a number that is not whole

Number = Any  # Fraction where exact, else mpmath's mpf or mpc


class UnreadableError(Exception):
    """An expression that has no value here; the message says why."""


class TooLargeError(UnreadableError):
    """A number that is not worth computing; at other points of the variables it may be smaller."""


def is_complex(value: Number) -> bool:
    """Has ``value`` an imaginary part?"""
    return isinstance(value, mpmath.mpc)


def agree(a: Number, b: Number) -> bool:
    """Are two numbers equal, up to errors of rounding where one is inexact?"""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    with mpmath.workdps(DIGITS):
        x, y = inexact(a), inexact(b)
        return bool(abs(x - y) <= mpmath.mpf(10) ** -_AGREE_DIGITS * max(1, abs(x), abs(y)))


def quotient(over: Number, under: Number) -> Number:
    """Exact where both are; without an imaginary part that is an error of rounding."""
    if isinstance(over, Fraction) and isinstance(under, Fraction):
        return over / under
    value = inexact(over) / inexact(under)
    is_real = is_complex(value) and abs(value.imag) <= mpmath.mpf(10) ** -_AGREE_DIGITS * abs(value)
    return value.real if is_real else value


def together(values: list[Number]) -> list[Number]:
    """All exact, or all inexact."""
    if all(isinstance(v, Fraction) for v in values):
        return values
    with mpmath.workdps(DIGITS):
        return [inexact(v) for v in values]


def bits(value: Fraction) -> int:
    """Binary digits of the longer of numerator and denominator."""
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def inexact(value: Number) -> Any:
    """``value`` as a number of mpmath."""
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def bounded(value: Number) -> Number:
    """``value``, without an imaginary part that is an error of rounding.  Raises TooLargeError, ZeroDivisionError."""
    if isinstance(value, Fraction):
        if bits(value) > _MAX_BITS:
            raise TooLargeError("too large to compute")
        return value
    size = abs(value)
    if not mpmath.isfinite(size):
        raise ZeroDivisionError
    if size > mpmath.mpf(10) ** _MAX_LOG10 or 0 < size < mpmath.mpf(10) ** _MIN_LOG10:
        raise TooLargeError("too large to compute")
    return value.real if is_complex(value) and abs(value.imag) < mpmath.mpf(10) ** -_AGREE_DIGITS else value


def _cancelled(value: Number, size: Any = 1) -> Number:
    """Exactly 0 where only an error of rounding is left of numbers of this size: sin(pi)."""
    return Fraction(0) if abs(value) < mpmath.mpf(10) ** -_AGREE_DIGITS * size else value


def _add(*terms: Number) -> Number:
    exact, others, size = Fraction(0), mpmath.mpf(0), mpmath.mpf(1)
    for term in terms:
        if isinstance(term, Fraction):
            exact = bounded(exact + term)
        else:
            others += term
            size = max(size, abs(term))
    if all(isinstance(t, Fraction) for t in terms):
        return exact
    return _cancelled(others + inexact(exact), size)


def _multiply(*factors: Number) -> Number:
    result: Number = Fraction(1)
    for factor in factors:
        both = isinstance(result, Fraction) and isinstance(factor, Fraction)
        result = bounded(result * factor if both else inexact(result) * inexact(factor))
    return result


def _power(base: Number, exponent: Number) -> Number:
    if base == 0 and isinstance(exponent, Fraction):
        if exponent <= 0:
            raise ZeroDivisionError
        return Fraction(0)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if abs(exponent) * bits(base) > 2 * _MAX_BITS and abs(base) != 1:
            raise TooLargeError("too large to compute")
        if exponent.denominator == 1:
            if base == -1:
                return Fraction(1 if exponent.numerator % 2 == 0 else -1)
            return Fraction(1) if base == 1 else base**exponent.numerator
        if exponent.denominator % 2 and base < 0 and exponent.denominator < 100:  # the real root, as in school
            root = _power(-base, exponent)
            return -root if exponent.numerator % 2 else root
    if abs(inexact(exponent)) > 1000:
        raise TooLargeError("too large to compute")
    return mpmath.power(inexact(base), inexact(exponent))


def _factorial(n: Number) -> Number:
    """Of a whole number; elsewhere, where a variable has a value in between, the gamma function."""
    if not _is_whole(n):
        if is_complex(n) or abs(n) > _MAX_GAMMA:
            raise TooLargeError("factorial of this number")
        return mpmath.gamma(inexact(n) + 1)
    if not 0 <= n <= _MAX_FACTORIAL:
        raise UnreadableError("factorial of this number")
    return Fraction(math.factorial(int(n)))


def _binomial(n: Number, k: Number) -> Number:
    if not (_is_whole(n) and _is_whole(k)):
        if is_complex(n) or is_complex(k) or max(abs(n), abs(k)) > _MAX_GAMMA:
            raise TooLargeError("binomial of these numbers")
        return mpmath.binomial(inexact(n), inexact(k))
    if not 0 <= n <= _MAX_FACTORIAL or not 0 <= k <= n:
        raise UnreadableError("binomial of these numbers")
    return Fraction(math.comb(int(n), int(k)))


def _is_whole(n: Number) -> bool:
    return isinstance(n, Fraction) and n.denominator == 1


def _floor(x: Number) -> Number:
    if isinstance(x, mpmath.mpc):
        raise UnreadableError("floor of a complex number")
    if isinstance(x, Fraction):
        return Fraction(x.numerator // x.denominator)
    nearest = mpmath.nint(x)  # sqrt(2) * sqrt(2) is a little less than 2
    return Fraction(int(nearest if agree(x, nearest) else mpmath.floor(x)))


def _log(x: Number, base: Number | None = None) -> Number:
    if x == 0 or base == 1:
        raise ZeroDivisionError
    natural = _cancelled(mpmath.log(inexact(x)))
    return natural if base is None else inexact(natural) / mpmath.log(inexact(base))


def _tanh(x: Number) -> Number:
    if abs(x) > 100:  # 1 but for digits that are lost
        raise TooLargeError("too large to compute")
    return mpmath.tanh(inexact(x))


def _function(compute: Callable[[Any], Any]) -> Callable[[Number], Number]:
    return lambda x: _cancelled(compute(inexact(x)))


CONSTANTS: dict[str, Callable[[], Number]] = {
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
    "Max": lambda *xs: max(xs, key=inexact),
    "Min": lambda *xs: min(xs, key=inexact),
    "UnevaluatedExpr": lambda x: x,
    "tanh": _tanh,
}
OPERATIONS = _ARITHMETIC | {
    name: _function(getattr(mpmath, name))
    for name in (
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot"),
        *("sinh", "cosh", "asinh", "acosh", "atanh"),
    )
}
