"""The sympy tree of one expression, read by the parser of math-verify; what it would misread is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from tempo_megatron.verifiers.maths.arithmetic import TooLargeError, UnreadableError

_MAX_ATOMS = 60  # letters and commands of an expression, which the parser's time grows with
_MAX_BARS = 8
_MAX_FUNCTIONS = 6
_MAX_SLASHES = 2  # beside a function whose argument has no brackets: the grammar tries every end of it

_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_GLUED_NUMBERS = re.compile(r"(?<!_)[0-9.]\s+[0-9.]|[0-9]\s*\.\s*[0-9]+\s*\.")
_REFUSED = [
    (re.compile(r"['\"<>=:&%$#@?~`;]|\\[{}]|!\s*!|\)\s*_"), "not an expression"),  # a prime would be dropped
    (re.compile(r"(?<!\\)[0-9)}]\s*_|I\s*_"), "a subscript of no variable"),  # it would be dropped
    (re.compile(r"\\frac\s*[0-9]\s*[0-9]\s*[0-9.]"), "a fraction of three digits"),
    (re.compile(r"\\sqrt\s*[0-9][0-9.]"), "a root of two digits"),
    (re.compile(r"(?:(?<![\\a-zA-Z])[a-zA-Z]+|\))\s*0(?![0-9.])"), "nought times a letter"),  # "not 0" is not 0
    (re.compile(r"(?<![0-9._^{])0+(?:\.0*)?\s*(?:[a-hj-zA-Z]|i[a-z]|\()"), "nought times a letter"),
    (re.compile(r"(?<![_{])\\text(?![a-zA-Z])"), "a word in an expression"),
    (re.compile(r"\\text\s*\{[^{}]*\}\s*\^"), "a power of a text"),
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
