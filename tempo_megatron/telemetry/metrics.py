"""One flat record a step: always to ``metrics.jsonl``, to TensorBoard and wandb when asked."""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

from tempo_megatron.config.schema import TelemetryConfig
from tempo_megatron.errors import RunError, TempoError

METRICS_FILE = "metrics.jsonl"

Scalar = float | int | str | bool | None
Record = dict[str, Scalar]

#: Keys that measure the machine, not the method; two equal runs differ in them.
MACHINE_PREFIXES = ("time/", "throughput/", "memory/", "checkpoint/")


def deterministic_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without seconds, rates, memory and what depends on them: equal, bit for bit, for equal runs."""
    return {key: value for key, value in record.items() if not key.startswith(MACHINE_PREFIXES)}


def read_metrics(path: Path | str, *, ignore_torn_tail: bool = False) -> list[dict[str, Any]]:
    """All records of a JSON-lines file with a ``step`` in each line, in file order.

    Args:
        ignore_torn_tail: leave out a last line that ends in the middle (the run is still writing it, or
            was killed while it did).

    Raises:
        TempoError: the file is missing, or a line is no JSON object with an integer ``step``.
    """
    records = []
    for line in _parsed_lines(Path(path), ignore_torn_tail=ignore_torn_tail):
        if line.fault is not None:
            raise TempoError(f"{path}: {line.fault}")
        records.append(line.record)
    return records


@dataclass(frozen=True)
class _Line:
    """A line without its newline; ``fault`` is None, or says why there is no record in it."""

    text: bytes
    record: dict[str, Any]
    fault: str | None = None


def _parsed_lines(path: Path, *, ignore_torn_tail: bool) -> Iterator[_Line]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TempoError(f"{path}: cannot be read ({error.strerror})") from None
    lines = content.split(b"\n")
    torn_line = len(lines) if lines[-1] else None  # 1-based; a complete file ends with a newline
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            continue
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            if not (ignore_torn_tail and number == torn_line):
                yield _Line(line, {}, f"line {number} is not a JSON object: {_first_line(error)}")
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            yield _Line(line, {}, f"line {number} is not a JSON object with an integer 'step'")
        else:
            yield _Line(line, record)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def json_safe(value: Any) -> Any:
    """``value`` with every NaN and infinity inside replaced by None, for which JSON has a word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


class StepLog:
    """A JSON-lines file of records with a ``step``, appended to and flushed line by line.

    Args:
        path: the file; its folder is created.
        last_step: the step that a resumed run continues after: later records are cut off, and so is a torn
            last line; lines that stay keep their bytes. None: the run starts afresh, and a file that is
            there already is kept aside as ``NAME.previous.jsonl``.

    Attributes:
        kept: the last step of what was there and stays; None if there was nothing.
        notes: what was wrong with it. Lines that are no records are left out, and the file as it was is kept as
            ``NAME.damaged.jsonl``: a run does not end for them.
    """

    def __init__(self, path: Path, last_step: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        self.kept: int | None = None
        if path.exists():
            if last_step is None:
                os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
            else:
                self._cut_after(path, last_step)
        self._path = path
        self._file = path.open("ab", buffering=0)  # nothing is left in a buffer for ``close`` when a disk is full

    def _cut_after(self, path: Path, last_step: int) -> None:
        lines = list(_parsed_lines(path, ignore_torn_tail=True))
        kept = [line for line in lines if line.fault is None and line.record["step"] <= last_step]
        self.kept = max((line.record["step"] for line in kept), default=None)
        faults = [line.fault for line in lines if line.fault is not None]
        if faults:
            aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
            shutil.copyfile(path, aside)
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            self.notes.append(f"{path}: {faults[0]}{more}; left out, the file as it was is {aside.name}")
        content = b"".join(line.text + b"\n" for line in kept)
        if content == path.read_bytes():
            return
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; NaN and infinities become null.

        Raises:
            RunError: it could not be written (a full disk); the records before it are whole.
        """
        if type(record.get("step")) is not int:
            raise ValueError(f"a record needs an integer 'step', got {record.get('step')!r}")
        # the whole line is made before the first byte is written: a bad value leaves no half line behind
        line = memoryview((json.dumps(json_safe(record), allow_nan=False) + "\n").encode())
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise _unwritten(self._path, error) from error

    def close(self) -> None:
        self._file.close()


def _unwritten(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: step cannot be written: {error.strerror or error}; what was written before is whole")


class _Sink(Protocol):
    def write(self, record: Mapping[str, Scalar]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes one record a step to every sink that ``config`` names.  One rank of the run holds it.

    Args:
        output_dir: gets ``metrics.jsonl``, and ``tensorboard/`` and ``wandb/`` when asked.
        run_config: the resolved configuration, shown by wandb.
        last_step: as for :class:`StepLog`.

    Attributes:
        notes: what was wrong with the ``metrics.jsonl`` that a resumed run goes on with.

    Raises:
        TempoError: a sink was asked for whose package is missing or that does not start.
    """

    def __init__(
        self,
        output_dir: Path | str,
        config: TelemetryConfig,
        run_config: dict[str, Any],
        run_name: str,
        last_step: int | None,
    ) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._sinks: list[_Sink] = []
        with ExitStack() as opened:
            # metrics.jsonl comes last: where another sink cannot start, nothing has been cut off it
            if config.tensorboard:
                self._sinks.append(_TensorBoardSink(folder, last_step))
                opened.callback(self._sinks[-1].close)
            if config.wandb != "off":
                self._sinks.append(_WandbSink(folder, config, run_config, run_name, last_step))
                opened.callback(self._sinks[-1].close)
            log = StepLog(folder / METRICS_FILE, last_step)
            opened.callback(log.close)
            self.notes = [*log.notes, *_missing(folder / METRICS_FILE, log.kept, last_step)]
            self._closing = opened.pop_all()
        self._sinks.insert(0, log)

    def write(self, record: Record) -> None:
        """Write one step: flat keys, ``step`` (int) among them; plain Python numbers, not tensors."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Flush and close every sink; again is fine."""
        self._closing.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _missing(path: Path, kept: int | None, last_step: int | None) -> list[str]:
    """Every step but 0 has a record."""
    if not last_step or kept == last_step:
        return []
    found = "has no records" if kept is None else f"ends with step {kept}"
    return [f"{path} {found}: those of the steps up to {last_step} are not there"]


class _TensorBoardSink:
    def __init__(self, folder: Path, last_step: int | None) -> None:
        module = _import("torch.utils.tensorboard", package="tensorboard", key="telemetry.tensorboard: true")
        purge_step = 0 if last_step is None else last_step + 1
        self._folder = folder / "tensorboard"
        self._writer = module.SummaryWriter(str(self._folder), purge_step=purge_step)

    def write(self, record: Mapping[str, Scalar]) -> None:
        try:
            for key, value in record.items():
                if key != "step" and isinstance(value, bool | int | float):
                    self._writer.add_scalar(key, float(value), global_step=record["step"])
            self._writer.flush()
        except OSError as error:  # of the thread that writes, told at its next use
            raise _unwritten(self._folder, error) from error

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    def __init__(
        self, folder: Path, config: TelemetryConfig, run_config: dict[str, Any], run_name: str, last_step: int | None
    ) -> None:
        wandb = _import("wandb", package="wandb", key=f"telemetry.wandb: {config.wandb}")
        silent = wandb.Settings(silent=True, console="off")  # the terminal belongs to Progress
        wandb.setup(silent)  # before a run, or its advertisement of other products comes first
        try:
            self._run = wandb.init(
                dir=str(folder),
                mode=config.wandb,
                project=config.wandb_project,
                name=run_name,
                id=_wandb_id(folder, fresh=last_step is None),
                resume="allow" if config.wandb == "online" else None,  # offline pieces of one id meet when synced
                config=run_config,
                settings=silent,
            )
        except wandb.Error as error:
            raise TempoError(
                f"telemetry.wandb: {config.wandb} could not start ({_first_line(error)}); offline needs no account"
            ) from None
        # wandb's own counter only moves forward, which a resumed run does not
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Scalar]) -> None:
        self._run.log({key: value for key, value in record.items() if value is not None})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(folder: Path, *, fresh: bool) -> str:
    """The run's id at wandb, kept in ``wandb_id`` so that a resumed run goes on in the same curves."""
    file = folder / "wandb_id"
    if fresh or not file.exists():
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _import(module: str, *, package: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TempoError(f"{key} needs the package '{package}' ({_first_line(error)}): pip install {package}") from None
