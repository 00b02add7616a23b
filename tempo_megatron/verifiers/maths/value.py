r"""The value of one expression: read by the parser of math-verify, computed here with bounded numbers.

Nothing is ever handed to sympy's ``simplify``, ``solve`` or ``evalf``: what a hostile answer could make expensive, a
tower of powers or a sum to 10^9, is refused by an estimate of its size.  Two expressions are equal when they agree to
``_AGREE_DIGITS`` digits (exactly, where both are rational) at several points of their variables.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import mpmath

_DIGITS = 300
_AGREE_DIGITS = 180
_MAX_BITS = 40_000  # of an exact number
_MAX_MIXED_BITS = 160  # of an exact constant among inexact numbers, where its last digits would be lost
_MAX_LOG10, _MIN_LOG10 = 60, -50  # of an inexact number, for the same reason
_MAX_NODES = 400
_POINTS = 16
_INTEGER_POINTS = 2  # floors and periods may agree everywhere else
_MIN_POINTS = 3
_PRIME = 131_071  # denominators: no multiple of a round number is an integer at a point
_MAX_ATOMS = 60  # letters and commands of an expression, which the parser's time grows with
_MAX_BARS = 8
_MAX_FUNCTIONS = 6
_MAX_SLASHES = 2  # beside a function whose argument has no brackets: the grammar tries every end of it

Number = Any  # Fraction where exact, else mpmath's mpf or mpc

_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_RATIONAL = re.compile(
    r"([+-]?)\s*(?:([0-9]+)|([0-9]*)\.([0-9]+)|([0-9]+)\.|([0-9]+)\s*/\s*([0-9]+)"
    r"|\\frac\s*(?:\{\s*([+-]?\s*[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([+-]?\s*[0-9]+)\s*\}|([0-9])))"
)
_GLUED_NUMBERS = re.compile(r"(?<!_)[0-9.]\s+[0-9.]|[0-9]\s*\.\s*[0-9]+\s*\.")
_REFUSED = [
    (re.compile(r"['\"<>=:&%$#@?~`;]|\\[{}]|!\s*!|\)\s*_"), "not an expression"),  # a prime would be dropped
    (re.compile(r"(?<!\\)[0-9)}]\s*_|I\s*_"), "a subscript of no variable"),  # it would be dropped
    (re.compile(r"\\frac\s*[0-9]\s*[0-9]\s*[0-9.]"), "a fraction of three digits"),
    (re.compile(r"/\s*(?:[0-9.]+|\([^()]*\))\s*\("), "a quotient that can be read in two ways"),
    (re.compile(r"(?<![_^0-9c])[0-9]+\s*\{\s*[0-9.\\]"), "two numbers side by side"),
    (re.compile(r"(?:\A|[-+*/(|0-9)])\s*\{\s*[0-9]+\s*\}\s*[({\\0-9]"), "two numbers side by side"),
    (re.compile(r"([_^])\s*(?:\\[a-zA-Z]+|[^\s{\\])\s*\1"), "a double superscript or subscript"),
]
_FUNCTION = re.compile(r"\\(?:ln|log|exp|max|min|gcd|lcm|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?)(?![a-zA-Z])\s*([({]?)")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_KNOWN = (
    "frac sqrt binom cdot times div pi infty ln log exp sin cos tan cot sec csc sinh cosh tanh"
    " arcsin arccos arctan arccot max min lfloor rfloor lceil rceil text overline bar vec hat tilde"
    " mathbf mathrm mathbb mathcal ell alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa"
    " lambda mu nu xi rho varrho sigma tau upsilon phi varphi chi psi omega Delta Theta Lambda Xi Sigma Phi Psi Omega"
    " gcd lcm"
)
_COMMANDS = frozenset(_KNOWN.split())
_PRODUCTS = [  # what the parser takes for a mixed number: 2(3) is 6, not 5
    (re.compile(r"(?<![\\0-9_^{.])([0-9.]+)\s*\("), r"\1\\cdot ("),
    (re.compile(r"\)\s*(?=\(|[0-9]|\\frac)"), r")\\cdot "),
]
_MIXED_NUMBER = re.compile(
    r"(?<![_^0-9.])[0-9]+\s*\\frac\s*(?:([0-9])|\{\s*([0-9]+)\s*\})\s*(?:([0-9])|\{\s*([0-9]+)\s*\})"
)
_BINOMIAL = re.compile(r"\\binom\s*\{\s*([0-9]{1,5})\s*\}\s*\{\s*([0-9]{1,5})\s*\}")
_GAMMA = re.compile(r"\\gamma(?![a-zA-Z])")  # the parser takes it for a function
_BIG_COMBINATORICS = re.compile(r"\\binom|\\gcd|\\lcm|\\max|\\min")
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
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    # Units are ours ("3t" would lose its t), and math-verify's own call would make R and r one variable
    normal = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    conversion = ConversionConfig(lowercase_symbols=False)

    def parse_one(text: str) -> Any:
        try:
            return latex2sympy(text, normalization_config=normal, conversion_config=conversion)
        except MemoryError:
            raise  # the worker's bound, to be counted: no property of the text
        except Exception:  # the conversion raises bare Exceptions (latex2sympy2.py), and what sympy raises
            return None

    parse_one(r"\frac{x+\sqrt{2}}{3}")
    return parse_one


@lru_cache(maxsize=4096)
def read(text: str) -> Any:
    """The sympy tree of one expression.  Raises UnreadableError."""
    text = _INNER_DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    _refuse(text)
    text = _GAMMA.sub(" g_{gamma}", _BINOMIAL.sub(_binomial_value, text))
    for pattern, product in _PRODUCTS:
        text = pattern.sub(product, text)
    if _BIG_COMBINATORICS.search(text) and re.search(r"[0-9]{4}|\^", text):
        raise TooLargeError("too large to compute")
    exact = _DECIMAL.sub(lambda d: rf"\frac{{{int(d[1] + d[2])}}}{{{10 ** len(d[2])}}}", text)
    if re.search(r"[0-9]\s*\\frac\{[0-9]+\}\{10+\}", exact) and _DECIMAL.search(text):
        raise UnreadableError("two numbers side by side")
    tree = warm_up()(exact)
    if tree is None or not hasattr(tree, "args"):
        raise UnreadableError("not an expression")
    return tree


def _refuse(text: str) -> None:
    """Raises UnreadableError for what the parser would read as something else, or for too long."""
    if _GLUED_NUMBERS.search(text):
        raise UnreadableError("two numbers side by side")
    for pattern, reason in _REFUSED:
        if pattern.search(text):
            raise UnreadableError(reason)
    commands = _COMMAND.findall(text)
    if not _COMMANDS.issuperset(commands):
        raise UnreadableError("a command that is not known")
    letters = re.findall("[a-zA-Z]", _COMMAND.sub("", text))
    long = len(commands) + len(letters) > _MAX_ATOMS or text.count("|") > _MAX_BARS
    functions = _FUNCTION.findall(text)
    if long or len(functions) > _MAX_FUNCTIONS or ("" in functions and text.count("/") > _MAX_SLASHES):
        raise TooLargeError("too long to parse")
    mixed = _MIXED_NUMBER.search(text)
    if mixed and int(mixed[1] or mixed[2]) >= int(mixed[3] or mixed[4]):
        raise UnreadableError("a mixed number or a product")


def _binomial_value(found: re.Match[str]) -> str:
    n, k = int(found[1]), int(found[2])
    if not k <= n or min(k, n - k) * n.bit_length() > 1000:
        raise TooLargeError("too large to compute")
    return f"({math.comb(n, k)})"


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
            try:
                left, right, other_left, other_right = (_inexact(evaluate(t, point)) for t in trees)
            except (ZeroDivisionError, TooLargeError):
                continue
            if _agree(left, right) or _agree(other_left, other_right):
                return False  # true of everything
            ratios.append((left - right) / (other_left - other_right))
    if len(ratios) < _MIN_POINTS:
        raise UnreadableError("no value")
    with mpmath.workdps(_DIGITS):
        if positive and any(mpmath.re(r) <= 0 or not _agree(r / mpmath.re(r), Fraction(1)) for r in ratios):
            return False
        return all(_agree(r / ratios[0], Fraction(1)) for r in ratios)


def _same_at_points(a: Any, b: Any) -> bool:
    """Real-valued points decide; where they are too few, complex values do too."""
    variables = _variables(a) | _variables(b)
    real: list[bool] = []
    others: list[bool] = []
    for point in range(_POINTS if variables else 1):
        try:
            x, y = evaluate(a, point), evaluate(b, point)
        except (ZeroDivisionError, TooLargeError):
            continue
        agree = _agree(x, y)
        if _is_complex(x) or _is_complex(y):
            others.append(agree)
        elif agree:
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
            x, y = evaluate(a, point), evaluate(b, point)
        except (ZeroDivisionError, UnreadableError):
            continue
        if not _is_complex(x) and not _is_complex(y) and not _agree(x, y):
            return True
    return False


def _is_complex(value: Number) -> bool:
    return isinstance(value, mpmath.mpc)


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
        return _Evaluation(point).run(tree)


class _Evaluation:
    """One bottom-up pass, with a budget of nodes."""

    def __init__(self, point: int) -> None:
        self.point, self.nodes, self.symbols = point, 0, 0
        self.bits = 0  # of the longest exact constant
        self.inexact = False

    def run(self, tree: Any) -> Number:
        try:
            result = self.value(tree)
        except (TypeError, ValueError, OverflowError) as error:  # such as an order of complex numbers
            raise UnreadableError("no value") from error
        if self.inexact and self.bits > _MAX_MIXED_BITS:
            raise TooLargeError("too large to compute")
        return result

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
            self.bits = max(self.bits, _bits(exact))
            return exact
        if name in _CONSTANTS:
            return _CONSTANTS[name]()
        if type(type(tree)).__name__ == "UndefinedFunction":
            return self.unknown_function(name, [self.value(a) for a in tree.args])
        if name not in _OPERATIONS:
            raise UnreadableError(f"{name} is not computed")
        symbols = self.symbols
        result = _bounded(_OPERATIONS[name](*[self.value(a) for a in tree.args]))
        if not isinstance(result, Fraction):
            self.inexact = True
        elif symbols == self.symbols:
            self.bits = max(self.bits, _bits(result))
        return result

    def unknown_function(self, name: str, arguments: list[Number]) -> Number:
        """A pseudo-random value for f at exact arguments."""
        self.symbols += 1
        if not all(isinstance(a, Fraction) for a in arguments):
            raise UnreadableError(f"{name} of an inexact number")
        return _sample(f"{name}({', '.join(map(str, arguments))})", self.point)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


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


def is_near(exact: Number, decimal: str) -> bool:
    """Is ``decimal`` a number with a point that differs from ``exact`` by less than one of its last digit?"""
    value = rational(decimal)
    if value is None or "." not in decimal or _is_complex(exact):
        return False
    with mpmath.workdps(_DIGITS):
        return bool(abs(_inexact(exact) - _inexact(value)) < _inexact(Fraction(1, 10 ** len(decimal.split(".")[1]))))


def _inexact(value: Number) -> Any:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _bounded(value: Number) -> Number:
    if isinstance(value, Fraction):
        if _bits(value) > _MAX_BITS:
            raise TooLargeError("too large to compute")
        return value
    size = abs(value)
    if not mpmath.isfinite(size):
        raise ZeroDivisionError
    if size > mpmath.mpf(10) ** _MAX_LOG10 or 0 < size < mpmath.mpf(10) ** _MIN_LOG10:
        raise TooLargeError("too large to compute")
    return value.real if _is_complex(value) and abs(value.imag) < mpmath.mpf(10) ** -_AGREE_DIGITS else value


def _cancelled(value: Number, size: Any = 1) -> Number:
    """Exactly 0 where only an error of rounding is left of numbers of this size: sin(pi)."""
    return Fraction(0) if abs(value) < mpmath.mpf(10) ** -_AGREE_DIGITS * size else value


def _add(*terms: Number) -> Number:
    exact, inexact, size = Fraction(0), mpmath.mpf(0), mpmath.mpf(1)
    for term in terms:
        if isinstance(term, Fraction):
            exact = _bounded(exact + term)
        else:
            inexact += term
            size = max(size, abs(term))
    if all(isinstance(t, Fraction) for t in terms):
        return exact
    return _cancelled(inexact + _inexact(exact), size)


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
    if isinstance(x, Fraction):
        return Fraction(x.numerator // x.denominator)
    nearest = mpmath.nint(x)  # sqrt(2) * sqrt(2) is a little less than 2
    return Fraction(int(nearest if _agree(x, nearest) else mpmath.floor(x)))


def _log(x: Number, base: Number | None = None) -> Number:
    if x == 0 or base == 1:
        raise ZeroDivisionError
    natural = _cancelled(mpmath.log(_inexact(x)))
    return natural if base is None else _inexact(natural) / mpmath.log(_inexact(base))


def _tanh(x: Number) -> Number:
    if abs(x) > 100:  # 1 but for digits that are lost
        raise TooLargeError("too large to compute")
    return mpmath.tanh(_inexact(x))


def _function(compute: Callable[[Any], Any]) -> Callable[[Number], Number]:
    return lambda x: _cancelled(compute(_inexact(x)))


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
    "tanh": _tanh,
}
_OPERATIONS = _ARITHMETIC | {
    name: _function(getattr(mpmath, name))
    for name in (
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot"),
        *("sinh", "cosh", "asinh", "acosh", "atanh"),
    )
}
