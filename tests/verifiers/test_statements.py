"""Closing statements for every kind that reads them: what is stated counts, what is denied or taken back does not."""

from __future__ import annotations

from itertools import product

import pytest

from tempo_megatron.verifiers import verify

#: (known answer, spellings of it, other answers)
KINDS = {
    "int": ("24", ["24", "$24$", "**24**", r"\(24\)", "`24`", "24 cm"], ["25", "-24", "24.5", "240", "24^2"]),
    "math": (r"\frac12", ["1/2", r"$\frac{1}{2}$", "**0.5**"], ["1/3", "-1/2", r"$\frac12+1$"]),
    "choice": ("C", ["C", "(C)", "**C**", "option C"], ["D", "C or D", "CD"]),
    "text": ("yes", ["yes", "**yes**", '"Yes"'], ["no", "yes and no"]),
    "brackets": ("] )", ["] )", "`] )`", "])"], ["] ]", ") ]", "]"]),
}
BEFORE = ["", "So ", "Hence, ", "2+3=5 is not 6. So ", "In conclusion, ", "Step 3: done.\n"]
STATEMENTS = [
    *(
        "the answer is {}",
        "the final answer is {}",
        "the correct answer is: {}",
        "my answer is {}",
        "the answer must be {}",
    ),
    *("\nAnswer: {}", "\n**Answer:** {}", "\n答案是{}", "\n答案：{}", "\n因此答案为 {}", "\n最终答案: {}"),
]
AFTER = ["", ".", ".\n\nI hope this helps."]
DOUBTS = [
    *(
        "I don't think {}",
        "It is false that {}",
        "If x=3 then {}",
        "Suppose {}",
        "I doubt that {}",
        "He thinks {}",
        "{}?",
    ),
    *("{}. No, that's wrong.", "{}. Wait, no.", "{}. Hmm, this is incorrect.", "{}.\nLet me reconsider.", "{}. Or 99."),
    *("{}. I made a mistake.", "{}. Scratch that.", "{} but not always", "{}。不对", "<think>{}.", "{}</think>"),
]
DENIED = [
    *("the answer is not {}.", "the answer isn't {}.", "the answer might be {}.", "the wrong answer is {}.", "not {}"),
    *(
        "the answer is neither {}.",
        "another answer is {}.",
        "答案不是{}",
        "答案可能是{}",
        "如果答案是{}",
        "错误的答案是{}",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stated_counts(kind: str) -> None:
    answer, spellings, others = KINDS[kind]
    for before, statement, after in product(BEFORE, STATEMENTS, AFTER):
        for text in spellings:
            response = before + statement.format(text) + after
            assert verify(response, answer, kind).correct, response
        for text in others:
            response = before + statement.format(text) + after
            assert not verify(response, answer, kind).correct, response


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_denied_or_taken_back_does_not(kind: str) -> None:
    answer, spellings, _ = KINDS[kind]
    english = [s for s in STATEMENTS if s.startswith("the")]
    doubts = [doubt.format(statement) for doubt, statement in product(DOUBTS, english)]
    for statement, text in product([*doubts, *DENIED], spellings):
        verdict = verify(statement.format(text), answer, kind)
        assert (verdict.correct, verdict.verified) == (False, True), statement.format(text)


@pytest.mark.parametrize("kind", ["int", "math"])
@pytest.mark.parametrize(
    ("after", "stands"),
    [
        ("", True),
        (". So our answer is correct.", True),
        ("\nWe check our answer: 2 * 12 = 24.", True),
        (". Let me verify: 2 * 12 = 24.", True),
        (". It is not a right triangle.", True),
        (". The answer is not 24.", False),
        (". Actually, the answer is 25.", False),
        (". Wait, let me think.", False),
        (". No, this is not right.", False),
        ("。不对，", False),
        (r" \boxed{25}", False),
        ("? No.", False),
        (" is wrong, since 24 is even.", False),
        ("$ isn't prime, so no.", False),
        ("$ is not it.", False),
        (" is right.", True),
        (" is the number of ways.", True),
    ],
)
def test_a_box_and_what_follows(kind: str, after: str, stands: bool) -> None:
    assert verify(rf"So \boxed{{24}}{after}", "24", kind).correct is stands


BOXED = {"int": "24", "math": r"\frac12", "choice": "C", "text": "yes", "brackets": "] )", "exact": "a b"}
#: Around a box: what denies it, only supposes it, or leaves it open, right before or right behind it.
UNSTATED = [
    *(
        "The answer isn't {}.",
        "The answer is definitely not {}",
        "So it's not {}.",
        "It cannot be {}",
        "We can rule out {}",
    ),
    *("The wrong answer is {}.", "If it were {}, 0 = 1.", "Suppose the answer were {}. Then 0 = 1.", "Assume {}"),
    *("It might be {}.", "Maybe {}", "Is it {}", "I can't tell whether it is {}.", "My first guess was {}."),
    *("It would be a mistake to say {}.", "Instead of {}, another", "不是{}", "可能是{}", "排除{}"),
    *("{} cannot be the answer.", "{} is only a guess.", "{} was my first guess, but it fails.", "{} is too large."),
    *("{} fails.", "{} is off by one.", "{} is ruled out.", "{} must be rejected.", "{}: false.", "{} \u2717"),
    *("{}, which is impossible.", "{}. This contradicts the given.", "{}. But this contradicts the assumption."),
    *("{}. This is not the final answer.", "{}. This is not what was asked.", "{}. I don't think this is right."),
    *(
        "{}. Disregard this answer.",
        "{}. Never mind.",
        "{}. I misread the question.",
        "{}. Edit: 7",
        "{}. Actually, 7.",
    ),
    *("{}？不是。", "{}不成立。", "{}（舍去）", "{}，错。", "{}。但这与题意矛盾。"),
]
STATED = [
    *(
        "The answer is not 17 but {}.",
        "If x = 3 then the answer is {}.",
        "It holds if and only if {}.",
        "{} is the answer.",
    ),
    *("This is not hard: {}", "We cannot do better, so it is {}.", "We reject the negative root and keep {}."),
    *("Tom initially has {}", "The largest possible one is {}.", "{} is our final answer.", "{}, as required."),
    *("{}. If it were larger, this contradicts the assumption.", "{}. It is not possible to do better.", "{} \u2713"),
    *(
        "{}. The others don't work.",
        "{}.\nActually, one can verify this.",
        "不难得到{}。",
        "舍去负根，得{}。",
        "{}。所以答案正确。",
    ),
]


@pytest.mark.parametrize("kind", BOXED)
@pytest.mark.parametrize("around", UNSTATED)
def test_a_box_that_the_words_around_it_deny(kind: str, around: str) -> None:
    verdict = verify(around.format(rf"\boxed{{{BOXED[kind]}}}"), BOXED[kind], kind)
    assert (verdict.correct, verdict.verified) == (False, True)


@pytest.mark.parametrize("kind", BOXED)
@pytest.mark.parametrize("around", STATED)
def test_a_box_that_the_words_around_it_leave(kind: str, around: str) -> None:
    assert verify(around.format(rf"\boxed{{{BOXED[kind]}}}"), BOXED[kind], kind).correct
