r"""LaTeX that the parser doesn't read as TeX does: arguments that are commands, rows of equations, ways to choose."""

from __future__ import annotations

import math
import re

#: Commands without arguments of their own.
_SYMBOL = (
    r"\\(?:pi|infty|ell|alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho"
    r"|varrho|sigma|tau|upsilon|phi|varphi|chi|psi|omega|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega)(?![a-zA-Z])"
)
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]{0,60}+\}){0,60}+\}){0,100}+\}"
_SCRIPT = re.compile(rf"([_^])\s*({_SYMBOL})")
_ROOT = re.compile(rf"(\\sqrt(?:\[[^\[\]]{{1,10}}\])?)\s*({_SYMBOL})")
_OVER = re.compile(rf"\\frac\s*({_SYMBOL})\s*({_SYMBOL}|{_GROUP}|[0-9](?![0-9.])|[a-zA-Z])")
_UNDER = re.compile(rf"\\frac\s*({_GROUP}|[0-9a-zA-Z])\s*({_SYMBOL})")

_LEFT_BRACE = re.compile(
    r"\\left\s*\\\{\s*\\begin\{(array|aligned|matrix|gathered)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}\s*\\right\s*\.",
    re.DOTALL,
)
_CASES = re.compile(r"\\begin\{(cases|aligned|gathered)\}([^&]*)\\end\{\1\}", re.DOTALL)

_INDEX = r"(?:\{\s*([0-9]{1,4})\s*\}|([0-9])(?![0-9]))"
_WAYS = re.compile(
    rf"(?<![A-Za-z\\_^])(?:\\text\s*\{{\s*([CA])\s*\}}|([CA]))\s*"
    rf"(?:_\s*{_INDEX}\s*\^\s*{_INDEX}|\^\s*{_INDEX}\s*_\s*{_INDEX})(?![0-9])"
)
_WAYS_BEFORE = re.compile(rf"(?:\A|\{{\s*\}}|(?<=[-+*/(=, ]))\s*[_^]\s*{_INDEX}\s*C\s*_\s*{_INDEX}(?![0-9])")
_CHOOSE = re.compile(r"\{\s*([0-9a-zA-Z+-]{1,8})\s*\\choose\s*([0-9a-zA-Z+-]{1,8})\s*\}")
_MAX_ARRANGED = 100


def braced_arguments(text: str) -> str:
    r"""``\frac\pi6`` as ``\frac{\pi}{6}``, ``e^\pi`` as ``e^{\pi}``; ``\frac\pi23`` could be two things and stays."""
    text = _ROOT.sub(r"\1{\2}", _SCRIPT.sub(r"\1{\2}", text))
    for pattern in (_OVER, _UNDER):
        text = pattern.sub(lambda found: rf"\frac{{{_bare(found[1])}}}{{{_bare(found[2])}}}", text)
    return text


def _bare(argument: str) -> str:
    return argument[1:-1] if argument.startswith("{") else argument


def unfolded(text: str) -> str:
    r"""``\begin{cases} x=1 \\ y=2 \end{cases}`` as ``x=1, y=2``; the cases of a function, which have ``&``, stay.

    And ``{10 \choose 3}`` as ``\binom{10}{3}``, before its braces can be taken for a pair around the whole.
    """
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    text = _LEFT_BRACE.sub(r"\\begin{cases}\2\\end{cases}", text)
    return _CASES.sub(
        lambda found: ", ".join(row for r in found[2].split("\\\\") if (row := r.strip(" \n\t,;."))), text
    )


def choices(text: str) -> str:
    r"""``C_{10}^{3}`` and ``{}_{10}C_3`` as ``\binom{10}{3}``; ``A_{10}^{3}`` as its number."""
    return _WAYS.sub(_ways, _WAYS_BEFORE.sub(_ways_before, text))


def _ways_before(found: re.Match[str]) -> str:
    n, k = (int(digits) for digits in found.groups() if digits)
    return rf"\binom{{{n}}}{{{k}}}" if k <= n else found.group()


def _ways(found: re.Match[str]) -> str:
    letter, *numbers = (group for group in found.groups() if group)
    first, second = map(int, numbers)
    n, k = (first, second) if "_" in found.group().partition("^")[0] else (second, first)
    if k > n or (letter == "A" and n > _MAX_ARRANGED):
        return found.group()
    return rf"\binom{{{n}}}{{{k}}}" if letter == "C" else f"({math.perm(n, k)})"
