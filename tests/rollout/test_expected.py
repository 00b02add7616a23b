"""What is expected to be long, by what is known of it."""

from __future__ import annotations

from tempo_megatron.rollout.expected import ExpectedLengths
from tempo_megatron.rollout.prompts import PromptDraw


def draw(record: str, prompt: int, source: str = "", *, labeled: bool = True) -> PromptDraw:
    return PromptDraw(record, [1] * prompt, labeled, 0, source)


def test_without_knowledge_the_longest_prompt_comes_first() -> None:
    assert ExpectedLengths().order([draw("a", 3), draw("b", 9), draw("c", 9), draw("d", 5)]) == [1, 2, 3, 0]


def test_a_record_is_known_by_itself_then_by_its_source_then_by_all() -> None:
    expected = ExpectedLengths()
    expected.observe([draw("a", 3, "x"), draw("b", 3, "x"), draw("c", 3, "y", labeled=False)], [100, 20, 10])
    prompts = [
        draw("new", 99, "y", labeled=False),  # 10
        draw("b", 3, "x"),  # 20
        draw("other", 1, "x"),  # 60
        draw("stranger", 3, "x", labeled=False),  # 35, as all sources
        draw("a", 3, "x"),  # 100
    ]
    assert expected.order(prompts) == [4, 2, 3, 1, 0]


def test_means_follow_a_policy_that_moves() -> None:
    expected = ExpectedLengths()
    for _ in range(50):
        expected.observe([draw("shrinks", 1), draw("stays", 1)], [1000, 500])
    for _ in range(5):
        expected.observe([draw("shrinks", 1), draw("stays", 1)], [10, 500])
    assert expected.order([draw("shrinks", 1), draw("stays", 1)]) == [1, 0]
