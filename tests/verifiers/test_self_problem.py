"""What a known answer is asked at preparation: would a response that gives it be right?"""

from __future__ import annotations

import pytest

from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers import self_problem


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("42", "int"),
        (r"\frac{1}{2}", "math"),
        (r"so \boxed{5}", "math"),
        (r"9^{9^{9^9}}", "judge"),
        ("ABD", "choice"),
        ("(C)", "choice"),
        ("yes", "text"),
        ("] ) }", "brackets"),
        ("new york", "exact"),
        ("a}", "exact"),
        ('{"House 1": {"Name": "Eric"}}', "json_grid"),
        ("c4|37=a2", "guess_check"),
    ],
)
def test_a_good_answer_has_no_problem(answer: str, kind: str) -> None:
    assert self_problem(answer, kind) is None


@pytest.mark.parametrize(
    ("answer", "kind", "problem"),
    [
        ("1/2", "int", "not an integer"),
        ("a}", "text", "would not be right"),
        (r"see \boxed{x}", "exact", "would not be right"),
        (r"\int_0^1 x\,dx", "math", "can't be computed"),
    ],
)
def test_a_bad_answer_is_told(answer: str, kind: str, problem: str) -> None:
    assert problem in (self_problem(answer, kind) or "")


def test_unknown_kind() -> None:
    with pytest.raises(TempoError, match="unknown answer_type"):
        self_problem("1", "maths")
