"""Files of the published layouts, made here: no data set's content is in this repository."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tempo_megatron.data.prepare.pipeline import Options, prepare
from tempo_megatron.data.prepare.records import Summary
from tempo_megatron.data.prepare.registry import data_set

Rows = list[dict[str, Any]]
WriteRows = Callable[[str, Rows], str]
Prepare = Callable[..., tuple[Rows, Summary]]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows as the ending of the name says; returns the path."""

    def write(name: str, rows: Rows) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif name.endswith(".jsonl.gz"):
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        elif name.endswith(".json"):
            path.write_text(json.dumps({"canary": "made", "examples": rows}))
        else:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        return str(path)

    return write


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """Prepares files; returns the rows of the output and the summary."""

    def run(name: str, *files: str, role: str = "eval", **options: Any) -> tuple[Rows, Summary]:
        output = tmp_path / "out" / "prompts.parquet"
        summary = prepare(data_set(name), files, output, Options(role=role, **options))  # type: ignore[arg-type]
        return pq.read_table(output).to_pylist(), summary

    return run
