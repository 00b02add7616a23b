r"""What stands around a number and is not part of its value: units, percent, degrees, currency, the base.

A unit may be left out of a response, or be added to it, but a wrong one is wrong: 5 cm is 5, and is not 5 m.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tempo_megatron.verifiers.maths.text import words

#: Words that change the value; an answer with one of them is compared as a text.
_SCALES = frozenset(
    ("hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "third", "quarter", "pair", "score")
)

_SYNONYMS = {
    "centimeter": "cm centimetre", "millimeter": "mm millimetre", "kilometer": "km kilometre", "meter": "m metre",
    "inch": "in inches", "foot": "ft feet", "yard": "yd", "mile": "mi",
    "gram": "g", "kilogram": "kg", "milligram": "mg", "pound": "lb lbs", "ounce": "oz", "ton": "tonne",
    "liter": "l litre", "milliliter": "ml millilitre", "gallon": "gal", "quart": "qt", "pint": "", "cup": "",
    "second": "s sec", "minute": "min", "hour": "h hr", "day": "", "week": "", "month": "", "year": "yr",
    "degree": "deg", "radian": "rad", "dollar": "usd", "cent": "", "euro": "", "rupee": "rs", "percent": "pct",
    "mph": "", "unit": "", "point": "", "people": "person", "student": "", "way": "", "time": "", "apple": "",
    "coin": "",    "side": "", "edge": "", "page": "", "book": "", "ticket": "", "mark": "", "digit": "", "vote": "",
    "car": "",    "item": "", "piece": "", "game": "", "marble": "", "block": "", "tile": "", "child": "children",
    "man": "men", "woman": "women", "joule": "j", "newton": "n", "watt": "w", "volt": "v", "kelvin": "k", "hertz": "hz",
    "celsius": "", "fahrenheit": "", "am": "a.m.", "pm": "p.m.",
}  # fmt: skip
_CANONICAL = {name: unit for unit, others in _SYNONYMS.items() for name in (unit, *others.split())}
_FILLER = frozenset({"per", "of", "a", "an", "the", "/"})

_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|percent|pct)\s*\}|(?<![a-z])percent)\Z")
_DEGREE = re.compile(r"\s*\^\\circ\s*(?:\\text\s*\{\s*([CF])\s*\}|([CF]))?\Z")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_BASE = re.compile(r"(?<=[0-9A-F])_\s*\{?\s*(?:\\text\s*\{\s*)?([a-z]+|[0-9]{1,2})\s*\}{0,2}\Z")
_TEXT = re.compile(r"\s*\\text\s*\{([^{}]{1,60})\}\s*(?:\^\s*\{?\s*([23])\s*\}?)?\Z")
_BARE = re.compile(r"(?<=[0-9})\s])\s*([A-Za-z][A-Za-z. /]{1,40}?)(?:\^\s*\{?\s*([23])\s*\}?)?\Z")
_CURRENCY = re.compile(r"\A(-?)\s*(?:\\\$|\$|\\text\s*\{\s*\\?\$\s*\})\s*(?=[-0-9.\\])")
_NUMBERS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit in normal form, and whether it is one of the known ones."""

    name: str
    known: bool


def split_unit(text: str) -> tuple[str, Unit | None]:
    """The part of ``text`` with a value, and its unit."""
    if currency := _CURRENCY.match(text):
        return currency[1] + text[currency.end() :], Unit("dollar", True)
    if percent := _PERCENT.search(text):
        return text[: percent.start()], Unit("percent", True)
    if (degree := _DEGREE.search(text)) and not _ANGLE_FUNCTION.search(text):
        scale = degree[1] or degree[2]
        return text[: degree.start()], Unit(f"degree {scale}" if scale else "degree", True)
    if (base := _BASE.search(text)) and re.fullmatch(r"[0-9A-F]+", text[: base.start()].strip()):
        return text[: base.start()], Unit(f"base {_NUMBERS.get(base[1], base[1])}", False)
    for pattern in (_TEXT, _BARE):
        tail = pattern.search(text)
        if tail and re.search(r"[0-9})i]\s*\Z", text[: tail.start()] + " ") and (unit := _unit(tail[1], tail[2])):
            if pattern is _BARE and not unit.known:
                continue
            return text[: tail.start()], unit
    return text, None


def _unit(raw: str, power: str | None) -> Unit | None:
    names = [n for n in re.split(r"[\s]+|(?=/)|(?<=/)", words(raw)) if n]
    if not names or _SCALES & set(names) or any(c.isdigit() or c in "=<>()" for c in raw):
        return None
    if names[0] in ("square", "sq", "sq.", "cubic", "cu", "cu."):
        power = power or ("2" if names[0].startswith("s") else "3")
        names = names[1:]
    canonical = [_canonical(n) for n in names if n not in _FILLER]
    if not canonical:
        return None
    name = " ".join(n or o for n, o in zip(canonical, (n for n in names if n not in _FILLER), strict=True))
    return Unit(f"{name}^{power}" if power else name, all(canonical))


def _canonical(name: str) -> str | None:
    for candidate in (name, name.rstrip("."), name.removesuffix("s"), name.removesuffix("es")):
        if candidate in _CANONICAL:
            return _CANONICAL[candidate]
    return None


def units_agree(gold: Unit | None, got: Unit | None) -> bool:
    """May a response with unit ``got`` be right when the answer has unit ``gold``?

    A response may leave the unit out, and may add one that is known.
    """
    if got is None:
        return True
    if gold is None:
        return got.known
    return gold.name == got.name
