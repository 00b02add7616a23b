"""Reasoning and answer told apart, for every kind of answer."""

from __future__ import annotations

import time

import pytest

from tempo_megatron.verifiers import verify
from tempo_megatron.verifiers.reasoning import answer_part, open_tag
from tempo_megatron.verifiers.registry import extract

TAGS = [
    ("<think>", "</think>"),
    ("<THINK>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("[THINK]", "[/THINK]"),
]
GIVEN = [
    ("int", "73", r"\boxed{73}", r"\boxed{11}"),
    ("math", r"\frac12", r"\boxed{1/2}", r"\boxed{2}"),
    ("choice", "C", "The answer is C.", "The answer is D."),
    ("text", "yes", "The answer is yes.", "The answer is no."),
    ("exact", "a b", r"\boxed{a b}", r"\boxed{b}"),
    ("brackets", "] }", r"\boxed{]\}}", r"\boxed{]}"),
    ("json_grid", '{"House 1": {"Name": "Eric"}}', '{"House 1": {"Name": "Eric"}}', '{"House 1": {"Name": "Bob"}}'),
]


@pytest.mark.parametrize(("opened", "closed"), TAGS)
@pytest.mark.parametrize(("kind", "answer", "right", "wrong"), GIVEN, ids=[k for k, *_ in GIVEN])
def test_only_what_follows_the_reasoning_is_an_answer(
    kind: str, answer: str, right: str, wrong: str, opened: str, closed: str
) -> None:
    assert verify(f"{opened}{wrong}? no.{closed}\n\n{right}", answer, kind).correct
    assert verify(f"{wrong}? no.{closed}\n\n{right}", answer, kind).correct  # the prompt ends with the open tag
    assert verify(f"{opened}\n{closed}\n{right}", answer, kind).correct
    for guess in (
        f"{opened}{right}. No wait,",  # cut off
        f"{opened}{right}{closed}\n\n{wrong}",
        f"{opened}{right}{closed}\n\nI can't say.",
        f"{opened}{right}{closed}",
        f"{right}{closed}",
        f"{right}\n{opened}Let me check this again. It",
        f"{opened}{right}{closed}{right}{opened}",
    ):
        verdict = verify(guess, answer, kind)
        assert (verdict.correct, verdict.verified) == (False, True)
        assert extract(guess, kind) == verdict.extracted


def test_a_response_without_tags_is_all_answer() -> None:
    assert answer_part(r"I think \boxed{5} <b>") == r"I think \boxed{5} <b>"


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("<\uff5cAssistant\uff5c><think>\n", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),  # thinking is switched off
        ("Put your thoughts into <think> </think>.\nassistant\n", ""),
        ("<think> is a tag. assistant:", ""),
        ("assistant\n", ""),
        ("", ""),
    ],
)
def test_the_tag_that_the_prompt_opens(prompt: str, tag: str) -> None:
    assert open_tag(prompt) == tag
    assert (answer_part(open_tag(prompt) + "a guess") == "") is bool(tag)


def test_many_tags_are_read_in_linear_time() -> None:
    start = time.process_time()
    for text in ("<think>", "</think>", "<think", "<|begin_of_", "<thinking </"):
        answer_part(text * 100_000)
    assert time.process_time() - start < 5
