from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tempo_megatron.data.prepare.pipeline import Options, prepare
from tempo_megatron.data.prepare.registry import data_set
from tempo_megatron.data.prompts import read_eval_answers, read_eval_prompts, read_prompts
from tempo_megatron.errors import TempoError


def aime(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"id": str(i), "problem": problem, "answer": answer} for i, (problem, answer) in enumerate(pairs)]


def test_copies_are_dropped_and_counted(write_rows, prepared) -> None:
    path = write_rows("a.jsonl", aime(("p", "1"), ("q", "2"), (" p\n", "001"), ("p", "1")))
    records, summary = prepared("aime2024", path)
    assert [r["id"] for r in records] == ["aime2024/0", "aime2024/1"]
    assert (summary.read, summary.kept, summary.duplicates, summary.dropped) == (4, 2, 2, {})
    kept, summary = prepared("aime2024", path, keep_duplicates=True)
    assert (len(kept), summary.duplicates) == (4, 0)
    same_id = write_rows("b.jsonl", [{"id": "7", "problem": "p", "answer": "1"}] * 3)
    kept, _ = prepared("aime2024", same_id, keep_duplicates=True)
    assert [r["id"] for r in kept] == ["aime2024/7", "aime2024/7#2", "aime2024/7#3"]


def test_copies_that_contradict_each_other(write_rows, prepared) -> None:
    path = write_rows("a.jsonl", aime(("p", "1"), ("q", "2"), ("p", "3"), ("p", "1")))
    with pytest.raises(TempoError, match=r"row 2: answer '3', but .*row 0 has the same problem with answer '1'"):
        prepared("aime2024", path)
    records, summary = prepared("aime2024", path, skip_bad=True)
    assert [r["problem"] for r in records] == ["q"]
    assert summary.dropped == {"same problem, different answers": 3}
    records, summary = prepared("aime2024", path, role="unlabeled")
    assert (len(records), summary.duplicates) == (2, 2)


def test_answers_of_unlabeled_prompts_are_not_read(write_rows, prepared) -> None:
    """Values that no reader of answers would let pass."""
    path = write_rows("a.parquet", [{"problem": "p", "answer": {"not": "an answer"}}])
    [record], _ = prepared("aime2024", path, role="unlabeled")
    assert record["answer"] is None
    with pytest.raises(TempoError, match="column 'answer' is struct"):
        prepared("aime2024", path, role="eval")


def test_output_is_read_by_the_prompt_readers(write_rows, tmp_path: Path) -> None:
    rows = write_rows("a.jsonl", aime(("p", "1"), ("q", "2")))
    out = {role: tmp_path / f"{role}.parquet" for role in ("labeled", "unlabeled", "eval")}
    for role, path in out.items():
        prepare(data_set("aime2024"), [rows], path, Options(role=role, source=f"s-{role}"))  # type: ignore[arg-type]
    train = read_prompts([str(out["labeled"]), str(out["unlabeled"])]).records
    assert [(r.id, r.answer, r.labeled) for r in train] == [
        ("s-labeled/0", "1", True), ("s-labeled/1", "2", True), ("s-unlabeled/0", None, False),
        ("s-unlabeled/1", None, False)]  # fmt: skip
    assert read_eval_answers([str(out["eval"])]) == {"s-eval/0": ("1", "int"), "s-eval/1": ("2", "int")}
    assert read_eval_prompts([str(out["eval"])])[0].messages[0]["content"].startswith("p\n\nReason step by step")
    assert pq.read_schema(out["unlabeled"]).field("answer").type == pa.string()


def test_limit_counts_records_and_says_so(write_rows, prepared) -> None:
    path = write_rows("a.jsonl", aime(("p", "1"), ("p", "1"), ("q", "2"), ("r", "3")))
    records, summary = prepared("aime2024", path, limit=2)
    assert [r["problem"] for r in records] == ["p", "q"]
    assert summary.read == 3 and "--limit 2" in summary.notes[0]
    _, summary = prepared("aime2024", path, limit=3)
    assert summary.read == 4 and not summary.notes
    path = write_rows("b.jsonl", aime(("p", "1"), ("p", "2"), ("q", "2"), ("r", "3"), ("s", "4")))
    records, _ = prepared("aime2024", path, limit=2, skip_bad=True)
    assert [r["problem"] for r in records] == ["q", "r"]


def test_one_id_twice_is_refused(write_rows, prepared) -> None:
    first, second = (write_rows(f"{n}/t.jsonl", [{"id": 3, "problem": n, "answer": "1"}]) for n in "ab")
    with pytest.raises(TempoError, match=r"b/t.jsonl: row 0: id 'aime2024/3' is already taken by .*a/t.jsonl: row 0"):
        prepared("aime2024", first, second)


def test_files_of_one_name_are_told_apart_by_their_folders(write_rows, prepared) -> None:
    files = [write_rows(f"{n}/x/t.jsonl", [{"problem": n, "answer": "1"}]) for n in ("I", "II")]
    records, _ = prepared("aime2024", *files)
    assert [r["id"] for r in records] == ["aime2024/I-x-t-0", "aime2024/II-x-t-0"]


def test_nothing_left_is_refused_and_leaves_the_old_output(write_rows, prepared, tmp_path: Path) -> None:
    prepared("aime2024", write_rows("a.jsonl", aime(("p", "1"))))
    with pytest.raises(TempoError, match=r"no row is left of 1 \(empty column 'problem': 1\)"):
        prepared("aime2024", write_rows("b.jsonl", aime(("", "1"))), skip_bad=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["prompts.parquet"]


def test_output_that_cannot_be_written_or_is_an_input(write_rows, tmp_path: Path) -> None:
    path = write_rows("a.parquet", aime(("p", "1")))
    with pytest.raises(TempoError, match="is also an input"):
        prepare(data_set("aime2024"), [path], Path(path), Options("eval"))
    with pytest.raises(TempoError, match=r"--output .* cannot be written \("):
        prepare(data_set("aime2024"), [path], Path(path) / "out.parquet", Options("eval"))


def test_layouts_of_all_files_are_checked_before_any_row(write_rows, prepared) -> None:
    good = write_rows("a.jsonl", aime(("", "1")))
    with pytest.raises(TempoError, match=r"b.jsonl: no column 'problem'"):
        prepared("aime2024", good, write_rows("b.jsonl", [{"answer": "1"}]))
