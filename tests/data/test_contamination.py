from __future__ import annotations

import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tempo_megatron.data.contamination import COMMON, Entry, Report, find_overlap, normal_text, read_entries
from tempo_megatron.errors import TempoError

HENS = "Each of 12 hens lays three eggs on Monday and five eggs on Tuesday. How many eggs lie in the nest on Wednesday?"
SQUARE = "Let $ABCD$ be a square of side $s$ and let $E$ be the midpoint of $AB$. Find the area of triangle $ECD$."


def entries(**groups: list[str]) -> list[Entry]:
    names = {"labeled": "labeled", "unlabeled": "unlabeled", "held_out": "held-out"}
    return [
        Entry(names[g], f"{g}.parquet", str(i), text) for g, texts in groups.items() for i, text in enumerate(texts)
    ]


def pairs(report: Report, *, exact: bool | None = None) -> list[tuple[str, str]]:
    return [(m.first, m.second) for m in report.matches if exact is None or m.exact == exact]


def test_exact_copies_up_to_layout_of_the_text() -> None:
    copy = "let  $A B C D$ be a SQUARE of side s and let E be the\nmidpoint of $AB$.\\, Find the area of triangle ECD."
    report = find_overlap(entries(labeled=[HENS, SQUARE], unlabeled=[copy], held_out=["Other."]))
    assert pairs(report) == [("labeled.parquet: 1", "unlabeled.parquet: 0")]
    assert report.matches[0].exact and report.matches[0].groups == ("labeled", "unlabeled")
    assert report.records == {"labeled": 2, "unlabeled": 1, "held-out": 1}


def test_symbols_are_not_dropped() -> None:
    assert normal_text("$1+1$") != normal_text("$1-1$")
    assert normal_text("\\left( x \\right)") == normal_text("(x)")
    report = find_overlap(entries(labeled=["What is 3 + 4?"], unlabeled=["What is 3 - 4?"], held_out=["What is 3+4?"]))
    assert pairs(report) == [("labeled.parquet: 0", "held_out.parquet: 0")]


@pytest.mark.parametrize(
    "near",
    [
        HENS.replace("hens", "ducks"),
        f"{HENS} The answer can be written as a/b with coprime a and b; find a + b, and explain every step of it.",
        f"Solve. {HENS}",
    ],
)
def test_near_copies(near: str) -> None:
    report = find_overlap(entries(unlabeled=[HENS], held_out=[SQUARE, near]))
    assert pairs(report, exact=False) == [("unlabeled.parquet: 0", "held_out.parquet: 1")]
    assert 0.6 <= report.matches[0].overlap <= 1.0


def test_different_problems_and_empty_ones_do_not_match() -> None:
    assert not find_overlap(entries(labeled=[HENS, "", "A"], held_out=[SQUARE, "B", "Find x."])).matches
    assert not find_overlap(entries(labeled=[HENS])).matches


def test_phrases_that_many_records_share_do_not_count() -> None:
    frame = "There are five houses in a row, each has another colour, and each owner drinks something else. {} {} {}?"
    rng = random.Random(0)
    puzzles = [frame.format(*rng.sample(range(10**6), 3)) for _ in range(COMMON + 1)]
    assert not find_overlap(entries(held_out=puzzles)).matches
    few = find_overlap(entries(held_out=puzzles[:3]))
    assert len(few.matches) == 3 and not few.between_groups()


def test_copies_inside_of_a_group_and_over_three_groups() -> None:
    report = find_overlap(entries(labeled=[HENS] * 3, unlabeled=[HENS], held_out=[HENS, SQUARE]))
    assert [m.groups for m in report.matches] == [
        ("labeled", "held-out"), ("labeled", "unlabeled"), ("unlabeled", "held-out"), ("labeled", "labeled"),
        ("labeled", "labeled")]  # fmt: skip
    assert len(report.between_groups()) == 3
    counts = {tuple(pair["groups"]): pair["exact"] for pair in report.as_json()["pairs"]}
    assert counts[("labeled", "labeled")] == 2 and counts[("unlabeled", "unlabeled")] == 0


def test_chinese_is_compared_by_character() -> None:
    text = "设正方形的边长为六,点在边上并且是中点,求三角形的面积是多少"
    report = find_overlap(entries(labeled=[text], held_out=[text.replace("六", "七"), "求一个圆的周长,它的半径为三"]))
    assert pairs(report, exact=False) == [("labeled.parquet: 0", "held_out.parquet: 0")]


def test_bad_settings() -> None:
    with pytest.raises(TempoError, match="--ngram 0"):
        find_overlap(entries(labeled=["a"]), ngram=0)
    with pytest.raises(TempoError, match=r"--threshold 1.5 must lie in \(0, 1\]"):
        find_overlap(entries(labeled=["a"]), threshold=1.5)


def test_files_without_bare_problems_are_compared_by_messages(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    columns = {"id": ["a"], "source": ["s"], "prompt": [HENS], "answer": ["1"], "answer_type": ["int"]}
    pq.write_table(pa.table(columns), path)
    assert read_entries("held-out", [str(path)]) == [Entry("held-out", str(path), "a", HENS)]
    pq.write_table(pa.table({**columns, "problem": [SQUARE]}), path)
    assert read_entries("held-out", [str(path)])[0].text == SQUARE


def test_thousands_against_hundreds_take_seconds() -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(4300)]
    start = time.process_time()
    report = find_overlap(entries(labeled=texts[:4000], held_out=[*texts[4000:], texts[7]]))
    assert pairs(report) == [("labeled.parquet: 7", "held_out.parquet: 300")]
    assert time.process_time() - start < 30
