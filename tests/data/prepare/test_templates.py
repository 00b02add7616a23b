from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.data.prepare.templates import BUILT_IN, load_template, render
from tempo_megatron.errors import TempoError


def test_file_may_hold_latex_braces(tmp_path: Path) -> None:
    path = tmp_path / "olmo.txt"
    path.write_text("Say \\boxed{answer}, not \\frac{a}{b}:\n{problem}\n")
    assert render(load_template(str(path)), {"problem": "{options}?"}) == (
        "Say \\boxed{answer}, not \\frac{a}{b}:\n{options}?"
    )


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("solve it", r"t.txt: no field {problem}; a template needs it"),
        ("{problem} {answer}", r"t.txt: field {answer} is unknown; known: {problem}, {options}, {shape}"),
        (b"\xff{problem}", "not UTF-8"),
        (None, r"No such file or directory; expected a text file or one of math, choice, "),
    ],
)
def test_unusable_template_is_refused(content: str | bytes | None, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TempoError, match=wrong):
        load_template(str(path))


def test_template_and_problem_must_have_the_same_fields() -> None:
    with pytest.raises(TempoError, match=r"no field {options}, without which"):
        render(BUILT_IN["math"], {"problem": "p", "options": "o"})
    with pytest.raises(TempoError, match=r"field {shape} has no value here; this problem has {problem}"):
        render(BUILT_IN["grid"], {"problem": "p"})


@given(st.text("ab{}\\ problem"))
def test_problem_comes_through_unchanged(problem: str) -> None:
    assert render(BUILT_IN["plain"], {"problem": problem}) == problem
