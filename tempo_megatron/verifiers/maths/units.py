r"""What stands around a number and is not part of its value: units, percent, degrees, currency, the base.

A unit may be left out of a response, or be added to it, but a wrong one is wrong: 5 cm is 5, and is not 5 m.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Words that change the value; an answer with one of them is compared as a text.
_SCALES = re.compile(
    r"(?:hundred|thousand|million|billion|trillion|lakh|crore|dozen|gross|half|halve|quarter|pair|couple|score"
    r"|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|(?:hundred|thousand|million|billion)th)s?"
)
#: Words that no unit has: the answer says more than a value.
_NO_UNIT = frozenset(
    (
        *("and", "or", "not", "no", "more", "less", "fewer", "than", "to", "if", "when", "for", "except", "about"),
        *("plus", "minus", "squared", "cubed"),
    )
)

_SYNONYMS = {
    "centimeter": "cm centimetre", "millimeter": "mm millimetre", "kilometer": "km kilometre", "meter": "m metre",
    "inch": "in inches", "foot": "ft feet", "yard": "yd", "mile": "mi",
    "gram": "g", "kilogram": "kg", "milligram": "mg", "pound": "lb lbs", "ounce": "oz", "ton": "tonne",
    "liter": "l L litre", "milliliter": "ml mL millilitre", "gallon": "gal", "quart": "qt", "pint": "", "cup": "",
    "second": "s sec", "minute": "min", "hour": "h hr", "day": "", "week": "", "month": "", "year": "yr",
    "degree": "deg", "radian": "rad", "dollar": "usd USD", "cent": "", "euro": "", "rupee": "rs Rs", "percent": "pct",
    "mph": "", "unit": "", "point": "", "people": "person", "student": "", "way": "", "time": "", "apple": "",
    "coin": "",    "side": "", "edge": "", "page": "", "book": "", "ticket": "", "mark": "", "digit": "", "vote": "",
    "car": "",    "item": "", "piece": "", "game": "", "marble": "", "block": "", "tile": "", "child": "children",
    "man": "men", "woman": "women", "joule": "J", "newton": "N", "watt": "W", "volt": "V", "kelvin": "K", "hertz": "Hz",
    "celsius": "", "fahrenheit": "", "am": "a.m. AM A.M.", "pm": "p.m. PM P.M.",
}  # fmt: skip
_CANONICAL = {name: unit for unit, others in _SYNONYMS.items() for name in (unit, *others.split())}
_FILLER = frozenset({"of", "a", "an", "the"})

_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|percent|pct)\s*\}|(?<![a-z])percent)\Z")
_DEGREE = re.compile(r"\s*\^\\circ\s*(?:\\text\s*\{\s*([CF])\s*\}|([CF]))?\Z")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|[a-z]*alpha|beta|gamma|delta|theta|phi|omega)(?![a-z])")
_BASE_DIGITS = re.compile(r"-?\s*(?:[0-9A-F]*[0-9][0-9A-F]*|[0-9A-F]*\.[0-9A-F]+)")
_BASE = re.compile(r"(?<=[0-9A-F])_\s*\{?\s*(?:\\text\s*\{\s*)?([a-z]+|[0-9]{1,2})\s*\}{0,2}\Z")
_TEXT = re.compile(r"\s*\\text\s*\{([^{}]{1,60})\}\s*(?:\^\s*\{?\s*([23])\s*\}?)?\Z")
_BARE = re.compile(r"(?<=[0-9})])\s+([A-Za-z][A-Za-z. /]{1,40}?)(?:\^\s*\{?\s*([23])\s*\}?)?\Z")
_CURRENCY = re.compile(r"\A(-?)\s*(?:\\\$|\$|\\text\s*\{\s*\\?\$\s*\})\s*(?=[-0-9.\\])")
_NAME = re.compile(r"([A-Za-z][A-Za-z'-]*\.?(?:[a-z]\.)?)(?:\^\(?([23])\)?)?|/")
#: Units in Chinese, and words for what is counted.
_CHINESE_NAMES = {
    "centimeter": "厘米", "millimeter": "毫米", "kilometer": "千米 公里", "meter": "米", "decimeter": "分米",
    "centimeter^2": "平方厘米", "meter^2": "平方米", "kilometer^2": "平方千米", "centimeter^3": "立方厘米",
    "meter^3": "立方米", "gram": "克", "kilogram": "千克 公斤", "ton": "吨", "liter": "升", "milliliter": "毫升",
    "degree": "度", "second": "秒", "minute": "分钟", "hour": "小时", "day": "天", "week": "周", "year": "年 岁",
    "yuan": "元", "people": "人", "unit": "个 只 条 张 本 辆 次 种 件 位 棵 组 名 项 块 道 支",
}  # fmt: skip
_CHINESE = {name: unit for unit, names in _CHINESE_NAMES.items() for name in names.split()}
_CHINESE_TAIL = re.compile(r"(?<=[0-9}])\s*(?:\\text\s*\{\s*)?([\u4e00-\u9fff]{1,4})\s*\}?\Z")
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]|'")
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
    if (degree := _DEGREE.search(text)) and not _is_formula(text[: degree.start()]):
        scale = degree[1] or degree[2]
        return text[: degree.start()], Unit(f"degree {scale}" if scale else "degree", True)
    if (base := _BASE.search(text)) and _BASE_DIGITS.fullmatch(text[: base.start()].strip()):
        return text[: base.start()], Unit(f"base {_NUMBERS.get(base[1], base[1])}", False)
    if (counted := _CHINESE_TAIL.search(text)) and counted[1] in _CHINESE:
        return text[: counted.start()], Unit(_CHINESE[counted[1]], True)
    for pattern in (_TEXT, _BARE):
        tail = pattern.search(text)
        if tail and re.search(r"[0-9})i]\s*\Z", text[: tail.start()] + " ") and (unit := _unit(tail[1], tail[2])):
            if pattern is _BARE and (not unit.known or _is_formula(text[: tail.start()])):
                continue
            return text[: tail.start()], unit
    return text, None


def _is_formula(text: str) -> bool:
    """Has ``text`` variables or functions of an angle?"""
    return _VARIABLE.search(re.sub(r"\\[a-zA-Z]+", " ", text)) is not None or _FUNCTION.search(text) is not None


def _unit(raw: str, power: str | None) -> Unit | None:
    found = [(m[1] or m[0], m[2]) for m in _NAME.finditer(raw)]
    rest = _NAME.sub("", raw).replace(r"\%", "")
    names = ["/" if name == "per" else name for name, _ in found if name.lower() not in _FILLER]
    powers = [own for name, own in found if name.lower() not in _FILLER]
    if rest.strip(" .,") or any(_SCALES.fullmatch(n.lower()) or n.lower() in _NO_UNIT for n in names):
        return None
    if names and names[0].lower() in ("square", "sq", "sq.", "cubic", "cu", "cu."):
        power = power or ("2" if names[0].lower().startswith("s") else "3")
        names, powers = names[1:], powers[1:]
        powers[:1] = [power]
    elif names:
        powers[-1] = power or powers[-1]
    if not any(n != "/" for n in names) or (len(names) == 1 and len(names[0]) == 1 and not _canonical(names[0])):
        return None  # \text{x} is a variable
    known = [n if n == "/" else _canonical(n) for n in names]
    parts = [(k or n.casefold() if len(n) > 3 else k or n) for k, n in zip(known, names, strict=True)]
    name = " ".join(f"{part}^{own}" if own else part for part, own in zip(parts, powers, strict=True))
    return Unit(name, all(known))


def _canonical(name: str) -> str | None:
    """Symbols such as mW and MW differ in case only."""
    spelled = name if len(name) <= 3 else name.lower()
    singulars = [spelled.removesuffix(ending) for ending in (".", "s", "es") if len(spelled) - len(ending) > 1]
    return next((_CANONICAL[n] for n in (spelled, *singulars) if n in _CANONICAL), None)


def units_agree(gold: Unit | None, got: Unit | None) -> bool:
    """May a response with unit ``got`` be right when the answer has unit ``gold``?

    A response may leave the unit out, and may add one that is known.
    """
    if got is None:
        return True
    if gold is None:
        return got.known
    return gold.name == got.name
