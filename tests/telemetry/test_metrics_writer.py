"""metrics.jsonl, TensorBoard and wandb: what is written, and what a resumed run keeps."""

from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.config.schema import TelemetryConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.telemetry.metrics import (
    METRICS_FILE,
    MetricsWriter,
    StepLog,
    deterministic_view,
    json_safe,
    read_metrics,
)


def open_writer(folder: Path, last_step: int | None = None, **settings: object) -> MetricsWriter:
    return MetricsWriter(folder, TelemetryConfig(**settings), {"seed": 0}, "test", last_step)


def write_steps(folder: Path, count: int) -> Path:
    with open_writer(folder) as writer:
        for step in range(1, count + 1):
            writer.write({"step": step, "actor/loss": 1 / step, "time/step_s": 0.5})
    return folder / METRICS_FILE


def test_each_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write({"step": 1, "stage": "tempo", "gate/open": True, "eval/du/mean@16": 0.25, "critic/loss": None})
    expected = {"step": 1, "stage": "tempo", "gate/open": True, "eval/du/mean@16": 0.25, "critic/loss": None}
    assert read_metrics(tmp_path / METRICS_FILE) == [expected]
    writer.close()
    writer.close()


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    with open_writer(tmp_path) as writer:
        writer.write({"step": 1} | {f"x/{i}": value for i, value in enumerate(values)})
    (record,) = read_metrics(tmp_path / METRICS_FILE)
    assert [record[f"x/{i}"].hex() for i in range(len(values))] == [value.hex() for value in values]


def test_nan_and_infinities_become_null(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})
    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line) == {"step": 1, "a": None, "b": None, "c": None, "d": 0.5}


@given(
    st.recursive(st.floats() | st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_json_safe_always_makes_json(value: object) -> None:
    json.dumps(json_safe(value), allow_nan=False)


def test_a_value_without_json_leaves_no_half_line(tmp_path: Path) -> None:
    path = write_steps(tmp_path, 1)
    before = path.read_bytes()
    with open_writer(tmp_path, last_step=1) as writer, pytest.raises(TypeError):
        writer.write({"step": 2, "a": 0.5, "bad": object()})  # type: ignore[dict-item]
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", [None, "1", 1.0, True])
def test_a_record_needs_an_integer_step(tmp_path: Path, step: object) -> None:
    with open_writer(tmp_path) as writer, pytest.raises(ValueError, match="integer 'step'"):
        writer.write({"step": step})  # type: ignore[dict-item]


def test_resume_cuts_later_records_and_keeps_the_bytes_of_the_others(tmp_path: Path) -> None:
    path = write_steps(tmp_path, 5)
    first_three = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    with open_writer(tmp_path, last_step=3) as writer:
        assert path.read_bytes() == first_three
        writer.write({"step": 4, "actor/loss": 9.0})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[-1]["actor/loss"] == 9.0
    assert [file.name for file in tmp_path.iterdir()] == [METRICS_FILE]  # no temporary file stays


@pytest.mark.parametrize("cut", [1, 2, 20, 40])
def test_resume_removes_a_torn_last_line(tmp_path: Path, cut: int) -> None:
    path = write_steps(tmp_path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    open_writer(tmp_path, last_step=3).close()
    # a record that lacks nothing but its newline is whole
    assert [record["step"] for record in read_metrics(path)] == ([1, 2, 3] if cut == 1 else [1, 2])
    assert whole.startswith(path.read_bytes())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"step": 2', '"step": ', "line 2 is not a JSON object: .*"),
        ('"step": 2', '"step": "2"', "line 2 is not a JSON object with an integer 'step'"),
        ('{"step": 2', '\0\0{"step": 2', "line 2 is not a JSON object: .*"),
    ],
)
def test_resume_leaves_out_what_is_no_record(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = write_steps(tmp_path, 3)
    path.write_text(path.read_text().replace(old, new))
    before = path.read_bytes()
    with open_writer(tmp_path, last_step=3) as writer:
        (note,) = writer.notes
        writer.write({"step": 4})
    assert re.fullmatch(rf"{path}: {told}; left out, the file as it was is metrics\.damaged\.jsonl", note)
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == before


def test_resume_tells_of_records_that_are_gone(tmp_path: Path) -> None:
    path = write_steps(tmp_path, 3)
    with open_writer(tmp_path, last_step=3) as writer:
        assert writer.notes == []
    with open_writer(tmp_path, last_step=5) as writer:
        assert writer.notes == [f"{path} ends with step 3: those of the steps up to 5 are not there"]
    path.unlink()
    with open_writer(tmp_path, last_step=5) as writer:
        assert writer.notes == [f"{path} has no records: those of the steps up to 5 are not there"]
    with open_writer(tmp_path, last_step=0) as writer:
        assert writer.notes == []  # a run may have none of its start


def test_a_fresh_run_keeps_the_previous_metrics_aside(tmp_path: Path) -> None:
    before = write_steps(tmp_path, 2).read_bytes()
    open_writer(tmp_path).close()
    assert read_metrics(tmp_path / METRICS_FILE) == []
    assert (tmp_path / "metrics.previous.jsonl").read_bytes() == before


def test_step_log_takes_several_records_of_one_step(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    for last_step in (None, 1):
        log = StepLog(path, last_step)
        for step in (1, 1, 2):
            log.write({"step": step, "values": [0.5, math.nan]})
        log.close()
    assert [(row["step"], row["values"]) for row in read_metrics(path)] == [(s, [0.5, None]) for s in (1, 1, 1, 1, 2)]


@pytest.mark.parametrize("line", ["[1]", "{}", '{"step": "1"}', '{"step": 1, "a": NaN}', '{"step": 1', "", "[" * 9999])
def test_read_metrics_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(TempoError) as caught:
        read_metrics(path)
    assert f"{path}: line 2 is not a JSON object" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_metrics_of_a_run_that_is_writing(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step": 2, "a"')
    with pytest.raises(TempoError, match="line 2"):
        read_metrics(path)
    assert read_metrics(path, ignore_torn_tail=True) == [{"step": 1}]
    with pytest.raises(TempoError, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_deterministic_view_drops_what_measures_the_machine() -> None:
    record = {"step": 1, "time/rollout_s": 1.0, "memory/rollout_gib": 2.0, "throughput/rollout_tokens_per_s": 3.0}
    assert deterministic_view(record | {"actor/loss": 0.5}) == {"step": 1, "actor/loss": 0.5}


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_scalars_can_be_read_and_a_resume_replaces_the_later_ones(tmp_path: Path) -> None:
    with open_writer(tmp_path, tensorboard=True) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "stage": "tempo", "actor/loss": step / 2, "gate/open": step > 1, "x": None})
    assert tensorboard_scalars(tmp_path) == {
        "actor/loss": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "gate/open": [(1, 0.0), (2, 1.0), (3, 1.0)],
    }
    with open_writer(tmp_path, last_step=2, tensorboard=True) as writer:
        writer.write({"step": 3, "actor/loss": 7.0})
    assert tensorboard_scalars(tmp_path)["actor/loss"] == [(1, 0.5), (2, 1.0), (3, 7.0)]


@pytest.mark.parametrize(
    ("module", "settings", "key"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, "telemetry.tensorboard: true"),
        ("wandb", {"wandb": "offline"}, "telemetry.wandb: offline"),
    ],
)
def test_a_missing_package_is_named_and_the_metrics_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, settings: dict[str, object], key: str
) -> None:
    before = write_steps(tmp_path, 3).read_bytes()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TempoError, match=rf"{key} needs the package '\w+'"):
        open_writer(tmp_path, last_step=1, **settings)
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_wandb_offline_writes_a_run_folder_of_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    ids = []
    for last_step in (None, 1):
        with open_writer(tmp_path, last_step=last_step, wandb="offline") as writer:
            writer.write({"step": (last_step or 0) + 1, "actor/loss": 0.5, "x": None})
        ids.append((tmp_path / "wandb_id").read_text().strip())
    assert ids[0] == ids[1]
    logs = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert logs
    assert all(log.stat().st_size > 0 for log in logs)
    assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1, 2]


def test_wandb_advertises_nothing(tmp_path: Path) -> None:
    """It offers another of its products to whoever has imported openai, as vLLM does."""
    code = (
        "import sys, types; sys.modules['openai'] = types.ModuleType('openai')\n"
        "from pathlib import Path\n"
        "from tempo_megatron.config.schema import TelemetryConfig\n"
        "from tempo_megatron.telemetry.metrics import MetricsWriter\n"
        f"MetricsWriter(Path({str(tmp_path)!r}), TelemetryConfig(wandb='offline'), {{}}, 'run', None).close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_what_was_not_asked_for_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tempo_megatron.config.schema import TelemetryConfig\n"
        "from tempo_megatron.telemetry.metrics import MetricsWriter\n"
        f"MetricsWriter(Path({str(tmp_path)!r}), TelemetryConfig(), {{}}, 'run', None).close()\n"
        "print([name for name in ('wandb', 'tensorboard', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]")


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_disk_that_fills_up_names_the_file_and_leaves_whole_records(tmp_path: Path, room: int) -> None:
    log = StepLog(tmp_path / METRICS_FILE, None)
    log.write({"step": 1, "x": 0.5})
    whole = (tmp_path / METRICS_FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, limits[1]))
    try:
        with pytest.raises(RunError) as error:
            log.write({"step": 2, "x": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"{tmp_path / METRICS_FILE}: step cannot be written: File too large; what was written before is whole"
    )
    assert (tmp_path / METRICS_FILE).read_bytes() == whole
    log.close()


def test_tensorboard_on_a_full_disk(tmp_path: Path) -> None:
    """In a process of its own, whose files may have no more bytes: the sink's thread dies, and one line tells."""
    program = f"""
import resource
from tempo_megatron.config.schema import TelemetryConfig
from tempo_megatron.errors import RunError
from tempo_megatron.telemetry.metrics import MetricsWriter
writer = MetricsWriter({str(tmp_path)!r}, TelemetryConfig(tensorboard=True), {{}}, "run", None)
writer.write({{"step": 1, "x": 0.5}})
size = max(f.stat().st_size for f in __import__("pathlib").Path({str(tmp_path)!r}).rglob("*") if f.is_file())
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300, size + 300))
try:
    for step in range(2, 200):
        writer.write({{"step": step, **{{f"key{{i}}": 0.5 for i in range(5)}}}})
except RunError as error:
    print(error, flush=True)
    __import__("os")._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cannot be written: File too large; what was written before is whole" in done.stdout
