from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.errors import TempoError
from tempo_megatron.telemetry.environment import environment
from tempo_megatron.telemetry.metrics import StepLog
from tempo_megatron.telemetry.run_folder import Finished, LoggedRollout, load_run, write_run_info

ROW = {"step": 1, "set": "du", "record_id": "7", "prompt": "37=a2:", "tokens": ["5"], "values": [0.5, 1], "outcome": 1}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "rollouts.jsonl", None)
    rollout = LoggedRollout(3, "du", "7", "37=a2:", ["5", "b"], [0.5, float("nan"), 0.75], None)
    log.write(rollout.to_json())
    log.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "rlvr"}\n')
    write_run_info(
        tmp_path,
        environment=environment(),
        stage="tempo",
        started="2026-01-01T00:00:00+00:00",
        wall_s=1.5,
        peak_memory_gib=2.25,
        memory_by_phase={"rollout": {"peak": 2.25, "rollout.weights": 1.0}},
        finished=Finished(7, 5),
    )
    run = load_run(tmp_path)
    assert run.stage == "tempo"
    assert run.info["wall_s"] == 1.5
    assert run.info["peak_memory_gib"] == 2.25
    assert run.info["memory_by_phase"]["rollout"]["rollout.weights"] == 1.0
    assert run.info["finished"] == {"step": 7, "policy_updates": 5}
    (read,) = run.rollouts()
    assert read == LoggedRollout(3, "du", "7", "37=a2:", ["5", "b"], [0.5, None, 0.75], None)


def test_only_metrics_are_needed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "rlvr"}\n{"step": 2, "st')
    run = load_run(tmp_path)
    assert (run.stage, len(run.records), run.trained_on, run.gate, list(run.rollouts())) == ("rlvr", 1, {}, {}, [])


def test_settings_that_the_curves_need(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", "tempo", 3))
    assert run.trained_on == {"du": True, "hu": False, "dl": True}
    assert run.gate["auroc"] == 0.95


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no metrics.jsonl"),
        ({"metrics.jsonl": ""}, "no record yet"),
        ({"metrics.jsonl": '{"step": 1'}, "no record yet"),
        ({"metrics.jsonl": '{"step": 1}\n', "config.yaml": "a: [1"}, "config.yaml: not YAML"),
        ({"metrics.jsonl": '{"step": 1}\n', "config.yaml": "- 1"}, "config.yaml: must be a mapping"),
        ({"metrics.jsonl": '{"step": 1}\n', "run.json": "{"}, "run.json: not JSON"),
        ({"metrics.jsonl": '{"step": 1}\n', "run.json": "[]"}, "run.json: must be a JSON object"),
    ],
)
def test_a_folder_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TempoError, match=message) as caught:
        load_run(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_run_folders_names_them(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run(tmp_path / "sft", "sft", 2)
    with pytest.raises(TempoError, match="run folders inside it: sft"):
        load_run(tmp_path)
    with pytest.raises(TempoError, match="no such run folder"):
        load_run(tmp_path / "none")


@pytest.mark.parametrize(
    ("key", "value"),
    [("set", 1), ("tokens", "5"), ("tokens", [5]), ("values", [0.5]), ("values", ["a", "b"]), ("outcome", 2)],
)
def test_a_wrong_rollout_names_file_line_and_key(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    rows = [ROW, ROW | {key: value}]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TempoError, match=rf"rollouts\.jsonl: line 2: {key}"):
        list(load_run(tmp_path).rollouts())


@pytest.mark.parametrize("key", [key for key in ROW if key != "step"])
def test_a_missing_key_is_named(key: str) -> None:
    fields = {name: value for name, value in ROW.items() if name != key}
    with pytest.raises(TempoError, match=rf"^here: {key}: is missing"):
        LoggedRollout.from_json(fields, "here")
