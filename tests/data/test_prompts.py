from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tempo_megatron.data.prompts as prompts_module
import tempo_megatron.data.schemas as schemas_module
from tempo_megatron.data import isolated
from tempo_megatron.data.isolated import read_eval_isolated, read_prompts_isolated
from tempo_megatron.data.prompts import (
    PromptRecord,
    read_eval_answers,
    read_eval_prompts,
    read_eval_set,
)
from tempo_megatron.data.sft import SftRecord, read_sft
from tempo_megatron.errors import RunError, TempoError

PLAIN: dict[str, Any] = {
    "id": ["l0", "l1", "u0"],
    "source": ["dapo", "dapo", "aime"],
    "messages": [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}],
        [{"role": "user", "content": "1+1?"}],
        [{"role": "user", "content": "x?"}],
    ],
    "answer": ["42", "two", "123"],
    "answer_type": ["int", "exact", "int"],
    "labeled": [True, True, False],
    "difficulty": [1.0, 2.0, 3.0],
}

VERL: dict[str, Any] = {
    "data_source": ["dapo", "dapo", "aime", "aime"],
    "prompt": [[{"role": "user", "content": c}] for c in "abcd"],
    "ability": ["math"] * 4,
    "reward_model": [
        {"style": "rule", "ground_truth": "1,034", "is_labeled": True},
        {"style": "rule", "ground_truth": r"\frac{1}{2}", "is_labeled": True},
        {"style": "rule", "ground_truth": "7", "is_labeled": False},
        {"style": "rule", "ground_truth": "8", "is_labeled": None},
    ],
    "extra_info": [{"index": i, "split": "train"} for i in (10, 11, 20, 21)],
}


def write(path: Path, columns: dict[str, Any], **changes: Any) -> str:
    """A parquet file of ``columns`` with some replaced; None leaves a column out."""
    merged = {name: values for name, values in {**columns, **changes}.items() if values is not None}
    pq.write_table(pa.table(merged), path)
    return str(path)


def read(files: list[str]) -> list[PromptRecord]:
    return prompts_module.read_prompts(files).records


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_plain(tmp_path: Path) -> None:
    assert read([write(tmp_path / "a.parquet", PLAIN)]) == [
        PromptRecord("l0", "dapo", PLAIN["messages"][0], "42", "int", True),
        PromptRecord("l1", "dapo", user("1+1?"), "two", "exact", True),
        PromptRecord("u0", "aime", user("x?"), None, "int", False),
    ]


def test_plain_with_prompt_strings_integer_ids_and_categories(tmp_path: Path) -> None:
    source = pa.array(PLAIN["source"]).dictionary_encode()
    path = write(tmp_path / "a.parquet", PLAIN, messages=None, prompt=["p", "q", "r"], id=[7, 8, 9], source=source)
    records = read([path])
    assert [(r.id, r.source, r.messages) for r in records] == [
        ("7", "dapo", user("p")),
        ("8", "dapo", user("q")),
        ("9", "aime", user("r")),
    ]


def test_verl(tmp_path: Path) -> None:
    assert read([write(tmp_path / "mix.parquet", VERL)]) == [
        PromptRecord("mix/10", "dapo", user("a"), "1,034", "math", True),
        PromptRecord("mix/11", "dapo", user("b"), r"\frac{1}{2}", "math", True),
        PromptRecord("mix/20", "aime", user("c"), None, "int", False),
        PromptRecord("mix/21", "aime", user("d"), "8", "int", True),
    ]


def test_verl_without_labels_is_labeled(tmp_path: Path) -> None:
    reward = [{"style": "rule", "ground_truth": str(i)} for i in range(4)]
    records = read([write(tmp_path / "a.parquet", VERL, reward_model=reward)])
    assert [(r.answer, r.labeled) for r in records] == [(str(i), True) for i in range(4)]


def test_verl_lists_of_one_answer(tmp_path: Path) -> None:
    reward = [
        {"ground_truth": ["5"], "is_labeled": True},
        {"ground_truth": [], "is_labeled": False},
        {"ground_truth": ["a", "b"], "is_labeled": False},
        {"ground_truth": None, "is_labeled": False},
    ]
    path = write(tmp_path / "a.parquet", VERL, reward_model=reward)
    assert [r.answer for r in read([path])] == ["5", None, None, None]
    reward[2]["is_labeled"] = True
    path = write(tmp_path / "a.parquet", VERL, reward_model=reward)
    with pytest.raises(TempoError, match=r"a\.parquet: row 2: reward_model\.ground_truth has 2 answers, expected one"):
        read([path])


@pytest.mark.parametrize("info", [None, [{"index": 1}] * 4, [{"index": 1}, {"index": None}] * 2, [{"split": "s"}] * 4])
def test_verl_ids_fall_back_to_rows(tmp_path: Path, info: Any) -> None:
    records = read([write(tmp_path / "a.parquet", VERL, extra_info=info)])
    assert [r.id for r in records] == ["a/0", "a/1", "a/2", "a/3"]


def test_files_of_both_schemas_together(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.parquet", PLAIN), write(tmp_path / "b.parquet", VERL)]
    assert [r.id for r in read(files)] == ["l0", "l1", "u0", "b/10", "b/11", "b/20", "b/21"]


SECRET = "the-answer-nobody-may-see"


def with_secrets(tmp_path: Path, secret: str) -> list[str]:
    reward = [{**r, "ground_truth": secret if r["is_labeled"] is False else "1"} for r in VERL["reward_model"]]
    return [
        write(tmp_path / "a.parquet", PLAIN, answer=["42", "two", secret]),
        write(tmp_path / "b.parquet", VERL, reward_model=reward),
    ]


def test_unlabeled_answers_have_no_influence(tmp_path: Path) -> None:
    """Permuted, corrupt or missing answers of unlabeled rows: the same records."""
    found = [read(with_secrets(tmp_path, secret)) for secret in ("8", SECRET, "", "\x00")]
    assert all(records == found[0] for records in found)


def test_dropped_answers_never_become_python_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    for name in ("_read_plain", "_read_verl"):
        original = getattr(schemas_module, name)

        def spy(columns: Any, keep: Any, original: Any = original) -> Any:
            rows = original(columns, keep)
            seen.extend(rows)
            return rows

        monkeypatch.setattr(schemas_module, name, spy)
    read(with_secrets(tmp_path, SECRET))
    assert len(seen) == 7
    assert SECRET not in repr(seen)


def test_isolated_reading_is_the_same_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 5000  # more than one message
    columns = {
        "id": [f"é{i}" for i in range(count)],
        "source": ["s"] * count,
        "prompt": ["q"] * count,
        "answer": ["3", None] * (count // 2),
        "answer_type": ["int"] * count,
        "labeled": [True, False] * (count // 2),
    }
    files = [*with_secrets(tmp_path, SECRET), write(tmp_path / "c.parquet", columns)]
    expected = prompts_module.read_prompts(files, {"aime": "math"})
    monkeypatch.setattr(isolated, "read_prompts", None)  # this process couldn't
    assert read_prompts_isolated(files, {"aime": "math"}) == expected


def test_isolated_reading_tells_user_errors(tmp_path: Path) -> None:
    with pytest.raises(TempoError, match=r"a\.parquet: no such file") as error:
        read_prompts_isolated([str(tmp_path / "a.parquet")], {})
    assert not isinstance(error.value, RunError)


def test_isolated_evaluation_prompts_have_kinds_and_no_answers(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.parquet", PLAIN, labeled=None), write(tmp_path / "b.parquet", VERL)]
    found = read_eval_isolated(files, {})
    expected = read_eval_set(files)
    assert found.notes == expected.notes and len(found.notes) == 2
    assert {r.answer for r in found.records} == {None} and None not in {r.answer for r in expected.records}
    assert [(r.id, r.answer_type) for r in found.records] == [(r.id, r.answer_type) for r in expected.records]
    bad = write(tmp_path / "c.parquet", PLAIN, answer=["42", "two", None])
    with pytest.raises(TempoError, match=r"row 2: record 'u0' has no answer; an evaluation record needs one"):
        read_eval_isolated([bad], {})


def test_evaluation_reads_prompts_and_answers_apart(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.parquet", PLAIN, labeled=None)
    verl = write(tmp_path / "b.parquet", VERL)
    records = read_eval_prompts([plain, verl])
    assert [r.id for r in records] == ["l0", "l1", "u0", "b/10", "b/11", "b/20", "b/21"]
    assert {(r.answer, r.labeled) for r in records} == {(None, False)}
    assert read_eval_answers([plain, verl]) == {
        "l0": ("42", "int"),
        "l1": ("two", "exact"),
        "u0": ("123", "int"),
        "b/10": ("1,034", "math"),
        "b/11": (r"\frac{1}{2}", "math"),
        "b/20": ("7", "int"),
        "b/21": ("8", "int"),
    }


def test_evaluation_needs_every_answer_but_not_for_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", PLAIN, answer=["42", "two", None])
    assert len(read_eval_prompts([path])) == 3
    with pytest.raises(TempoError, match=r"row 2: record 'u0' has no answer; an evaluation record needs one"):
        read_eval_answers([path])
    assert len(read_eval_prompts([write(tmp_path / "b.parquet", PLAIN, answer=None)])) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "no column 'source'; it has id, messages, answer, answer_type, labeled, difficulty"),
        ({"messages": None}, "no column 'messages' or 'prompt'; it has id, source,"),
        ({"labeled": None}, "no column 'labeled'"),
        ({"answer": None}, "no column 'answer'"),
        ({"answer": [True, False, True]}, "column 'answer' is bool, expected string or number"),
        ({"labeled": ["yes", "no", "no"]}, "column 'labeled' is string, expected bool"),
        ({"labeled": [True, None, False]}, "row 1: column 'labeled' is empty"),
        ({"id": [1.0, 2.0, 3.0]}, "column 'id' is double, expected string or integer"),
        ({"id": ["a", " ", "c"]}, "row 1: column 'id' is empty"),
        ({"id": ["a", "b", "a"]}, r"row 2: id 'a' is already taken by .*bad\.parquet: row 0"),
        ({"messages": [1, 2, 3]}, "column 'messages' is int64, expected string or list of"),
        ({"messages": [user("a"), [], user("c")]}, "row 1: column 'messages' has no messages"),
        ({"messages": [user("a"), user("b"), None]}, "row 2: column 'messages' has no messages"),
        ({"messages": [user("a"), user(" "), user("c")]}, "row 1: column 'messages' has no text"),
        (
            {"messages": [[{"role": "user", "content": None}], user("b"), user("c")]},
            "row 0: column 'messages' has a message without role or content",
        ),
        ({"messages": None, "prompt": ["a", "", "c"]}, "row 1: column 'prompt' is empty"),
        ({"answer": ["42", None, None]}, "row 1: record 'l1' has no answer; a labeled record needs one"),
        ({"answer": ["42", "  ", None]}, "row 1: answer '  ' of answer_type 'exact': empty"),
        ({"answer": ["4/2", "two", None]}, "row 0: answer '4/2' of answer_type 'int': not an integer"),
        (
            {"answer_type": ["int", "maths", "int"]},
            "row 1: answer_type 'maths' is unknown; known: brackets, choice, exact, guess_check, int",
        ),
    ],
)
def test_bad_plain_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.parquet", PLAIN, **changes)
    with pytest.raises(TempoError, match=rf"bad\.parquet: {message}") as error:
        read([path])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_source": None}, "no column 'data_source'"),
        ({"reward_model": None}, "no column 'reward_model'"),
        ({"reward_model": ["1"] * 4}, "column 'reward_model' is string, expected struct with a field 'ground_truth'"),
        (
            {"reward_model": [{"style": "rule"}] * 4},
            "column 'reward_model' is struct<.*>, expected struct with a field",
        ),
        (
            {"reward_model": [{"ground_truth": True}] * 4},
            r"column 'reward_model\.ground_truth' is bool, expected string or number",
        ),
        (
            {"reward_model": [{"ground_truth": "1", "is_labeled": "yes"}] * 4},
            r"column 'reward_model\.is_labeled' is string, expected bool",
        ),
        ({"reward_model": [{"ground_truth": None, "is_labeled": True}] * 4}, "row 0: record 'bad/10' has no answer"),
    ],
)
def test_bad_verl_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.parquet", VERL, **changes)
    with pytest.raises(TempoError, match=rf"bad\.parquet: {message}"):
        read([path])


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(TempoError, match=r"data\.train_files: no files given"):
        read([])
    with pytest.raises(TempoError, match="a folder; expected a parquet file"):
        read([str(tmp_path)])
    empty = write(tmp_path / "empty.parquet", {name: pa.array([], pa.string()) for name in PLAIN})
    with pytest.raises(TempoError, match=r"empty\.parquet: holds no rows"):
        read([empty])
    files = [write(tmp_path / name, PLAIN) for name in ("a.parquet", "b.parquet")]
    with pytest.raises(TempoError, match=r"b\.parquet: row 0: id 'l0' is already taken by .*a\.parquet: row 0"):
        read(files)


@pytest.mark.parametrize("damage", ["text", "truncated", "pages", "empty"])
def test_corrupt_files(tmp_path: Path, damage: str) -> None:
    path = Path(write(tmp_path / "a.parquet", PLAIN))
    data = path.read_bytes()
    damaged = {
        "text": b"not parquet at all",
        "truncated": data[: len(data) // 2],
        "pages": data[:4] + b"\xff" * 200 + data[204:],
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(TempoError, match=r"a\.parquet: not a readable parquet file \(.+\)") as error:
        read([str(path)])
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(3, *pa.array([b"42", b"\xff\xfe", b"1"]).buffers()[1:])
    with pytest.raises(TempoError, match=r"a\.parquet: not a readable parquet file"):
        read([write(tmp_path / "a.parquet", PLAIN, answer=broken)])


def test_sft(tmp_path: Path) -> None:
    strings = write(tmp_path / "a.parquet", {"prompt": ["p", "q"], "response": ["r", "s"], "more": [1, 2]})
    lists = write(tmp_path / "b.parquet", {"messages": [PLAIN["messages"][0]], "response": ["t"]})
    assert read_sft([strings, lists]) == [
        SftRecord(f"{strings}: row 0", user("p"), "r"),
        SftRecord(f"{strings}: row 1", user("q"), "s"),
        SftRecord(f"{lists}: row 0", PLAIN["messages"][0], "t"),
    ]


def test_bad_sft(tmp_path: Path) -> None:
    with pytest.raises(TempoError, match=r"a\.parquet: no column 'response'; it has prompt"):
        read_sft([write(tmp_path / "a.parquet", {"prompt": ["p"]})])
    with pytest.raises(TempoError, match=r"a\.parquet: row 1: column 'response' is empty"):
        read_sft([write(tmp_path / "a.parquet", {"prompt": ["p", "q"], "response": ["r", None]})])
    with pytest.raises(TempoError, match=r"data\.train_files: no files given"):
        read_sft([])
