r"""One spelling for one answer: LaTeX that prints alike becomes the same text."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from tempo_megatron.verifiers.maths.latex import braced_arguments, choices, unfolded

#: Longer answers are refused unread: no true final answer has this length, and parsing one takes long.
MAX_CHARS = 300
#: Brackets of all kinds inside each other.
MAX_DEPTH = 8

_SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-",
    "\u00d7": r"\times ", "\u00f7": "/", "\u00b7": r"\cdot ", "\u2217": "*", "\u22c5": r"\cdot ",
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u03b8": r"\theta ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ", "\u2208": r"\in ",
    "\u00b0": r"^\circ ", "\u00b1": r"\pm ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ",
    "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}",
    "\u00b2": "^{2}", "\u00b3": "^{3}", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
}  # fmt: skip
_SYMBOLS |= {
    "\u22a5": r"\perp ", "\u2225": r"\parallel ", "\u2032": "'",
    "\u3002": ".", "\u3001": ",", "\u3000": " ", "\u2220": r"\angle ", "\u25b3": r"\triangle ",
    # full-width forms, which Chinese text is written with; not the tilde, which may stand for a range
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5E)},
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_ROOT = re.compile(r"\u221a\s*(?:([0-9]+)|\(([^()]{1,40})\)|\{([^{}]{1,40})\})")

_NUMBER_GAP = re.compile(r"(?<=[0-9])(?:\\[!,;: ]|\{,\}|,\s*\\!)\s*(?=[0-9]{3}(?![0-9]))")
_THOUSANDS = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9]|,[0-9])")
_NUMBER_OR_LIST = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+")
_NAMED_LIST = re.compile(r"[a-zA-Z\\][^=<>,]{0,20}=\s*" + _NUMBER_OR_LIST.pattern)
_LISTS = re.compile(r"[(\[]|\\\{|\\langle|\\begin")
_REWRITES = [
    (re.compile(r"\\(?:left|right|bigg?[lr]?|Bigg?[lr]?|displaystyle|textstyle|limits|rm)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:thick)?approx(?:eq)?(?![a-zA-Z])|\\simeq(?![a-zA-Z])|\\doteq(?![a-zA-Z])"), r"\\approx "),
    (re.compile(r"\A(?:approximately|approx\.?|about|roughly)\s+(?=[-0-9.\\$])"), r"\\approx "),
    (re.compile(r"\\dbinom|\\tbinom"), r"\\binom"),
    (re.compile(r"\\(?:text|math)(?:bf|it)\s*\{\s*([a-zA-Z])\s*\}"), r"{\1}"),
    (
        re.compile(r"\\(?:text|textrm|textnormal|mathrm|mbox)\s*(?:\{\s*([ei])\s*\}|(?<=rm)\s([ei])(?![a-z]))"),
        r"{\1\2}",
    ),
    (re.compile(r"\\(?:textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|operatorname)(?=\s*\{)"), r"\\text"),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\\lg(?![a-zA-Z])"), r"\\log_{10} "),
    (re.compile(r"\\underline\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}"), r"\\\1(\2)"),
    (re.compile(r"(?<=[\s0-9a-z})\]$])\s*或者?\s*(?=[\s0-9({\[\\$a-z-])"), r" \\lor "),
    (re.compile(r"\\vee(?![a-zA-Z])"), r"\\lor"),
    (re.compile(r"\\text\s*\{\s*([A-Z](?:\s*,\s*[A-Z])+)\s*\}"), r"\1"),
    (re.compile(r"\\leq(?:slant)?(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\geq(?:slant)?(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\lbrack(?![a-zA-Z])"), "["),
    (re.compile(r"\\rbrack(?![a-zA-Z])"), "]"),
    (re.compile(r"\\degree(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r",?\s*\\text\s*\{\s*,?\s*or\s*\}"), r" \\lor "),
    (re.compile(r",?\s*\\text\s*\{\s*(?:,?\s*and|,)\s*\}"), ", "),
    (re.compile(r"(?<=[\s0-9})$]),?\s*\bor\b\s*(?=[\s0-9({\\$a-z-])"), r" \\lor "),
    (re.compile(r"(?<=[\s0-9})$]),?\s*\band\b\s*(?=[\s0-9({\\$a-z-])"), ", "),
    (re.compile(r"(?<!\\)\\[!,;:]|(?<!\\)\\ |~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ"), r"^\\circ"),
    (re.compile(r"(?<!\\)\*\*(?=\S)(.{1,300}?)(?<=\S)\*\*\Z"), r"\1"),
    (re.compile(r"\s+"), " "),
]
_OPEN_END = re.compile(r"\\[,;]\Z|\.\s*\.[ .,;]*\Z")  # 3.1... is not 3.1
_WRAPPERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]
_DOLLAR = re.compile(r"(?<!\\)\$")
_PARENTHESES = re.compile(r"(?<!\\)\\[()]")
_OPEN, _CLOSE = "([{", ")]}"


@lru_cache(maxsize=4096)
def clean(raw: str) -> str | None:
    """``raw`` in one spelling, or None when it is not a readable answer.

    Unreadable: empty, longer than ``MAX_CHARS``, braces that don't balance, brackets deeper than ``MAX_DEPTH``,
    control or zero-width characters, digits that are not ASCII.
    """
    text = _SYMBOL.sub(lambda found: _SYMBOLS[found.group()], raw[: MAX_CHARS + 1])
    if len(raw) > MAX_CHARS or any(_is_refused(c) for c in text):
        return None
    text = _NUMBER_GAP.sub("", unfolded(_ROOT.sub(_braced_root, text)))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = choices(braced_arguments(_unwrap(_without_inner_delimiters(_unwrap(text.strip())))))
    is_list = _LISTS.search(text) or _NUMBER_OR_LIST.fullmatch(text) or _NAMED_LIST.fullmatch(text)
    if not is_list:  # (2,999) is a pair
        text = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
    return text if text and _is_balanced(text) else None


def thousands_or_list(text: str) -> tuple[str, ...]:
    """The readings of cleaned ``text``: ``100,200`` may be one number, or two in this order."""
    if _NUMBER_OR_LIST.fullmatch(text):
        return text.replace(",", ""), text.replace(",", ";")
    return (text,)


def _braced_root(found: re.Match[str]) -> str:
    return rf"\sqrt{{{found[1] or found[2] or found[3]}}}"


def _without_inner_delimiters(text: str) -> str:
    """``$5$;$10$`` is ``5;10``.  A blank for each, so that no two numbers become one."""
    if len(_DOLLAR.findall(text)) % 2 == 0:
        text = _DOLLAR.sub(" ", text)
    return _PARENTHESES.sub(" ", text) if text.count(r"\(") == text.count(r"\)") else text


def _is_refused(character: str) -> bool:
    category = unicodedata.category(character)
    if category in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return character not in "\n\t\r"
    return category in ("Nd", "Nl") and not character.isascii()


def _unwrap(text: str) -> str:
    """Without math delimiters around it and the full stop after it."""
    for _ in range(3):
        if not _OPEN_END.search(text):
            text = text.rstrip(" .,;")
        for start, end in _WRAPPERS:
            inner = text[len(start) : -len(end)]
            if len(text) > len(start + end) and text.startswith(start) and text.endswith(end) and end not in inner:
                text = inner.strip()
                break
        if text.startswith("{") and text.endswith("}") and _is_balanced(text[1:-1]):
            text = text[1:-1].strip()
    return text.strip().removeprefix("+").strip()


def _is_balanced(text: str) -> bool:
    """Braces match, and nothing is nested too deeply; ( and [ needn't match: [0, 1) is an interval."""
    braces = depth = 0
    for i, character in enumerate(text):
        if character in "{}" and text[i - 1 : i] == "\\":
            continue
        if character in _OPEN:
            depth += 1
            braces += character == "{"
        elif character in _CLOSE:
            depth -= 1
            braces -= character == "}"
        if braces < 0 or depth > MAX_DEPTH:
            return False
    return braces == 0 and text.count(r"\{") == text.count(r"\}")


def split_top_level(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """``text`` cut where ``separator`` matches outside all brackets: the parts and the separators between them."""
    parts, separators, depth, start, i = [], [], 0, 0, 0
    while i < len(text):
        found = separator.match(text, i) if depth == 0 else None
        if found is not None:
            parts.append(text[start:i].strip())
            separators.append(found.group().strip())
            i = start = found.end()
            continue
        if text.startswith((r"\begin", r"\langle"), i) or text[i] in _OPEN:
            depth += 1
        elif text.startswith((r"\end", r"\rangle"), i) or text[i] in _CLOSE:
            depth -= 1
        i += 2 if text[i] == "\\" and text[i + 1 : i + 2] not in ("{", "}") else 1
    parts.append(text[start:].strip())
    return parts, separators


def words(text: str) -> str:
    r"""``text`` as plain words: no ``\text``, braces or quotes, lower case, single blanks; formulas are none."""
    bare = re.sub(r"\\text\s*|[{}\"'`$]|\\(?=[%#& ])", "", text)
    return "" if re.search(r"[\\^_]", bare) else " ".join(bare.casefold().split()).strip(" .")
