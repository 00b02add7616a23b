"""The answers of D_U have no way into training: corrupting them changes no bit of any parameter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from tests.loop.cases import Case, make_inputs, run_cases, small_tempo


def with_unlabeled_answers(source: Path, target: Path, answers: list[str | None]) -> None:
    """Copy the prompts, with ``answers`` on the unlabelled rows."""
    table = pq.read_table(source)
    unlabeled = pc.invert(table["labeled"]).to_numpy(zero_copy_only=False)
    column = np.array(table["answer"].to_pylist(), dtype=object)
    column[unlabeled] = answers
    field = table.schema.get_field_index("answer")
    pq.write_table(table.set_column(field, "answer", pa.array(column.tolist(), pa.string())), target)


@pytest.mark.timeout(300)
def test_unlabeled_answers_change_no_parameter_bit(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    evaluation = pq.read_table(inputs.folder / "data" / "eval_du.parquet")
    true = evaluation["answer"].to_pylist()
    permuted = np.random.default_rng(0).permutation(true).tolist()
    variants = {"absent": [None] * len(true), "true": true, "permuted": permuted, "garbage": ["x\x00"] * len(true)}
    cases = []
    for name, answers in variants.items():
        file = tmp_path / f"{name}.parquet"
        with_unlabeled_answers(inputs.train, file, answers)
        cases.append(Case(name, small_tempo(inputs, **{"data.train_files": f"[{file}]"})))
    # one more labelled run, where the answers must matter: the comparison can fail
    file = tmp_path / "relabeled.parquet"
    table = pq.read_table(inputs.train)
    shuffled = pc.take(table["answer"], pa.array(np.random.default_rng(1).permutation(len(table))))
    keep = pc.if_else(table["labeled"], pc.fill_null(shuffled, table["answer"][0]), table["answer"])
    pq.write_table(table.set_column(table.schema.get_field_index("answer"), "answer", keep), file)
    relabeled = {"data.train_files": f"[{file}]"}

    results = run_cases([*cases, Case("relabeled", small_tempo(inputs, **relabeled))], 1, tmp_path, 200)

    reference = results["absent"]["weights"]
    for name in ("true", "permuted", "garbage"):
        weights = results[name]["weights"]
        assert weights.keys() == reference.keys()
        assert all(torch.equal(weights[key], reference[key]) for key in reference), name
    samples = [r["samples"] for r in results.values()]
    assert all(s[0]["tokens"] == samples[0][0]["tokens"] for s in samples)
