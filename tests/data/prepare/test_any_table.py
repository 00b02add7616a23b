"""verl's layout and tables of any content: kinds by column, instructions, rows that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.cli import main
from tempo_megatron.data.prompts import read_eval_answers, read_prompts
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.registry import verify

STEPS = "\n\nReason step by step, and put your final answer within \\boxed{}."
LETTER = "\n\nReason step by step, and put the letter of your choice within \\boxed{}."
SYSTEM = {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."}


def verl(problem: Any, truth: Any, index: str, source: str = "AMC-TTT", **reward: Any) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": problem,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth, **reward},
        "extra_info": {"split": "test", "index": index},
    }


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def prompts(records: list[dict[str, Any]]) -> list[str]:
    return [r["messages"][0]["content"] for r in records]


def test_ttrl_in_verls_layout(write_rows, prepared) -> None:
    """System message and float answers as TTRL's preprocessing leaves them."""
    rows = [verl([SYSTEM, *user(f"Count to {i}.")], f"{i}.0", f"AMC-TTT-{i}") for i in (142, 36)]
    path = write_rows("test.parquet", rows)
    records, summary = prepared("verl", path)
    assert [(r["id"], r["source"], r["answer"], r["answer_type"]) for r in records] == [
        ("AMC-TTT/AMC-TTT-142", "AMC-TTT", "142", "int"),
        ("AMC-TTT/AMC-TTT-36", "AMC-TTT", "36", "int"),
    ]
    assert prompts(records) == ["Count to 142." + STEPS, "Count to 36." + STEPS]
    assert summary.notes == ["answers of source 'AMC-TTT': kind int, 2 records (integers all of them)"]
    records, summary = prepared("verl", path, role="unlabeled")
    assert {(r["answer"], r["answer_type"]) for r in records} == {(None, "math")}
    assert "kind math, 2 records (the default" in summary.notes[0]
    records, _ = prepared("verl", path, role="unlabeled", answer_type="int", source="amc")
    assert {(r["source"], r["answer_type"]) for r in records} == {("amc", "int")}


@pytest.mark.parametrize(
    ("name", "row", "id"),
    [
        ("train.json", {"prompt": "Count to 7.", "answer": "7", "source": "aime", "id": 3}, "aime/3"),
        ("a.jsonl", {"problem": "Count to 7.", "answer": "7", "source": "aime", "uuid": "x-1"}, "aime/x-1"),
        ("b.jsonl", {"prompt": "Count to 7.", "solution": "7", "source": "aime"}, "aime/b-0"),
        ("c.jsonl", {"question": "Count to 7.", "answer": 7.0}, "table/c-0"),
    ],
)
def test_tables(name: str, row: dict[str, Any], id: str, write_rows, prepared) -> None:
    [record], _ = prepared("table", write_rows(name, [row]))
    assert (record["id"], record["answer"], record["answer_type"]) == (id, "7", "int")
    assert prompts([record]) == ["Count to 7." + STEPS]


@pytest.mark.parametrize(
    ("name", "row", "lacks"),
    [
        ("verl", verl(user("q"), "7", "0"), "reward_model"),
        ("table", {"prompt": "q", "answer": "7"}, "answer"),
        ("table", {"prompt": "q", "solution": "7"}, "solution"),
    ],
)
def test_only_labelled_prompts_need_the_answer_column(name, row, lacks, write_rows, prepared) -> None:
    path = write_rows("a.jsonl", [{column: value for column, value in row.items() if column != lacks}])
    with pytest.raises(TempoError, match=rf"a\.jsonl: no column .*'{lacks}'"):
        prepared(name, path)
    [record], _ = prepared(name, path, role="unlabeled")
    assert (record["answer"], record["answer_type"]) == (None, "math")


def test_each_source_has_its_kind_and_its_template(write_rows, prepared) -> None:
    gpqa = "Which?\n\nA: red\nB: blue\nC: green"
    rows = [
        verl(user("Halve 1."), r"\dfrac{1}{2}", "0", "math"),
        verl(user("Halve 2."), "1", "1", "math"),
        verl(user(gpqa), "B", "2", "gpqa"),
        verl(user(gpqa + " "), "B", "2b", "gpqa"),
        verl(user("Is it so?"), "yes", "3", "words"),
        verl(user(gpqa.replace("Which", "Which ones")), "AC", "4", "several"),
        verl(user(gpqa.replace("Which", "Which one")), "B", "5", "several"),
        verl(user("Give the half of 1 as a decimal in \\boxed{}."), "0.5", "6", "math"),
    ]
    records, summary = prepared("verl", write_rows("a.parquet", rows), role="labeled")
    assert [(r["source"], r["answer_type"]) for r in records] == [
        ("math", "math"), ("math", "math"), ("gpqa", "choice"), ("words", "text"), ("several", "choice"),
        ("several", "choice"), ("math", "math")]  # fmt: skip
    assert prompts(records)[:3] == ["Halve 1." + STEPS, "Halve 2." + STEPS, gpqa + LETTER]
    assert all("letters of all of them, without separators" in text for text in prompts(records)[4:6])
    assert prompts(records)[6] == "Give the half of 1 as a decimal in \\boxed{}."  # no second instruction
    assert summary.duplicates == 1 and "1 problems ask for a box in words of their own" in summary.notes[-1]


def test_prepared_rows_are_read_as_they_were_meant(write_rows, tmp_path: Path) -> None:
    rows = [verl(user(f"Halve {i}."), rf"\dfrac{{{i}}}{{2}}", str(i), "math") for i in (1, 3)]
    out = tmp_path / "o.parquet"
    command = ["data", "prepare", "verl", "--input", write_rows("a.parquet", rows), "--output", str(out), "--labeled"]
    assert main(command) == 0
    found = read_prompts([str(out)])
    assert found.notes == [] and [r.answer_type for r in found.records] == ["math", "math"]
    assert verify("So \\boxed{\\frac{1}{2}}", *read_eval_answers([str(out)])["math/1"]).correct


BAD = [
    (verl(user("q"), None, "9"), "reward_model.ground_truth is empty"),
    (verl(user("q"), ["1", "2"], "9"), "reward_model.ground_truth has 2 answers, expected one"),
    (verl(user("q"), "9" * 1001, "9"), "has 1001 characters, at most 1000 can be checked"),
    (verl(user("q"), "3", "9", is_labeled=False), "reward_model.is_labeled is false: the answer must not be used"),
    (verl([*user("q"), {"role": "assistant", "content": "a"}], "3", "9"), "column 'prompt' has 2 messages"),
    (verl(user(SYSTEM["content"]), "3", "9"), "the problem is empty, or nothing but instructions"),
    (verl(user("q"), "x}", "9"), "answer 'x}' of answer_type 'math': empty, unbalanced or unprintable"),
    (verl(user("q"), "10!!", "9"), "answer '10!!' of answer_type 'math': can't be computed"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "wrong"), BAD)
def test_bad_rows_are_refused_or_left_out_and_counted(row: dict[str, Any], wrong: str, write_rows, prepared) -> None:
    good = [verl(user("Halve 1."), r"\frac12", "0"), verl(user("Halve 3."), r"\frac32", "1")]
    path = write_rows("a.jsonl", [good[0], row, good[1]])
    with pytest.raises(TempoError) as refused:
        prepared("verl", path)
    assert str(refused.value).startswith(f"{path}: row 1: ") and wrong in str(refused.value)
    records, summary = prepared("verl", path, skip_bad=True)
    assert [r["id"] for r in records] == ["AMC-TTT/0", "AMC-TTT/1"]
    assert sum(summary.dropped.values()) == 1 and f"{path}: row 1: " in next(iter(summary.examples.values()))


@pytest.mark.parametrize(
    ("options", "label", "wrong"),
    [
        ("(A) 1\n(B) 2\n(B) 3", "A", "option B is lettered twice"),
        ("(A) 1\n(B) 2", "D", "none of the prompt's options A, B"),
        ("(A) 1\n(B) 2", "AD", "none of the prompt's options A, B"),
    ],
)
def test_letters_that_are_no_options(options: str, label: str, wrong: str, write_rows, prepared) -> None:
    rows = [verl(user(f"Which?\n{options}"), label, "0"), verl(user("Which is it?\n(A) 1\n(B) 2"), "B", "1")]
    path = write_rows("a.jsonl", rows)
    with pytest.raises(TempoError, match=rf"a\.jsonl: row 0: answer '{label}' of answer_type 'choice': {wrong}"):
        prepared("verl", path)
    records, _ = prepared("verl", path, skip_bad=True)
    assert [r["id"] for r in records] == ["AMC-TTT/1"]


def test_a_template_that_asks_for_another_form_is_refused(write_rows, prepared, tmp_path: Path) -> None:
    template = tmp_path / "t.txt"
    template.write_text('{problem}\nWrite the final answer after "####".')
    path = write_rows("a.jsonl", [verl(user("q"), "words", "0")])
    with pytest.raises(TempoError, match="the prompt asks for the answer after '####', which kind exact does not read"):
        prepared("verl", path, template=str(template), answer_type="exact")


def test_broken_lines_are_left_out(tmp_path: Path, prepared) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(
        '{"prompt": "Count to 7.", "answer": "7"}\n{"prompt": "Count to\n{"prompt": "Count.", "answer": 3}\n'
    )
    with pytest.raises(TempoError, match=r"train\.jsonl: row 1: \(line 2\) is no JSON: .* \(--skip-bad leaves such"):
        prepared("table", str(path))
    records, summary = prepared("table", str(path), skip_bad=True)
    assert [r["answer"] for r in records] == ["7", "3"] and summary.dropped == {"not readable": 1}


def test_answer_type_is_for_sets_of_any_kind(write_rows, prepared) -> None:
    path = write_rows("a.jsonl", [{"problem": "p", "answer": "1"}])
    with pytest.raises(TempoError, match=r"--answer-type: aime2024 states its kinds itself: int"):
        prepared("aime2024", path, answer_type="math")
    with pytest.raises(TempoError, match="unknown answer_type 'maths'"):
        prepared("table", path, answer_type="maths")


def test_dapo_as_text_and_integers_as_floats(write_rows, prepared) -> None:
    row = {"prompt": "What is 6 * 7?", "solution": "42", "reward_model": {"ground_truth": "42.0"}, "extra_info": None}
    [record], _ = prepared("dapo-math-17k", write_rows("a.jsonl", [row]))
    assert (record["answer"], prompts([record])) == ("42", ["What is 6 * 7?" + STEPS])


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["(A)1", "(A)2", "(B)3"], "column 'options' has A on 2 options"),
        (["(B)1", "(A)2"], "column 'options' has '(B)1' at place 1"),
        (["(A)1", "(B)2", "3"], "column 'options' has 2 letters on 3"),
    ],
)
def test_agieval_options_whose_letters_cannot_be_relied_on(
    options: list[str], wrong: str, write_rows, prepared
) -> None:
    path = write_rows("lsat-ar.jsonl", [{"question": "q", "options": options, "label": "A"}])
    with pytest.raises(TempoError) as refused:
        prepared("agieval", path)
    assert wrong in str(refused.value)
