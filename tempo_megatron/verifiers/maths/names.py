r"""What a value may be assigned to: ``x``, ``a_{10}``, ``f(x)``, ``P(A)``, ``AB``, ``\angle ABC``, ``(x, y)``."""

from __future__ import annotations

import re

_GREEK = (
    "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|(?:var)?rho|(?:var)?sigma"
    "|tau|upsilon|(?:var)?phi|chi|psi|omega|ell|Delta|Theta|Phi|Omega"
)
_LETTER = rf"(?:[a-zA-Z]|\\(?:{_GREEK})(?![a-zA-Z]))"
_SHAPE = r"(?:\\triangle\s*|\\text\s*\{[a-zA-Z ]{1,20}\}|\\(?:max|min)(?![a-zA-Z]))"
_SUBSCRIPT = rf"_(?:[a-zA-Z0-9]|\{{\s*(?:[a-zA-Z0-9+-]{{1,6}}|{_SHAPE}\s*[A-Z]{{0,4}})\s*\}}|\\(?:max|min)(?![a-zA-Z]))"
_ARGUMENTS = r"\([a-zA-Z0-9]{1,4}(?:\s*,\s*[a-zA-Z0-9]{1,4})*\)"
_EVENT = r"P\([A-Z](?:\s*(?:\\cap|\\cup|\\mid|\|)\s*[A-Z])?\)"
_GEOMETRIC = (
    r"[A-Z]{2,4}|\|[A-Z]{2}\||m?\s*\\angle\s*[A-Z0-9]{1,3}|\\triangle\s*[A-Z]{3}|\[[A-Z]{3,6}\]"
    r"|\|?\s*\\(?:overline|overrightarrow|vec|widehat|hat)\s*\{\s*[a-zA-Z]{1,3}\s*\}\s*\|?"
)
_WORDS = r"\\text\s*\{(?![a-zA-Z ]*\b(?i:not?|never|wrong|except|false)\b)[a-zA-Z ]{1,30}\}"
_NAME = re.compile(rf"{_LETTER}(?:{_SUBSCRIPT})?(?:{_ARGUMENTS})?|{_EVENT}|{_GEOMETRIC}|{_WORDS}")
_TUPLE = re.compile(rf"\({_LETTER}(?:{_SUBSCRIPT})?(?:\s*,\s*{_LETTER}(?:{_SUBSCRIPT})?){{1,3}}\)")


def is_name(text: str) -> bool:
    """Is ``text`` what a value could be assigned to?"""
    return _NAME.fullmatch(text) is not None or _TUPLE.fullmatch(text) is not None


def is_in_order(name: str) -> bool:
    """Would a bare tuple name its values in this order?"""
    names = [part.strip(" \\") for part in name[1:-1].split(",")] if name.startswith("(") else []
    return names == sorted(names)
