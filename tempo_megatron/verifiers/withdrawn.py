"""Does a response take back what it has just given as its answer?  "No wait, that is wrong." """

from __future__ import annotations

import re

_IT = r"\b(?:that|this|it|which|(?:the|my|this|that)[ ](?:answer|result|value|guess|number|box|solution))"
_SOME = r"(?:[ ][a-z]{1,12}){0,2}?[ ]"
# Every repetition is bounded: a response must not make the search slow
_WITHDRAWN = re.compile(
    rf"""
    \A\.[\s*_$\\\])]{{0,8}}(?:\?
      |(?:is|was|seems|must[ ]be|would[ ]be|can(?:not|['\u2019]t)[ ]be)[ ](?:[a-z]{{1,12}}[ ]){{0,2}}?
        (?:not|wrong|incorrect|impossible|mistaken|false)\b
      |(?:is|was|does|ca)n['\u2019]t\b|does[ ]not\b|(?:是)?(?:错|不对|不正确)|不是)
    | (?:[.!?,;:\n)\u2014\u2013-]|\bbut)[\s*_"$\\\])]{{0,8}}
      (?:no(?=[,.!;:]|[ ]wait\b|[ ](?:that|this|it)\b)|nope\b|wait\b|hm{{1,6}}\b|hold[ ]on\b|oops\b|scratch[ ]that\b
        |(?:sorry|actually),?[ ](?:no|wait|that|this|it|i)\b|correction\b|on[ ]second[ ]thoughts?\b)
    | {_IT}(?:[ ](?:is|was|seems|looks|must[ ]be|can[ ]?not[ ]be|can['\u2019]t[ ]be)|['\u2019]s)
      {_SOME}?[ ]?(?:wrong|incorrect|mistaken|an?[ ]error|a[ ]mistake)\b
    | {_IT}(?:[ ](?:is|was)(?:n['\u2019]t|[ ]not)|['\u2019]s[ ]not|[ ]can(?:not|['\u2019]t|[ ]not)[ ]be
        |[ ]does(?:n['\u2019]t|[ ]not)[ ](?:seem|look))
      {_SOME}?[ ]?(?:right(?![ -](?:angle|triang|side|hand|isos))|correct|the[ ]answer)\b
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


def is_withdrawn(after: str) -> bool:
    """Does ``after``, what follows an answer, say that it is wrong?  After a box it begins with a full stop.

    In linear time.
    """
    return _WITHDRAWN.search(after) is not None
