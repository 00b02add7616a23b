"""Every data set, in every layout that it is known in: the record, and the refusal of a file that lacks a column."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.data.prepare.instructions import bare_problem
from tempo_megatron.data.prepare.reasoning import BBH_KIND
from tempo_megatron.data.prepare.registry import DATA_SETS
from tempo_megatron.errors import TempoError

STEPS = "\n\nReason step by step, and put your final answer within \\boxed{}."
WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
    " $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its"
    ' own line after "Answer:".'
)
GRID = {"header": ["House", "Name", "Drink"], "rows": [["1", "Ann", "tea"], ["2", "Bo", "milk"]]}


@dataclass(frozen=True)
class Case:
    """One row of one layout and the record that is wanted of it."""

    name: str
    file: str
    row: dict[str, Any]
    id: str
    kind: str
    answer: str
    prompt: str
    needed: tuple[str, ...]  # columns without which the file is refused
    answer_columns: tuple[str, ...]  # of these, those that unlabeled prompts do without


CASES = [
    Case(
        "dapo-math-17k", "dapo.parquet",
        {"data_source": "math_dapo", "prompt": [{"content": WRAPPED.format("What is $6 \\cdot 7$?"), "role": "user"}],
         "ability": "MATH", "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
         "extra_info": {"index": "9a9b6eb4"}},
        "dapo-math-17k/9a9b6eb4", "int", "42", "What is $6 \\cdot 7$?" + STEPS,
        ("prompt", "reward_model"), ("reward_model",),
    ),
    Case(
        "aime2024", "train-00000-of-00001.parquet",
        {"id": 60, "problem": "Count to 33.", "solution": "1, ...", "answer": "033", "url": "x", "year": "2024"},
        "aime2024/60", "int", "33", "Count to 33." + STEPS, ("problem", "answer"), ("answer",),
    ),
    Case(
        "aime2024", "aime_2024_problems.parquet",
        {"ID": "2024-I-1", "Problem": "Count to 33.", "Solution": "1, ...", "Answer": 33},
        "aime2024/2024-I-1", "int", "33", "Count to 33." + STEPS, ("Problem", "Answer"), ("Answer",),
    ),
    Case(
        "aime2025", "aime_2025.parquet",
        {"problem_idx": 4, "problem": "Count to 70.", "answer": 70, "problem_type": ["Algebra"]},
        "aime2025/4", "int", "70", "Count to 70." + STEPS, ("problem", "answer"), ("answer",),
    ),
    Case(
        "aime2025", "train.jsonl",
        {"id": "0", "problem": "Count to 70.", "answer": "70", "solution": "1, ...", "url": "https://x", "year": 2025},
        "aime2025/0", "int", "70", "Count to 70." + STEPS, ("problem", "answer"), ("answer",),
    ),
    Case(
        "aime2025", "aime2025-I.jsonl", {"question": "Count to 70.", "answer": "70"},
        "aime2025/aime2025-I-0", "int", "70", "Count to 70." + STEPS, ("question", "answer"), ("answer",),
    ),
    Case(
        "aime2026", "aime_2026.parquet", {"problem_idx": 30, "problem": "Count to 9.", "answer": 9},
        "aime2026/30", "int", "9", "Count to 9." + STEPS, ("problem", "answer"), ("answer",),
    ),
    Case(
        "beyondaime", "test.parquet", {"problem": "Count to 12345.", "answer": 12345},
        "beyondaime/test-0", "int", "12345", "Count to 12345." + STEPS, ("problem", "answer"), ("answer",),
    ),
    Case(
        "olymmath", "OlymMATH-EN-HARD.jsonl",
        {"problem": "Halve one.", "answer": "$\\frac{1}{2}$", "subject": "Algebra", "unique_id": "OlymMATH-HARD-7-EN"},
        "olymmath/OlymMATH-HARD-7-EN", "math", "\\frac{1}{2}", "Halve one." + STEPS,
        ("problem", "unique_id", "answer"), ("answer",),
    ),
    Case(
        "olymmath", "OlymMATH-ZH-EASY.jsonl",
        {"problem": "一的一半是多少?", "answer": "0.5", "subject": "代数", "unique_id": "OlymMATH-EASY-7-ZH"},
        "olymmath/OlymMATH-EASY-7-ZH", "math", "0.5", "一的一半是多少?" + STEPS,
        ("problem", "unique_id", "answer"), ("answer",),
    ),
    Case(
        "math500", "test.jsonl",
        {"problem": "List primes below 8.", "solution": "They are \\boxed{1}, no: $\\boxed{2, 3, 5, 7}$.", "level": 2,
         "answer": "2,3,5,7", "subject": "Number Theory", "unique_id": "test/number_theory/1.json"},
        "math500/test/number_theory/1.json", "math", "2, 3, 5, 7", "List primes below 8." + STEPS,
        ("problem", "solution"), ("solution",),
    ),
    Case(
        "math500", "requests.jsonl.gz",
        {"request_type": "loglikelihood", "idx": 0, "label": "357",
         "doc": {"index": 0, "problem": "List odd primes below 8.", "query": "Problem:\nList", "level": "2",
                 "type": None, "solution": "They are $\\boxed{3, 5, 7}$.", "answer": "357", "choices": []}},
        "math500/requests-0", "math", "3, 5, 7", "List odd primes below 8." + STEPS,
        ("problem", "solution"), ("solution",),
    ),
    Case(
        "gsm8k", "test-00000-of-00001.parquet",
        {"question": "A hen lays 600 eggs twice. How many?", "answer": "600*2 = <<600*2=1200>>1200\n#### 1,200"},
        "gsm8k/test-00000-of-00001-0", "math", "1200", "A hen lays 600 eggs twice. How many?" + STEPS,
        ("question", "answer"), ("answer",),
    ),
    Case(
        "gsm8k", "requests.jsonl.gz",
        {"request_type": "generate_until", "idx": 0, "label": "3",
         "doc": {"question": "One and two?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3", "short_answer": "3", "id": 0}},
        "gsm8k/requests-0", "math", "3", "One and two?" + STEPS, ("question", "answer"), ("answer",),
    ),
    Case(
        "dolci-rl-zero-general", "train.parquet",
        {"custom_id": "request-5", "prompt": "user: Name a colour.", "ground_truth": ["Red is one."],
         "dataset": ["general-quality_ref"]},
        "dolci-rl-zero-general/request-5", "judge", "Red is one.", "Name a colour.",
        ("prompt", "ground_truth"), ("ground_truth",),
    ),
    Case(
        "bbh", "date_understanding/test-00000-of-00001.parquet",
        {"input": "Which is Monday?\nOptions:\n(A) 1 May\n(B) 2 May", "target": "(B)"},
        "bbh/date_understanding-0", "choice", "B",
        "Which is Monday?\nOptions:\n(A) 1 May\n(B) 2 May\n\nReason step by step, and put the letter of your choice"
        " within \\boxed{}.",
        ("input", "target"), ("target",),
    ),
    Case(
        "bbh", "word_sorting.json", {"input": "Sort: b a", "target": "a b"}, "bbh/word_sorting-0", "text", "a b",
        "Sort: b a\n\nReason step by step, and put your final answer, and nothing else, within \\boxed{}.",
        ("input", "target"), ("target",),
    ),
    Case(
        "bbh", "dyck_languages.jsonl", {"input": "Close: [ <", "target": "> ]"},
        "bbh/dyck_languages-0", "brackets", "> ]",
        "Close: [ <\n\nReason step by step, and put your final answer, and nothing else, within \\boxed{}.",
        ("input", "target"), ("target",),
    ),
    Case(
        "bbh", "bbh-object_counting.csv", {"input": "How many?", "target": "7"}, "bbh/object_counting-0", "int", "7",
        "How many?" + STEPS, ("input", "target"), ("target",),
    ),
    Case(
        "agieval", "lsat-ar.jsonl",
        {"passage": "Ann sits left of Bo.", "question": "Who is right?", "options": ["(A)Ann", "(B)Bo"], "label": "B",
         "other": None},
        "agieval/lsat-ar-0", "choice", "B",
        "Ann sits left of Bo.\n\nWho is right?\n\n(A) Ann\n(B) Bo\n\nReason step by step, and put the letter of your"
        " choice within \\boxed{}.",
        ("question", "options", "label"), ("label",),
    ),
    Case(
        "agieval", "jec-qa-kd.jsonl",
        {"passage": None, "question": "Which are even?", "options": ["(A)2", "(B)3", "(C)4"], "label": ["C", "A"]},
        "agieval/jec-qa-kd-0", "choice", "AC",
        "Which are even?\n\n(A) 2\n(B) 3\n(C) 4\n\nOne or more options are right. Reason step by step, and put the"
        " letters of all of them, without separators, within \\boxed{}.",
        ("question", "options", "label"), ("label",),
    ),
    Case(
        "agieval", "gaokao-mathcloze.jsonl",
        {"passage": None, "question": "Halve one.", "options": None, "label": None, "answer": "$\\frac{1}{2}$"},
        "agieval/gaokao-mathcloze-0", "math", "\\frac{1}{2}", "Halve one." + STEPS, ("question", "answer"), ("answer",),
    ),
    Case(
        "zebralogic", "grid_mode.parquet",
        {"id": "lgp-test-2x2-1", "size": "2*2", "puzzle": "There are 2 houses.", "solution": GRID,
         "created_at": "2024-07-03"},
        "zebralogic/lgp-test-2x2-1", "json_grid",
        '{"House 1": {"Name": "Ann", "Drink": "tea"}, "House 2": {"Name": "Bo", "Drink": "milk"}}',
        "There are 2 houses.\n\nReason step by step. Then give the solution as JSON, every ___ filled in:\n\n"
        '{\n  "solution": {\n    "House 1": {\n      "Name": "___",\n      "Drink": "___"\n    },\n    "House 2": {\n'
        '      "Name": "___",\n      "Drink": "___"\n    }\n  }\n}',
        ("id", "puzzle", "solution"), (),
    ),
    Case(
        "gpqa-diamond", "gpqa_diamond.csv",
        {"Record ID": "rec0", "Question": "Which one,\nof four?", "Correct Answer": "this\n", "Incorrect Answer 1": "x",
         "Incorrect Answer 2": "y", "Incorrect Answer 3": "z", "Subdomain": "Physics"},
        "gpqa-diamond/rec0", "choice", "B",
        "Which one,\nof four?\n\n(A) x\n(B) this\n(C) y\n(D) z\n\nReason step by step, and put the letter of your"
        " choice within \\boxed{}.",
        ("Record ID", "Question", "Correct Answer", "Incorrect Answer 2"), (),
    ),
]  # fmt: skip

case = pytest.mark.parametrize("case", CASES, ids=[f"{c.name}-{c.file.split('/')[0]}" for c in CASES])


def without(row: dict[str, Any], column: str) -> dict[str, Any]:
    if "doc" in row:
        return {**row, "doc": without(row["doc"], column)}
    return {name: value for name, value in row.items() if name != column}


def test_every_data_set_and_layout_has_a_case() -> None:
    assert {c.name for c in CASES} == {name for name, s in DATA_SETS.items() if s.kinds}  # others: test_any_table.py
    assert len(BBH_KIND) == 27


@case
def test_record(case: Case, write_rows, prepared) -> None:
    [record], summary = prepared(case.name, write_rows(case.file, [case.row]))
    assert record["messages"] == [{"role": "user", "content": case.prompt}]
    assert (record["id"], record["answer_type"], record["answer"]) == (case.id, case.kind, case.answer)
    assert (record["source"], record["labeled"]) == (case.name, False)
    assert case.kind in DATA_SETS[case.name].kinds
    assert (summary.read, summary.kept, summary.kinds) == (1, 1, {case.kind: 1})


@case
def test_a_file_without_a_needed_column_is_refused_by_name(case: Case, write_rows, prepared) -> None:
    for column in case.needed:
        path = write_rows(case.file, [without(case.row, column)])
        with pytest.raises(TempoError, match=f"no column .*'{column}'") as refused:
            prepared(case.name, path)
        message = str(refused.value)
        assert message.startswith(f"{path}: ") and "\n" not in message
        assert all(name in message for name in without(case.row.get("doc", case.row), column))


@case
def test_unlabeled_prompts_do_without_answers(case: Case, write_rows, prepared) -> None:
    row = case.row
    for column in case.answer_columns:
        row = without(row, column)
    [record], _ = prepared(case.name, write_rows(case.file, [row]), role="unlabeled")
    assert (record["answer"], record["labeled"], record["answer_type"]) == (None, False, case.kind)
    assert record["messages"][0]["content"] == case.prompt


BAD_ROWS = [
    ("aime2024", "a.jsonl", {"problem": "p", "answer": "1/2"}, "column 'answer' is '1/2', expected an integer"),
    ("aime2024", "a.jsonl", {"problem": " ", "answer": "12"}, "column 'problem' is empty"),
    ("aime2024", "a.jsonl", {"problem": "p", "answer": None}, "column 'answer' is empty"),
    ("math500", "a.jsonl", {"problem": "p", "solution": "It is \\boxed{7"}, "column 'solution' has no complete"),
    ("gsm8k", "a.jsonl", {"question": "q", "answer": "so 7"}, "column 'answer' has no final answer after '####'"),
    ("dapo-math-17k", "a.jsonl", {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": ""}},
     "reward_model.ground_truth is empty"),
    ("dapo-math-17k", "a.jsonl", {"prompt": [], "reward_model": {"ground_truth": "1"}}, "'prompt' has 0 messages"),
    ("bbh", "snarks.jsonl", {"input": "q", "target": "Monsters"}, "column 'target' is 'Monsters', expected a letter"),
    ("agieval", "sat-math.jsonl", {"question": "q", "options": ["(A)1", "(B)2"], "label": "E"}, "'label' is 'E'"),
    ("agieval", "sat-math.jsonl", {"question": "q", "options": ["(A)1", "(B)2"], "label": "AB"}, "expected one letter"),
    ("agieval", "sat-math.jsonl", {"question": "q", "options": ["(B)1", "(A)2"], "label": "A"}, "column 'options' has"),
    ("zebralogic", "z.jsonl", {"id": "1", "puzzle": "p", "solution": {**GRID, "rows": [["___"] * 3]}}, "has blanks"),
    ("zebralogic", "z.jsonl", {"id": "1", "puzzle": "p", "solution": {**GRID, "rows": [["1", "Ann"]]}}, "has header"),
    ("zebralogic", "z.jsonl", {"id": "1", "puzzle": "p", "solution": {**GRID, "rows": GRID["rows"][1:]}}, "houses"),
    ("zebralogic", "z.jsonl", {"id": "1", "puzzle": "p", "solution": {**GRID, "header": ["House", "A", "A"]}},
     "distinct names"),
    ("zebralogic", "z.jsonl", {"id": "1", "puzzle": "p", "solution": None}, "column 'solution' is empty"),
    ("dapo-math-17k", "a.jsonl", {"prompt": None, "reward_model": {"ground_truth": "1"}}, "column 'prompt' is empty"),
    ("dapo-math-17k", "a.jsonl", {"prompt": [{"content": "q"}], "reward_model": None}, "'reward_model' is empty"),
    ("aime2024", "a.jsonl", {"problem": "p", "answer": 3.5}, "column 'answer' is 3.5, expected an integer"),
    ("aime2024", "a.jsonl", {"problem": "p", "answer": "9" * 1001}, "expected an integer of at most 1000 characters"),
    ("agieval", "sat-math.jsonl", {"question": "q", "options": ["(A)1", "(B)"], "label": "A"}, "option 2 of 2"),
    ("agieval", "sat-math.jsonl", {"question": "q", "options": ["1", "1"], "label": "A"}, "option '1' is there"),
    ("agieval", "sat-math.jsonl", {"question": "q", "options": [*map(str, range(27))], "label": "A"}, "27 options"),
    ("bbh", "dyck_languages.jsonl", {"input": "q", "target": "none"}, "not a sequence of brackets"),
    ("dolci-rl-zero-general", "d.jsonl", {"prompt": "user: q", "ground_truth": ["a", "b"]}, "has 2 answers"),
    ("dolci-rl-zero-general", "d.jsonl", {"prompt": "user: ", "ground_truth": ["a"]}, "holds no text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "row", "wrong"), BAD_ROWS)
def test_bad_row_is_refused_or_left_out_and_counted(name, file, row, wrong, write_rows, prepared) -> None:
    good = next(c.row for c in CASES if c.name == name and (name != "agieval" or "lsat" in c.file))
    if name == "bbh":
        good = {"input": "q1", "target": "> ]" if "dyck" in file else "(A)"}
    path = write_rows(file, [good, row])
    with pytest.raises(TempoError) as refused:
        prepared(name, path)
    assert str(refused.value).startswith(f"{path}: row 1: ") and wrong in str(refused.value)
    records, summary = prepared(name, path, skip_bad=True)
    assert len(records) == 1 and summary.read == 2 and sum(summary.dropped.values()) == 1
    assert f"{path}: row 1: " in next(iter(summary.examples.values()))


WRONG_TYPES = [
    ("aime2024", "a.jsonl", {"problem": ["p"], "answer": "1"}, "column 'problem' is list ['p'], expected string"),
    ("aime2024", "a.jsonl", {"problem": "p", "answer": {"x": 1}}, "'answer' is struct {'x': 1}, expected string"),
    ("dapo-math-17k", "a.jsonl", {"prompt": 3, "reward_model": {}}, "'prompt' is integer 3, expected string or list"),
    ("dapo-math-17k", "a.jsonl", {"prompt": [{"content": "q"}], "reward_model": "1"}, "'reward_model' is string '1'"),
    ("agieval", "sat-en.jsonl", {"question": "q", "options": {"A": "1"}, "label": "A"}, "'options' is struct"),
    ("zebralogic", "z.jsonl", {"id": "1", "puzzle": "p", "solution": "Ann"}, "column 'solution' is string 'Ann'"),
    ("zebralogic", "z.jsonl", {"id": "1", "puzzle": "p", "solution": {"header": 3}}, "column 'solution' is struct"),
    ("dolci-rl-zero-general", "d.jsonl", {"prompt": "q", "ground_truth": 3}, "column 'ground_truth' is integer 3"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "row", "wrong"), WRONG_TYPES)
def test_column_of_another_type_is_refused_even_with_skip_bad(name, file, row, wrong, write_rows, prepared) -> None:
    path = write_rows(file, [row])
    with pytest.raises(TempoError) as refused:
        prepared(name, path, skip_bad=True)
    assert str(refused.value).startswith(f"{path}: row 0: ") and wrong in str(refused.value)


def test_file_that_is_named_after_no_task_is_refused(write_rows, prepared) -> None:
    with pytest.raises(TempoError, match=r"test\.jsonl: neither the file nor a folder .* named after a task; known: "):
        prepared("bbh", write_rows("test.jsonl", [{"input": "q", "target": "a"}]))


def test_task_is_the_beginning_or_the_end_of_a_name_or_a_folder(write_rows, prepared, monkeypatch) -> None:
    row = {"passage": None, "question": "q", "options": ["(A)1", "(B)2"], "label": "(B)"}
    [record], _ = prepared("agieval", write_rows("math/lsat-ar_test.jsonl", [row]))
    assert (record["id"], record["answer"]) == ("agieval/lsat-ar-0", "B")
    with pytest.raises(TempoError, match="column 'options' is filled, but the path names the task 'math'"):
        prepared("agieval", write_rows("math/test.jsonl", [{**row, "answer": "2"}]), role="unlabeled")
    path = Path(write_rows("navigate/test.jsonl", [{"input": "q", "target": "Yes"}]))
    monkeypatch.chdir(path.parent)
    [record], _ = prepared("bbh", path.name)
    assert record["id"] == "bbh/navigate-0"


def test_a_letter_before_one_option_alone_is_part_of_it(write_rows, prepared) -> None:
    row = {"question": "Who?", "options": ["A. Smith", "Jones"], "label": "A"}
    [record], _ = prepared("agieval", write_rows("lsat-ar.jsonl", [row]))
    assert "(A) A. Smith\n(B) Jones" in record["messages"][0]["content"]


def test_an_answer_in_degrees_is_its_integer(write_rows, prepared) -> None:
    """opencompass/AIME2025 has one."""
    [record], _ = prepared("aime2025", write_rows("aime2025-II.jsonl", [{"question": "q", "answer": "336^\\circ"}]))
    assert record["answer"] == "336"


def test_files_of_several_tasks_go_into_one_output(write_rows, prepared) -> None:
    files = [write_rows(f"{task}.jsonl", [{"input": f"q {task}", "target": t}]) for task, t in
             (("navigate", "Yes"), ("object_counting", "3"), ("hyperbaton", "(A)"))]  # fmt: skip
    records, _ = prepared("bbh", *files, role="labeled")
    assert [(r["answer"], r["answer_type"], r["labeled"]) for r in records] == [
        ("Yes", "text", True), ("3", "int", True), ("A", "choice", True)]  # fmt: skip


def test_gpqa_order_depends_on_seed_and_record_only(write_rows, prepared) -> None:
    from tempo_megatron.data.prepare.layouts import Settings

    columns = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    rows = [{"Record ID": f"r{i}", "Question": f"q{i}", **dict.fromkeys(columns, "")} for i in range(40)]
    for i, row in enumerate(rows):
        row.update({column: f"{column[0]}{i}{column[-1]}" for column in columns})
    first, _ = prepared("gpqa-diamond", write_rows("a.csv", rows))
    backwards, _ = prepared("gpqa-diamond", write_rows("b.csv", rows[::-1]))
    other, _ = prepared("gpqa-diamond", write_rows("a.csv", rows), settings=Settings(seed=1))
    assert backwards[::-1] == first and other != first
    assert {r["answer"] for r in first} == set("ABCD")
    for number, record in enumerate(first):
        assert f"({record['answer']}) C{number}r" in record["messages"][0]["content"]


def test_dapo_wrapper_is_taken_off_at_the_ends_only() -> None:
    problem = 'Solve it. The word "Answer:" has how many letters?'
    assert bare_problem(WRAPPED.format(problem)) == problem
    assert bare_problem(f"  {problem}\n") == problem
    inner = f"{problem} Solve the following math problem step by step. Or not."
    assert bare_problem(inner) == inner


def test_solution_as_json_text_is_read(write_rows, prepared) -> None:
    row = {"id": "1", "puzzle": "p", "solution": json.dumps(GRID)}
    [record], _ = prepared("zebralogic", write_rows("z.csv", [row]))
    assert json.loads(record["answer"])["House 2"] == {"Name": "Bo", "Drink": "milk"}
