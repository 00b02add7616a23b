"""Which kind checks a source's answers, by column; and that right answers are then right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tempo_megatron.data.answer_kinds import check_sources, integer_of, is_mathematical, kind_of_column
from tempo_megatron.data.prompts import read_eval_answers, read_eval_set, read_prompts
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.registry import verify


def verl(path: Path, truths: list[Any], source: str = "s", labeled: bool | None = None) -> str:
    reward = [{"style": "rule", "ground_truth": truth, "is_labeled": labeled} for truth in truths]
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(len(truths))]
    pq.write_table(pa.table({"data_source": [source] * len(truths), "prompt": prompts, "reward_model": reward}), path)
    return str(path)


def plain(path: Path, answers: list[Any], source: str = "s", kind: str | None = None, labeled: bool = True) -> str:
    count = len(answers)
    columns = {
        "id": [f"{path.stem}-{i}" for i in range(count)],
        "source": [source] * count,
        "prompt": [f"question {i}" for i in range(count)],
        "answer": answers,
        "labeled": [labeled] * count,
    }
    pq.write_table(pa.table(columns if kind is None else {**columns, "answer_type": [kind] * count}), path)
    return str(path)


COLUMNS: list[tuple[list[Any], str]] = [
    ([142.0, 36.0, 4.0], "int"),  # AMC, from a column of floats
    (["142.0", "36.0"], "int"),
    (["033", "204", "7"], "int"),
    (["$142$", r"\(7\)", r"\boxed{12}", "$\\boxed{3}$"], "int"),
    (["1,000", "-3", "+4", "\N{MINUS SIGN}5", "12,345,678", "9{,}500"], "int"),
    ([72, 18], "int"),
    ([142.0, 0.5], "math"),
    ([r"\dfrac{1}{2}", r"\frac{3}{4}", "7"], "math"),
    (["2x+1", "(0, 1)", r"\text{Monday}", "Evelyn", r"5\text{ cm}"], "math"),
    (["x", "7"], "math"),
    (list("ABCDAD"), "choice"),
    (["(A)", "(C)", "B."], "choice"),
    (["A", "ACD", "BD"], "choice"),
    (["A,C", "A, B, D", "C"], "choice"),
    (["yes", "No", "yes"], "text"),
    ([r"\text{yes}", r"\text{no}"], "text"),
    (["Henry Ford", "Room 101 on the left", "Ann"], "text"),
    (["2024-01-31", "05/01/2021"], "text"),
    (["ABBA", "DAB"], "text"),  # letters, but none that options could have together
    (["def f(x):\n    return x", "print(1)\nprint(2)"], "exact"),
]


@pytest.mark.parametrize(("truths", "kind"), COLUMNS)
def test_kind_of_a_column_accepts_its_answers(truths: list[Any], kind: str, tmp_path: Path) -> None:
    found = read_prompts([verl(tmp_path / "a.parquet", truths)])
    assert [r.answer_type for r in found.records] == [kind] * len(truths)
    [note] = found.notes
    assert note.startswith(f"answers of source 's': kind {kind}, {len(truths)} records (")
    for record, truth in zip(found.records, truths, strict=True):
        assert record.answer is not None
        assert verify(f"So it is \\boxed{{{record.answer}}}.", record.answer, kind).correct
        if isinstance(truth, float):
            assert verify(f"\\boxed{{{truth:g}}}", record.answer, kind).correct
    assert [r.answer_type for r in read_prompts([plain(tmp_path / "b.parquet", truths)]).records] == [kind] * len(
        truths
    )


def test_amc_answers_are_right_as_anybody_writes_them(tmp_path: Path) -> None:
    """Floats that stand for integers: 142 was wrong for 142.0."""
    path = verl(tmp_path / "amc.parquet", [f"{i}.0" for i in range(83)], "AMC-TTT")
    answers = read_eval_answers([path])
    assert len(answers) == 83
    assert all(verify(f"\\boxed{{{i}}}", *answers[f"amc/{i}"]).correct for i in range(83))
    assert not any(verify(f"\\boxed{{{i + 1}}}", *answers[f"amc/{i}"]).correct for i in range(83))


def test_one_kind_for_all_rows_of_a_source_and_each_source_its_own(tmp_path: Path) -> None:
    files = [
        verl(tmp_path / "a.parquet", ["1", r"\frac12", "3"], "maths"),
        verl(tmp_path / "b.parquet", ["A", "B"], "gpqa"),
        verl(tmp_path / "c.parquet", ["4", "5"], "maths"),
    ]
    found = read_prompts(files)
    assert [r.answer_type for r in found.records] == ["math"] * 3 + ["choice"] * 2 + ["math"] * 2
    assert found.notes == [
        "answers of source 'maths': kind math, 5 records (5 of 5 are mathematical, "
        f"'\\\\frac12' in {files[0]}: row 1 is no integer)",
        "answers of source 'gpqa': kind choice, 2 records (letters all of them)",
    ]


@pytest.mark.parametrize("secret", ["7", "A", r"\frac12", "words of some sort", None])
def test_unlabeled_rows_get_their_kind_without_their_answers(secret: str | None, tmp_path: Path) -> None:
    unlabeled = verl(tmp_path / "u.parquet", [secret, secret], labeled=False)
    assert [r.answer_type for r in read_prompts([unlabeled]).records] == ["math"] * 2  # nothing known
    labeled = verl(tmp_path / "l.parquet", ["A", "C"])
    assert [r.answer_type for r in read_prompts([unlabeled, labeled]).records] == ["choice"] * 4
    stated = plain(tmp_path / "p.parquet", ["yes"], kind="text")
    assert [r.answer_type for r in read_prompts([unlabeled, stated]).records] == ["text"] * 3
    found = read_prompts([unlabeled], {"s": "choice"})
    assert [r.answer_type for r in found.records] == ["choice"] * 2
    assert found.notes == ["answers of source 's': kind choice, 2 records (as set)"]


def test_the_setting_wins_over_column_and_file(tmp_path: Path) -> None:
    files = [verl(tmp_path / "v.parquet", ["142.0"], "a"), plain(tmp_path / "p.parquet", ["142"], "b", "exact")]
    assert [r.answer_type for r in read_prompts(files).records] == ["int", "exact"]
    settings = {"a": "math", "b": "int"}
    assert [(r.answer_type, r.answer) for r in read_prompts(files, settings).records] == [
        ("math", "142.0"),
        ("int", "142"),
    ]
    assert [r.answer_type for r in read_eval_set(files, settings).records] == ["math", "int"]
    assert set(read_eval_answers(files, settings).values()) == {("142.0", "math"), ("142", "int")}
    with pytest.raises(TempoError, match=r"data\.answer_types\.a: 'maths' is unknown; known: brackets, choice"):
        read_prompts(files, {"a": "maths"})


def test_a_setting_that_does_not_fit_names_the_row(tmp_path: Path) -> None:
    path = verl(tmp_path / "v.parquet", ["1", "one"])
    with pytest.raises(TempoError, match=r"v\.parquet: row 1: answer 'one' of answer_type 'int': not an integer"):
        read_prompts([path], {"s": "int"})


def test_sources_of_the_setting_must_exist() -> None:
    check_sources({"a": "int"}, ["a", "b"])
    with pytest.raises(TempoError, match=r"data\.answer_types\.c: no record has this source; the files have a, b$"):
        check_sources({"a": "int", "c": "int"}, ["b", "a", "b"])


@pytest.mark.parametrize(
    ("text", "integer"),
    [("142.0", "142"), ("$ 7 $", "7"), ("1.50", None), ("1/2", None), ("", None), ("$1$ or $2$", None), ("1e3", None),
     ("0.0", "0"), ("-0012.000", "-12"), ("12.", "12"), (".0", None), ("1,00", None)],
)  # fmt: skip
def test_integers_as_data_sets_write_them(text: str, integer: str | None) -> None:
    assert integer_of(text) == integer


@pytest.mark.parametrize(
    ("text", "expected"),
    [("x", True), (r"\pi", True), ("3 apples", True), ("x=1 or x=2", True), ("(0, \\infty)", True),
     (r"\text{no}", False),
     ("no solution", False), ("", False), ("on 3 May at the station", False), ("1/2", True), ("12/31/1999", False)],
)  # fmt: skip
def test_what_looks_like_mathematics(text: str, expected: bool) -> None:
    assert is_mathematical(text) is expected


def test_a_few_words_do_not_make_a_column_of_formulas_one_of_words() -> None:
    answers = [("p", r"\frac{1}{2}")] * 6 + [("p", "Evelyn")] * 4
    assert kind_of_column(answers)[0] == "math"
    assert kind_of_column(answers[4:])[0] == "text"
