from __future__ import annotations

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers import Verdict, answer_problem, cluster_answers, kind_names, registry, verify
from tempo_megatron.verifiers.boxed import last_boxed
from tempo_megatron.verifiers.maths import parse
from tempo_megatron.verifiers.registry import kind_named
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS, CheckFailedError


def test_kinds_are_found_by_their_files() -> None:
    own = ["brackets", "choice", "exact", "guess_check", "int", "json_grid", "judge", "math", "reasoning_gym", "text"]
    assert kind_names() == own


def test_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(TempoError, match=r"unknown answer_type 'maths'; known kinds: brackets, choice, exact, "):
        verify("1", "1", "maths")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("no box", None),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} then cut off \boxed{2", "1"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\{5\}}", r"\{5\}"),
        (r"} stray { \boxed{6}", "6"),
        (r"\boxed{}", ""),
        (r"\boxed", None),
        (r"\boxed{never { closed}", None),
    ],
)
def test_last_boxed(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("500", "500", True),
        ("501", "500", False),
        ("500", "501", False),
        ("540", "500", False),
        ("12", "10", False),
        ("70", "73", False),
        ("  42.\n", "42", True),
        ("42..", "42", False),
        ("033", "33", True),
        ("33", "033", True),
        ("+7", "7", True),
        ("-7", "-7", True),
        ("-7", "7", False),
        ("-0", "0", True),
        ("1,234,567", "1234567", True),
        ("12,34", "1234", False),
        ("1 234", "1234", False),
        ("42.0", "42", False),
        ("4_2", "42", False),
        ("٤٢", "42", False),
        ("\uff14\uff12", "42", True),
        ("4²", "42", False),
        ("the answer is 42", "42", True),
        (r"the answer is \boxed{42}", "42", True),
        (r"\boxed{41} no, \boxed{ 42 }.", "42", True),
        (r"\boxed{42} no, \boxed{41}", "42", False),
        (r"\boxed{forty-two} 42", "42", False),
        (r"\boxed{42", "42", False),
        ("", "42", False),
    ],
)
def test_int(response: str, answer: str, correct: bool) -> None:
    assert verify(response, answer, "int").correct is correct


@given(st.integers(), st.integers())
def test_int_is_equality_of_integers(a: int, b: int) -> None:
    assert verify(str(a), str(b), "int").correct is (a == b)
    assert verify(rf"so \boxed{{{a:,}}}", str(a), "int").extracted == str(a)


def test_equal_integers_have_one_normal_form() -> None:
    forms = {verify(text, "5", "int").extracted for text in ("1000", "1,000", "+01000", r"\boxed{1000.}")}
    assert forms == {"1000"}


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("  new\n york ", "new york", True),
        ("New York", "new york", False),
        (r"I think \boxed{new  york}", "new york", True),
        ("", "x", False),
    ],
)
def test_exact(response: str, answer: str, correct: bool) -> None:
    assert verify(response, answer, "exact").correct is correct


ANSWER = "c4|37=a2"  # 3*12 = 10 and 7*4 = 2 (mod 13)


@pytest.mark.parametrize(
    ("response", "correct", "honest", "claims"),
    [
        ("c4;a2+", True, 1, 1),
        ("c4;a2-", True, 0, 0),  # a wrong verdict on a right check
        ("c4;a3-", True, 0, 0),  # a wrong check; only x decides
        ("5b;2c-", False, 1, 0),
        ("5b;a2+", False, 0, 1),  # wishful: the check copies the target
        ("5b;2c+", False, 0, 1),
    ],
)
def test_guess_check(response: str, correct: bool, honest: float, claims: float) -> None:
    verdict = verify(response, ANSWER, "guess_check")
    assert verdict.correct is correct
    assert verdict.extracted == response[:2]
    assert verdict.details == {"well_formed": 1.0, "honest": honest, "claims_correct": claims}


@pytest.mark.parametrize(
    "response", ["", "c4", "c4;a2", "c4;a2+ ", "c4;a2+\n", " c4;a2+", "C4;a2+", "c4;d2+", "c;4a2+", "c45;a+", "٣4;a2+"]
)
def test_guess_check_malformed(response: str) -> None:
    details = {"well_formed": 0.0, "honest": 0.0, "claims_correct": 0.0}
    assert verify(response, ANSWER, "guess_check") == Verdict(False, None, "malformed", details)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("1/2", "int"),
        ("٤٢", "int"),
        ("1" * (MAX_ANSWER_CHARS + 1), "int"),
        (" ", "exact"),
        ("c4", "guess_check"),
        ("c|37=a2", "guess_check"),
        ("c5|37=a2", "guess_check"),  # doesn't solve it
        ("c4|07=02", "guess_check"),  # not the only solution
    ],
)
def test_malformed_answers_are_told(answer: str, kind: str) -> None:
    assert answer_problem(answer, kind)
    with pytest.raises(TempoError) as error:
        verify("1", answer, kind)
    assert "\n" not in str(error.value)


def test_grid_cells_are_counted() -> None:
    answer = '{"House 1": {"Name": "Eric", "Drink": "tea"}, "House 2": {"Name": "Arnold", "Drink": "milk"}}'
    half = '{"solution": {"House 1": {"Name": "Eric", "Drink": "milk"}, "House 2": {"Name": "Arnold"}}}'
    assert verify(half, answer, "json_grid").details == {"cell_accuracy": 0.5}
    assert verify("no grid", answer, "json_grid").details == {"cell_accuracy": 0.0}
    assert verify(answer, answer, "json_grid").details == {"cell_accuracy": 1.0}


@pytest.mark.parametrize(
    ("kind", "extracted", "clusters"),
    [
        ("int", ["1", "2", None, "1"], [0, 1, None, 0]),
        ("math", ["1/2", r"\frac{\sqrt{4}}{4}", "3", "1/2", None, r"\sqrt{9}"], [0, 0, 1, 0, None, 1]),
        ("math", [None, None], [None, None]),
        ("choice", ["AB", "A", "AB"], [0, 1, 0]),
        ("exact", [], []),
        ("math", ["5", "5 cm", "5 m"], [0, 0, 1]),  # equal to every member, not only to the first
        ("math", ["5 cm", "5 m", "5"], [0, 1, 0]),
        # what can't be computed is compared as a text
        ("math", [r"\max(i,1)", r"\sqrt{2}", "2^{1/2}", r"\sqrt{3}", "7", r"\max(i,1)"], [0, 1, 1, 2, 3, 0]),
    ],
)
def test_clusters(kind: str, extracted: list[str | None], clusters: list[int | None]) -> None:
    assert cluster_answers(extracted, kind) == clusters


@pytest.mark.parametrize(
    ("texts", "clusters"),
    [
        (["bad", "a", "b"], [None, 0, 1]),
        (["a", "bad", "a"], [0, None, 0]),
        (["bad", "worse bad", "bad too", "bad again"], [None, None, None, None]),
        (["bad", "worse bad"], [0, None]),  # nobody can say which is at fault
        (["once", "a", "A"], [0, 1, 1]),
    ],
)
def test_a_failed_comparison_costs_one_text(
    texts: list[str], clusters: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal(a: str, b: str) -> bool:
        if "bad" in a + b:
            raise CheckFailedError("bad")
        return a.lower() == b.lower() or a == "once"  # not symmetric

    kind = dataclasses.replace(kind_named("exact"), equal=equal)
    monkeypatch.setattr(registry, "kind_named", lambda _: kind)
    assert cluster_answers(texts, "exact") == clusters


@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError])
def test_a_bound_of_the_worker_or_a_bug_is_no_property_of_a_text(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal(a: str, b: str) -> bool:
        raise error

    kind = dataclasses.replace(kind_named("exact"), equal=equal)
    monkeypatch.setattr(registry, "kind_named", lambda _: kind)
    with pytest.raises(error):
        cluster_answers(["a", "b"], "exact")


def test_a_parser_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr("latex2sympy2_extended.latex2sympy", no_memory)
    with pytest.raises(MemoryError):
        parse.warm_up.__wrapped__()


def test_an_answer_beyond_computing_leaves_other_texts_unverified() -> None:
    assert verify(r"\boxed{\int_0^1 x\,dx}", r"\int_0^1 x\,dx", "math").correct
    verdict = verify(r"\boxed{1/2}", r"\int_0^1 x\,dx", "math")
    assert not verdict.correct
    assert not verdict.verified
    assert "can't be computed" in verdict.reason


def test_a_monster_is_wrong_and_not_unverified() -> None:
    verdict = verify(r"\boxed{9^{9^{9^9}}}", "42", "math")
    assert (verdict.correct, verdict.verified) == (False, True)


LONG = 10**5
HOSTILE = {
    "digits": "7" * LONG,
    "commas": "7,777" * (LONG // 5),
    "unicode digits": "٤" * LONG,
    "open braces": r"\boxed{" + "{" * LONG,
    "open boxes": r"\boxed{" * (LONG // 7),
    "nested boxes": r"\boxed{" * (LONG // 8) + "}" * (LONG // 8),
    "many boxes": r"\boxed{8}" * (LONG // 9),
    "box and blanks": r"\boxed" + " " * LONG,
    "boxed digits": r"\boxed{" + "7" * LONG + "}",
    "boxed nines": r"\boxed{" + "9" * 301 + "}",
    "blanks": " " * LONG,
    "backslashes": r"\boxed" + "\\" * LONG,
    "semicolons": ";" * LONG,
    "surrogates": "\ud800" * LONG,
    "nulls": "\0" * LONG,
    "statements": "the answer is " * (LONG // 14),
    "letters": "A, " * (LONG // 3),
    "stars": "answer: " + "*" * LONG,
    "stated blanks": "answer:" + " " * LONG + "x",
    "few stated blanks": "answer:" + " " * 400 + "x",  # within what is looked at
    "few stated lines": "answer:" + "\n" * 400 + "x",
    "few stated parentheses": "the answer is " + "(" * 3000,
    "few stated stars": "the answer is " + "** " * 1000 + "C x",
    "phrases": "answer to " * (LONG // 10),
    "sentences": "no. " * (LONG // 4) + "answer is x",
    "headers": "answer\n" * (LONG // 7),
    "json open": '{"a":' * (LONG // 5),
    "json arrays": '{"a":' + "[" * LONG,
    "json numbers": '{"a":' + "9" * LONG,
    "json empty": "{}" * (LONG // 2),
    "deep parentheses": r"\boxed{" + "(" * 140 + "7" + ")" * 140 + "}",
    "deep fractions": r"\boxed{" + r"\frac{1}{1+" * 20 + "7" + "}" * 20 + "}",
    "shallow parentheses": r"\boxed{" + "(" * 7 + "8" + ")" * 7 + "}",
    "long sum": r"\boxed{" + "1+" * 145 + "1}",
    "long product": r"\boxed{" + "x" * 290 + "}",
    "long list": r"\boxed{" + "8," * 148 + "8}",
    "many roots": r"\boxed{" + r"\sqrt{8}" * 36 + "}",
    "many letters": r"\boxed{" + "abcdefgh" * 36 + "}",
    "commands": r"\boxed{" + r"\frac" * 58 + "}",
    "unknown commands": r"\boxed{" + r"\foo{8}" * 40 + "}",
    "powers": r"\boxed{" + "8^" * 100 + "8}",
    "braced powers": r"\boxed{" + "9^{" * 7 + "9" + "}" * 7 + "}",
    "factorials": r"\boxed{9" + "!" * 200 + "}",
    "minus signs": r"\boxed{" + "-" * 299 + "}",
    "relations": r"\boxed{" + "x<" * 100 + "x}",
    "plus minus": r"\boxed{" + r"\pm 7" * 50 + "}",
    "units": r"\boxed{8 " + "cm " * 90 + "}",
    "texts": r"\boxed{" + r"\text{a}" * 37 + "}",
    "ands": r"\boxed{" + "8 and " * 45 + "8}",
    "matrix": r"\boxed{\begin{pmatrix}" + "8&" * 100 + r"8\end{pmatrix}}",
}
KNOWN = {
    "int": "7",
    "brackets": "] }",
    "exact": "the one",
    "guess_check": ANSWER,
    "math": "7",
    "choice": "C",
    "text": "the one",
    "json_grid": '{"House 1": {"Name": "Eric"}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_cheap_and_wrong(name: str) -> None:
    kind_named("math").warm_up()
    start = time.process_time()
    for kind, answer in KNOWN.items():
        verdict = verify(HOSTILE[name], answer, kind)
        assert not verdict.correct
        assert len(verdict.extracted or "") <= MAX_ANSWER_CHARS
    assert time.process_time() - start < 5  # a quadratic scan takes minutes


@pytest.mark.parametrize("kind", sorted(KNOWN.keys() - {"math"}))
@given(text=st.text() | st.text(alphabet=r"\boxed{}ABC(),. answer is:*42;{\"'" + "\n"))
@settings(deadline=2000, max_examples=60)
def test_any_text_has_a_verdict(kind: str, text: str) -> None:
    verdict = verify(text, KNOWN[kind], kind)
    assert kind_named(kind).extract(text) == verdict.extracted
    assert not verdict.correct or verdict.extracted is not None
