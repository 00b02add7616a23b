r"""Reasoning and answer told apart: only what a response says after its reasoning can be its answer.

Reasoning models write ``<think> ... </think>`` before the answer.  A guess in there is often withdrawn, and a response
that is cut off in its reasoning has given no answer at all.
"""

from __future__ import annotations

import re
from collections import deque

_NAMES = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|seed:think)"
#: Qwen3, DeepSeek-R1 and most others; Sky-T1; Kimi; Magistral.
_TAG = re.compile(
    rf"<(?P<close>/)?{_NAMES}[ ]?>|<\|(?:begin|(?P<end>end))_of_thought\|>|\u25c1(?P<kimi>/)?think\u25b7"
    r"|\[(?P<magistral>/)?THINK\]",
    re.IGNORECASE,
)
_TAIL = 200  # characters of a prompt in which an open tag is looked for


def answer_part(response: str) -> str:
    """``response`` after its last closing tag, empty where reasoning is still open; all of it where it has no tags.

    The last tag decides: a second block that was opened and not closed may take back what was said before it.
    """
    last = _last_tag(response)
    if last is None:
        return response
    return response[last.end() :] if _closes(last) else ""


def open_tag(prompt: str) -> str:
    """The reasoning tag that ``prompt``, as the template renders it, ends with; empty where it ends with none.

    Put before the response, it tells that the response begins in the middle of reasoning, though it holds no open tag.
    """
    tail = prompt[-_TAIL:].rstrip()
    last = _last_tag(tail)
    return last.group() if last is not None and last.end() == len(tail) and not _closes(last) else ""


def is_tag(token: str) -> bool:
    """Whether a token's text is a tag that opens or closes reasoning."""
    return _TAG.fullmatch(token.strip()) is not None


def _last_tag(text: str) -> re.Match[str] | None:
    found = deque(_TAG.finditer(text), maxlen=1)
    return found[0] if found else None


def _closes(tag: re.Match[str]) -> bool:
    return any(tag.groups())
