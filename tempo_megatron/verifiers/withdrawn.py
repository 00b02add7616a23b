"""Does a response take back what it gives as its answer?  "No wait, that is wrong", "it isn't 5"."""

from __future__ import annotations

import re

_IT = r"\b(?:that|this|it|which|(?:the|my|this|that)[ ](?:answer|result|value|guess|number|box|solution))"
_SOME = r"(?:[ ][a-z]{1,12}){0,2}?[ ]"
#: What takes an answer back, said right behind it; of another number it may be said further on.
_REFUTED = r"""(?:fail(?:s|ed)|contradicts|violates|leads[ ]to[ ]a[ ]contradiction|makes[ ]no[ ]sense
  |(?:is|was)[ ](?:impossible|absurd|false|untrue|a[ ]contradiction|off[ ]by))\b"""
# Every repetition is bounded: a response must not make the search slow
_WITHDRAWN = re.compile(
    rf"""
    \A\.[\s*_$\\\])]{{0,8}}(?:[?？]
      |(?:is|was|seems|(?:must|would|should|has[ ]to|can(?:not|['\u2019]t))[ ]be)[ ](?:[a-z]{{1,12}}[ ]){{0,2}}?
        (?:not|wrong|incorrect|impossible|mistaken|false|invalid|absurd|excluded|rejected|discarded|ruled[ ]out
          |off[ ]by|(?:mistake|error|trap|guess|attempt)(?=[,.;!?]|\Z))\b
      |(?:is|was|seems)[ ](?:far[ ]|much[ ])?too\b
      |(?:is|was|does|ca)n['\u2019]t\b|can[ ]?not[ ]be\b|does[ ]not\b
      |(?:[.,;]?\s{{0,3}}(?:which|that|this|it)[ ])?{_REFUTED}
      |[.,;]?\s{{0,3}}(?:contradiction|(?:that|it)['\u2019]s[ ]off[ ]by)\b
      |(?:[(\[:]|->|\u2192)\s{{0,2}}(?:wrong|incorrect|false)\b|[\u2717\u2718\u274c]|\u00d7(?=\s{{0,9}}\Z)
      |(?:是)?(?:错|不对|不正确)|不是|吗|[，,]?\s?[（(]?(?:应?舍去|不成立|不符合|不合题意|不满足|错)
      |[，。,]?(?:但|可)?是?这?与[^。\n]{{0,12}}矛盾)
    | \A\.?[^.!?\n]{{0,80}}[.!?]?[^.!?\n]{{0,80}}\bbut[ ](?:it|this|that)[ ]{_REFUTED}
    | \b(?:ignore|disregard|forget|retract|withdraw)[ ]
      (?:that|this|it|the[ ]above|(?:my|the|this|that)[ ](?:[a-z]{{1,12}}[ ])?answer)(?=[.,;!]|\Z)
    | \bnever[ ]?mind\b|\bmy[ ]bad\b|\b(?:i|we)[ ](?:have[ ])?mis(?:read|counted|calculated|interpreted|understood)\b
    | \b(?:do[ ]not|don['\u2019]t)[ ](?:think|believe)[ ](?:that[ ])?(?:this|that|it)\b
    | \bnot[ ]sure[ ](?:(?:that|if|whether)[ ])?(?:this|that|it)[ ]is\b
    | (?:[.;\n]\s{{0,4}}|,[ ])(?:edit:|i[ ]mean\b|actually,?[ ](?:[-+$(\\0-9]|\S{{1,20}}\s{{0,9}}\Z))
    | (?:[.!?,;:\n)\u2014\u2013-]|\bbut)[\s*_"$\\\])]{{0,8}}
      (?:no(?=[,.!;:]|[ ]wait\b|[ ](?:that|this|it)\b)|nope\b|wait\b|hm{{1,6}}\b|hold[ ]on\b|oops\b|scratch[ ]that\b
        |(?:sorry|actually),?[ ](?:no|wait|that|this|it|i)\b|correction\b|on[ ]second[ ]thoughts?\b)
    | {_IT}(?:[ ](?:is|was|seems|looks|must[ ]be|can[ ]?not[ ]be|can['\u2019]t[ ]be)|['\u2019]s)
      {_SOME}?[ ]?(?:wrong|incorrect|mistaken|an?[ ]error|a[ ]mistake)\b
    | {_IT}(?:[ ](?:is|was)(?:n['\u2019]t|[ ]not)|['\u2019]s[ ]not|[ ]can(?:not|['\u2019]t|[ ]not)[ ]be
        |[ ]does(?:n['\u2019]t|[ ]not)[ ](?:seem|look))
      {_SOME}?[ ]?(?:right(?![ -](?:angle|triang|side|hand|isos))|correct|(?:true|possible|valid)(?=[.,;!?]|\Z)
        |(?:the|my|our)[ ](?:[a-z]{{1,12}}[ ])?answer|what[ ](?:was|is|the|we))\b
    | {_IT}[ ](?:(?:does|did)(?:n['\u2019]t|[ ]not)|fails[ ]to)[ ](?:work|hold|fit|check|satisfy|match)
    | \b(?:i|we)(?:[ ]have|['\u2019]ve)?[ ](?:made|make)[ ]an?[ ](?:[a-z]{{1,12}}[ ])?(?:mistake|error)\b
    | \b(?:i|we)(?:[ ]was|[ ]were|['\u2019]m|[ ]am)[ ](?:wrong|mistaken)\b
    | \blet(?:['\u2019]s|[ ](?:me|us))[ ](?:re-?(?:consider|think|do|compute|calculate|examine|work|start)
        |try[ ](?:again|another|something)|start[ ]over)
    | \bi[ ](?:take|took)[ ](?:it|that)[ ]back\b
    | (?:[。，,.!！?？;；\n]|\A)\s{{0,4}}(?:不对|不[，,]|等等|等一下|错了)
    | (?:这|那|此|上面|以上)(?:个|样|的)?(?:答案|结果|值)?(?:是|就)?(?:不对|错|不正确)
    | 算错|重新(?:算|计算|考虑|来)|再想想
    """,
    re.VERBOSE | re.IGNORECASE,
)


_MAX_BEFORE = 120
_DENIED = re.compile(
    r"""(?:
      (?:\b(?:not|never|neither|nor|cannot|instead[ ]of|rather[ ]than|rul(?:e|ed|ing)[ ]out
        |(?:exclud|reject|discard|eliminat)(?:e|es|s|ed|ing)?)|n['\u2019]t)
      (?:\s(?:be|equals?|to|the|an?|answer|option|choice|value|possibly|simply|exactly))*
    | \bbetween\s[^.\n\\]{1,30}\sand|\b(?:wrong|incorrect|false|mistaken|naive)\s(?:answer|result|guess)
      (?:\s(?:is|was|would\sbe|of))?
    | \b(?:if|whether|suppos(?:e|ing)|assum(?:e|ing)|imagine)\b
      (?:(?!\bthen\b)[^.,;:!?\n\\]){0,40}\b(?:were|was|(?:answer|result|it)\sis)
    | \b(?:whether|suppose|assume|imagine)(?:\sthat)?
    | \b(?:maybe|perhaps|possibly|(?:may|might|could)\s(?:well\s)?be)
    | (?:\A|[.!?\n]\s{0,4})(?:is|was)\s(?:it|the\sanswer)
    | \b(?:wrong|incorrect|mistake|error|tempting|tempted)\sto\s(?:say|answer|conclude|think|write|choose|guess)
    | \b(?:first|initial)\s(?:guess|thought|attempt)\s(?:is|was)
    | \b(?:at\sfirst|initially),?\s(?:(?:i|we)\s)?(?:thought|got|found|guessed|obtained)
    | \b(?:could|might|would)\s(?:think|guess|expect|say)\s(?:that\s)?(?:it['\u2019]s|(?:it|the\sanswer)\sis)
    | 不(?:是|为|等于|可能(?:是|为)|应(?:是|为|选)|选)|并非|而非|排除|错误的?(?:答案|结果)(?:是|为)?
    | 假设(?:是|为)?|(?:(?<![大小有])可能|也许|或许|大概|是否)(?:是|为)?
    )[\s:：$*_"'(\[{\\]{0,8}\Z""",
    re.VERBOSE | re.IGNORECASE,
)


_NUMBER = r"[-\u2212]?[0-9](?:[0-9,./]{0,40}[0-9])?"
_VALUE = rf"(?:{_NUMBER}|\(?\b[A-J]\b\)?)"
#: "It is 25." as a sentence of its own.
_OTHER = re.compile(
    rf"""(?:[.!?:;,\n\u2026。！？；，]|\A)[\s*_]{{0,8}}
      (?:(?:so|then|therefore|thus|hence|actually|in[ ]fact|indeed|now|oh|ah|ok|okay|yes|and|but|rather),?[ ]){{0,3}}
      (?:it|the[ ](?:[a-z]{{1,12}}[ ])?(?:value|result|number|total|sum|option|choice|letter)
        |i[ ](?:now[ ])?(?:say|choose))
      (?:['\u2019]s|[ ](?:is|was|equals|=|(?:should|must|has[ ]to|would)[ ]be))?
      [ ](?:(?:really|actually|in[ ]fact|therefore|thus|then|rather|option|choice|just|simply)[ ]){{0,2}}
      [$*_"'`\\(\[]{{0,6}}(?P<value>{_VALUE})[$*_"'`\\)\]]{{0,6}}[ ]?(?=[.!;,\n](?![0-9])|\Z)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:double[- ]?check|re-?check|re-?verify|re-?count|redo|(?:check|verify|look|count|think)[a-z]{0,3}"
    r"(?:\s(?:it|this|that))?\sagain)",
    re.IGNORECASE,
)
_CASED_VALUE = re.compile(rf"{_NUMBER}|(?<![A-Za-z])[A-J](?![A-Za-z])")


def gives_another(after: str, value: str) -> bool:
    """Does ``after``, what follows the answer ``value``, end in another number or letter?

    "It is 25." as a sentence, or, after a doubt ("let me double-check"), the last number of all.  In linear time.
    """
    mine = _values(value)
    if not mine:
        return False
    said = [found["value"] for found in _OTHER.finditer(after)]
    if said and _values(said[-1]) and not _values(said[-1]) <= mine:
        return True
    doubt = _DOUBT.search(after)
    last = _CASED_VALUE.findall(after, doubt.end())[-1:] if doubt else []
    return bool(last) and last[0][-1].isdigit() == any(v[-1].isdigit() for v in mine) and not _values(last[0]) <= mine


def _values(text: str) -> set[str]:
    """The numbers and option letters that are written in ``text``."""
    return {found.replace(",", "").replace("\u2212", "-").lstrip("(") for found in _CASED_VALUE.findall(text)}


def is_denied(before: str) -> bool:
    """Does ``before``, what leads to a box, deny or only suppose it?  "It isn't", "we can rule out", "if it were"."""
    return _DENIED.search(before[-_MAX_BEFORE:]) is not None


def is_withdrawn(after: str) -> bool:
    """Does ``after``, what follows an answer, say that it is wrong?  After a box it begins with a full stop.

    In linear time.
    """
    return _WITHDRAWN.search(after) is not None
