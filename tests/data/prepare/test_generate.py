from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import tempo_megatron.verifiers.kinds.reasoning_gym as kind
from tempo_megatron.cli import main
from tempo_megatron.data.contamination import find_overlap, read_entries
from tempo_megatron.data.prepare.generate import generate
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.registry import verify

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the optional package reasoning-gym is not installed"
)


def test_missing_package_is_told_with_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(kind, "find_spec", lambda name: None)
    assert main(["data", "generate", "gcd", "--count", "1", "--output", str(tmp_path / "o.parquet"), "--eval"]) == 2
    assert 'not installed; install it with: pip install "tempo-megatron[reasoning-gym]"' in capsys.readouterr().err


@needs_package
def test_own_answers_are_right_and_others_wrong(tmp_path: Path) -> None:
    tasks = ["gcd", "knights_knaves", "gsm_symbolic", "mini_sudoku", "prime_factorization", "word_sorting"]
    out = tmp_path / "o.parquet"
    summary = generate(tasks, 6, 3, out, "labeled")
    rows = pq.read_table(out).to_pylist()
    assert summary.read == 36 == len(rows) + summary.duplicates
    assert {r["source"] for r in rows} == {f"reasoning_gym/{task}" for task in tasks}
    for row in rows:
        known = json.loads(row["answer"])["entry"]["answer"]
        assert verify(f"So it is \\boxed{{{known}}}.", row["answer"], "reasoning_gym").correct
        assert not verify("I do not know.", row["answer"], "reasoning_gym").correct
        assert not verify("", row["answer"], "reasoning_gym").correct


@needs_package
def test_same_seed_same_file_and_no_item_under_two_seeds(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.parquet" for i in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        generate(["knights_knaves", "family_relationships"], 30, seed, path, "eval")
    first, again, other = (pq.read_table(path).to_pylist() for path in paths)
    assert first == again != other
    entries = [*read_entries("labeled", [str(paths[0])]), *read_entries("held-out", [str(paths[2])])]
    shared = find_overlap(entries).count(("labeled", "held-out"), exact=True)
    assert shared <= 3  # by chance; the package's own neighbouring seeds share 58 of these 60


@needs_package
@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        ("no_such_task", "task 'no_such_task' is unknown; reasoning-gym has ab, acre"),
        ("countdown", "would run a model's response as code"),
        ("rush_hour", "states no answer"),
        ("game_of_life_halting", "a text without an answer scores 1"),
        ("rearc", "its own answer does not score 1"),
    ],
)
def test_tasks_whose_check_cannot_be_relied_on_are_refused(task: str, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(TempoError, match=wrong):
        generate([task], 2, 0, tmp_path / "o.parquet", "labeled")
    assert not (tmp_path / "o.parquet").exists()


@needs_package
def test_tasks_that_depend_on_the_hash_seed_say_so(tmp_path: Path) -> None:
    assert (
        "word_ladder: the same file again" in generate(["word_ladder"], 1, 0, tmp_path / "o.parquet", "eval").notes[0]
    )
    assert not generate(["gcd"], 1, 0, tmp_path / "o.parquet", "eval").notes


@needs_package
def test_bad_numbers_and_a_task_twice(tmp_path: Path) -> None:
    for tasks, count, seed, wrong in ((["gcd"], 0, 0, "--count 0"), (["gcd"], 1, -1, "--seed -1"),
                                      (["gcd", "gcd"], 1, 0, "named twice")):  # fmt: skip
        with pytest.raises(TempoError, match=wrong):
            generate(tasks, count, seed, tmp_path / "o.parquet", "labeled")
