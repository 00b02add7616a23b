"""Closing statements in Chinese: 答案是C, 答案：24, 故选C, 因此答案为 5."""

from __future__ import annotations

import re

_MARKS = r"[*_ \t]{0,6}"
#: Part of ``statements._STATEMENT`` (verbose); its group ``chinese`` is what was found.
STATEMENT = rf"""
    (?P<chinese>
      答案{_MARKS}(?:】|(?P<chinese_open>不|并不|并非|非|未必|可能|也许|或许|大概|似乎|是否|能|会)
        |(?:应该?|就|则|即|也)?(?:是|为|选(?:择|项)?)|即|等于|[：:=＝→])
      |(?:故|因此|所以|因而|从而|综上|本题|应)[，,]?[ ]?(?:本题)?(?:应该?)?选(?:择|项)?[是为]?{_MARKS}
        (?=[：:(（\s]{{0,4}}[A-Z])
      |正确的?(?:选项|是)[是为]?(?=[：:(（\s]{{0,4}}[A-Z])
    )[：:]?{_MARKS}"""

_CLAUSE_END = re.compile(r"[，,；;。！？!?\n]|\.\s")
_SENTENCE_END = re.compile(r"[。！？!?\n]|\.\s")
# Words that deny, suppose or leave open the clause that they stand in, or that have somebody else say it
_DENIAL = re.compile(
    r"不|非(?!常)|没|未|勿|别|难道|是否|可能|也许|或许|大概|怀疑|错|误|假|猜|以为|另|其他|其它|备选|干扰|候选|第.{1,3}[个种]"
    r"|他|她|有人|同学|老师|小[明红华刚丽]"
)
_CONDITION = re.compile(r"如果|假如|假设|假定|若|倘若|要是|除非|只有")
_CONCLUSION = re.compile(r"故|所以|因此|因而|从而|综上|∴|可知|可得")
_WHOSE = re.compile(r"(?:正确|最终|最后|题|题目|问题|问|我|我们|唯一|合理|方程|所求)的[ ]?$")
_MAX_SENTENCE = 600

_PUNCTUATION = str.maketrans({
    "。": ". ", "，": ", ", "；": "; ", "：": ": ", "！": "! ", "？": "? ", "（": "(", "）": ")", "、": ", ",
    "．": ". ",
})  # fmt: skip
_BETWEEN_LETTERS = re.compile(r"(?<=[A-Z)])[ ]?[和与及][ ]?(?=[(A-Z])")


def plain_punctuation(text: str) -> str:
    """``text`` with ASCII punctuation, and "and" between letters."""
    return text if text.isascii() else _BETWEEN_LETTERS.sub(" and ", text.translate(_PUNCTUATION))


def is_refused(text: str, found: re.Match[str]) -> bool:
    """Is the statement denied, supposed, left open, or somebody else's?"""
    if found["chinese_open"]:
        return True
    before = text[max(0, found.start() - _MAX_SENTENCE) : found.start()]
    clause = before[_last_end(_CLAUSE_END, before) :]
    if _DENIAL.search(clause) or (clause.rstrip().endswith("的") and not _WHOSE.search(clause)):
        return True
    concludes = _CONCLUSION.search(clause + found.group())
    return not concludes and _CONDITION.search(before[_last_end(_SENTENCE_END, before) :]) is not None


def _last_end(pattern: re.Pattern[str], text: str) -> int:
    return max((end.end() for end in pattern.finditer(text)), default=0)
