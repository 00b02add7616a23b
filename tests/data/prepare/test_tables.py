from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tempo_megatron.data.prepare.tables import BadRow, Row, open_table
from tempo_megatron.errors import TempoError

ROWS = [{"a": "x\ny", "b": "1"}, {"a": "ü,", "b": "2"}]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "T.JSONL", "t.jsonl.gz", "t.json", "t.csv"])
def test_same_rows_from_every_format(name: str, write_rows) -> None:
    written = Path(write_rows(name.lower(), ROWS))
    path = str(written.rename(written.with_name(name)))
    table = open_table(path)
    assert (table.file, table.columns) == (path, ("a", "b"))
    rows = list(table.rows(["b", "a"]))
    assert [(r.number, r.text("a"), r.number_or_text("b")) for r in rows] == [(0, "x\ny", "1"), (1, "ü,", "2")]
    assert [r.values for r in table.rows(["b"])] == [{"b": "1"}, {"b": "2"}]


def test_bare_json_list_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text('[{"a": 1}, {"a": null}]')
    assert [r.values["a"] for r in open_table(str(tmp_path / "l.json")).rows(["a"])] == [1, None]
    (tmp_path / "l.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [r.values["a"] for r in open_table(str(tmp_path / "l.jsonl")).rows(["a"])] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.txt", b"x", r"ending '.txt' is unknown; expected .parquet, .jsonl, .jsonl.gz, .json, .csv"),
        ("a.parquet", b"PAR1 no", "not a readable parquet file"),
        ("a.jsonl", b'{"a": \n', r"row 0 \(line 1\) is no JSON: .*; none of the first 1 rows can be read"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"row 0 \(line 1\) is no JSON: 'utf-8' codec"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"[1]\n", "row 0 is list, expected an object"),
        ("a.jsonl.gz", b"no gzip", "not a readable .gz file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-12], "not a readable .gz file"),
        ("a.json", b'{"rows": []}', "neither a list of objects nor an object with a list 'examples' or 'data'"),
        ("a.csv", b'a,b\n"x,1\n', "not a readable .csv file"),
        ("a.json", b"[" * 100_000, "not a readable .json file"),
    ],
)
def test_unreadable_file_is_named(name: str, content: bytes, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TempoError, match=wrong) as refused:
        list(open_table(str(path)).rows(["a"]))
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("a.jsonl", b'{"a": ', r"(line 2) is no JSON: "),
        ("a.jsonl", b'{"a": "\xff"}', r"(line 2) is no JSON: 'utf-8' codec"),
        ("a.jsonl", b"[" * 100_000, r"(line 2) is no JSON: "),
        ("a.jsonl", b'"text"', "is string, expected an object with columns"),
        ("a.jsonl.gz", b"{'a': 1}", r"(line 2) is no JSON: "),
        ("a.json", b"NaN NaN", r"(line 2) is no JSON: "),  # JSON lines by another name
        ("a.csv", b"Let x=1,2,3", "has more fields than the first line names columns"),
    ],
)
def test_one_broken_row_does_not_cost_the_others(name: str, line: bytes, wrong: str, tmp_path: Path) -> None:
    good = (b"a,b", b"1,x", b"2,y") if name.endswith(".csv") else (b"", b'{"a": "1"}', b'{"a": "2"}')
    content = b"\n".join([good[0], good[1], line, good[2]]).lstrip()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    first, broken, last = open_table(str(tmp_path / name)).rows(["a"])
    assert (first.values, last.values, last.number) == ({"a": "1"}, {"a": "2"}, 2)
    with pytest.raises(BadRow, match="not readable") as bad:
        broken.check_readable()
    assert bad.value.found.startswith(wrong) and broken.number == 1


def test_json_objects_of_lists_and_lines_of_objects(tmp_path: Path) -> None:
    for name, text in (("d.json", '{"data": [{"a": 1}], "version": 2}'), ("l.json", '{"a": 1}\n')):
        (tmp_path / name).write_text(text)
    assert [r.values for r in open_table(str(tmp_path / "d.json")).rows(["a"])] == [{"a": 1}]
    with pytest.raises(TempoError, match="neither a list of objects"):  # one object is no table
        open_table(str(tmp_path / "l.json"))


def test_columns_of_objects_are_those_of_the_first_rows(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"a": 1}\n{"a": 2, "b": "x"}\n')
    table = open_table(str(tmp_path / "l.jsonl"))
    assert table.columns == ("a", "b")
    assert [r.optional_text("b") for r in table.rows(["a", "b"])] == ["", "x"]


def test_a_column_twice_and_a_name_that_is_too_long(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "t.parquet")
    with pytest.raises(TempoError, match="column 'a' is there more than once"):
        open_table(str(tmp_path / "t.parquet"))
    with pytest.raises(TempoError, match="name too long"):
        open_table(str(tmp_path / f"{'x' * 300}.csv"))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(TempoError, match="a folder; expected a data file"):
        open_table(str(tmp_path))
    with pytest.raises(TempoError, match="no such file"):
        open_table(str(tmp_path / "x.csv"))


def test_typed_access() -> None:
    row = Row("f", 3, {"f": 7.0, "g": 7.5, "b": True, "s": "one", "m": ["a", 1], "e": []})
    assert row.number_or_text("f") == "7"
    assert (row.any_number_or_text("f"), row.any_number_or_text("g"), row.any_number_or_text("s")) == (
        "7",
        "7.5",
        "one",
    )
    assert row.strings("s") == ["one"]
    assert row.optional_text("missing") == ""
    with pytest.raises(TempoError, match=r"f: row 3: column 'b' is .*, expected string or integer"):
        row.number_or_text("b")
    with pytest.raises(BadRow, match=r"column 'g' is 7.5, expected an integer"):
        row.number_or_text("g")
    with pytest.raises(BadRow, match="half of a surrogate pair"):
        Row("f", 3, {"s": "x \ud83d"}).text("s")
    assert Row("f", 3, {"n": float("nan")}).is_empty("n")
    with pytest.raises(TempoError, match="expected list of strings"):
        row.strings("m")
    with pytest.raises(BadRow, match="column 'e' is empty"):
        row.strings("e")
