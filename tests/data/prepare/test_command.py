from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tempo_megatron.cli import main


@pytest.fixture
def aime(write_rows) -> str:
    rows = [{"id": i, "problem": f"How many of the {i} hens lay {i} eggs?", "answer": f"{i:03d}"} for i in range(20)]
    return write_rows("aime.parquet", [*rows, rows[0], {"id": 99, "problem": "p", "answer": "x"}])


def test_prepare_writes_and_tells(aime: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.parquet"
    template = tmp_path / "template.txt"
    template.write_text("Q: {problem}\nA:")
    command = ["data", "prepare", "aime2024", "--input", aime, "--output", str(out), "--labeled"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: {aime}: row 21: column 'answer' is 'x', expected an integer (--skip-bad leaves such rows out)\n"
    )
    assert main([*command, "--skip-bad", "--template", str(template), "--source", "mine"]) == 0
    shown = capsys.readouterr().out
    for text in ("rows read", "22", "duplicates left out", "dropped: answer is no integer", "labeled records written"):
        assert text in shown
    for text in ("20", "answer kind int", "characters of a prompt", f"such as {aime}: row 21", f"wrote {out}"):
        assert text in shown
    row = pq.read_table(out).to_pylist()[3]
    assert row["messages"][0]["content"] == "Q: How many of the 3 hens lay 3 eggs?\nA:"
    assert (row["id"], row["source"], row["answer"], row["labeled"]) == ("mine/3", "mine", "3", True)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["prepare", "aime1924", "--input", "x", "--output", "y", "--eval"], "data set 'aime1924' is unknown; known: "),
        (["prepare", "aime2024", "--input", "x.csv", "--output", "y.parquet", "--eval"], "x.csv: no such file"),
        (["prepare", "aime2024", "--input", "x.csv", "--output", "y.jsonl", "--eval"], "a name that ends in .parquet"),
        (["prepare", "aime2024", "--input", "x.csv", "--output", "", "--eval"], "is not the name of a file"),
        (["prepare", "aime2024", "--input", "x.csv", "--output", "y.parquet", "--eval", "--source", " "], "is blank"),
        (["contamination", "--labeled", "x.parquet", "--output", "x.parquet"], "x.parquet: is also an input"),
        (["prepare", "aime2024", "--input", "x.csv", "--output", "y", "--eval", "--limit", "0"], "--limit 0 must be"),
        (["prepare", "aime2024", "--input", "x.csv", "--output", "y"], "one of the arguments --labeled --unlabeled"),
        (["prepare", "aime2024", "--input", "x", "--output", "y", "--eval", "--labeled"], "not allowed with"),
        (["contamination"], "no files given; expected --labeled, --unlabeled or --held-out"),
        (["contamination", "--labeled", "x.parquet"], "x.parquet: no such file"),
    ],
)
def test_bad_usage(arguments: list[str], wrong: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", *arguments]) == 2
    assert wrong in capsys.readouterr().err


def test_an_option_given_again_adds_files(write_rows, tmp_path: Path) -> None:
    first, second = (write_rows(f"{n}.jsonl", [{"problem": f"problem {n}", "answer": "1"}]) for n in "ab")
    out, report = tmp_path / "o.parquet", tmp_path / "r.json"
    assert (
        main(["data", "prepare", "aime2024", "--input", first, "--input", second, "--output", str(out), "--eval"]) == 0
    )
    assert pq.read_metadata(out).num_rows == 2
    twice = ["--labeled", str(out), "--labeled", str(out), "--output", str(report)]
    assert main(["data", "contamination", *twice]) == 0
    assert json.loads(report.read_text())["records"]["labeled"] == 4


def test_what_the_user_keeps_is_not_written_over(write_rows, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    template, pipe = tmp_path / "t.parquet", tmp_path / "pipe.parquet"
    template.write_text("Q: {problem}")
    os.mkfifo(pipe)
    command = [
        "data",
        "prepare",
        "aime2024",
        "--input",
        write_rows("a.jsonl", [{"problem": "p", "answer": "1"}]),
        "--eval",
    ]
    assert main([*command, "--template", str(template), "--output", str(template)]) == 2
    assert template.read_text() == "Q: {problem}" and "is also an input" in capsys.readouterr().err
    assert main([*command, "--output", str(pipe)]) == 2
    assert pipe.is_fifo() and "no ordinary file" in capsys.readouterr().err


def test_list_names_all(capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert "gpqa-diamond" in shown and "Maxwell-Jia/AIME_2024 (ID, Problem, Answer)" in shown


def test_contamination(aime: str, write_rows, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    d_l, d_u, clean, report = (str(tmp_path / name) for name in ("l.parquet", "u.parquet", "c.parquet", "r.json"))
    prepare = ["data", "prepare", "aime2024", "--skip-bad", "--input"]
    assert main([*prepare, aime, "--output", d_l, "--labeled"]) == 0
    assert main([*prepare, aime, "--output", d_u, "--unlabeled", "--limit", "2"]) == 0
    other = write_rows("b.jsonl", [{"problem": "Which squares have a side of prime length?", "answer": "1"}])
    assert main([*prepare, other, "--output", clean, "--eval"]) == 0
    capsys.readouterr()

    command = ["data", "contamination", "--labeled", d_l, "--held-out", clean, "--fail-on-overlap"]
    assert main(command) == 0
    assert main([*command, "--unlabeled", d_u, "--output", report]) == 3
    shown = capsys.readouterr().out
    assert "LEAK" in shown and f"{d_l}: aime2024/0 = {d_u}: aime2024/0" in shown
    found = json.loads(Path(report).read_text())
    assert found["records"] == {"labeled": 20, "unlabeled": 2, "held-out": 1}
    pairs = {tuple(pair["groups"]): (pair["exact"], pair["near"]) for pair in found["pairs"]}
    assert pairs[("labeled", "unlabeled")][0] == 2 and pairs[("labeled", "held-out")] == (0, 0)
    assert main([*command[:-1], "--unlabeled", d_u]) == 0


def test_command_line_loads_no_arrow() -> None:
    code = "import sys, tempo_megatron.cli; sys.exit('pyarrow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
