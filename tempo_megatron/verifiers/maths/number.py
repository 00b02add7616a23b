"""How a number is written around its digits; the one reading of it for integers and for mathematics."""

from __future__ import annotations

import re

from tempo_megatron.verifiers.maths.text import clean
from tempo_megatron.verifiers.maths.units import split_unit

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_NAME = re.compile(r"\A[a-zA-Z]\s*=\s*(?=[^,]*\Z)")  # x = 1,234 may be two values


def bare_number(text: str) -> str:
    """The digits of ``text`` without LaTeX, a known unit and a name before it; empty where it has no readable form."""
    cleaned = clean(text)
    if cleaned is None:
        return ""
    value, unit = split_unit(cleaned)
    if unit is not None and (not unit.known or unit.name.startswith("degree ")):
        return ""
    if inner := _TEXT.fullmatch(value.strip()):
        value = inner[1]
    return _NAME.sub("", value.strip()).removeprefix("=").strip()
