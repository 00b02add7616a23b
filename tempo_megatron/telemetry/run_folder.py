"""The folder that a run leaves behind, as the curves and the report read it.

``metrics.jsonl``   one record a step (``telemetry.metrics``)
``config.yaml``     the resolved configuration
``run.json``        ``{"environment": ..., "stage": ..., "started": ISO 8601, "wall_s": seconds,
                    "peak_memory_gib", "memory_by_phase": of rank 0, "finished": null or what it did
                    (:class:`Finished`)}``
``rollouts.jsonl``  a few rollouts with their token values (:class:`LoggedRollout`)
``evaluations.jsonl``  each evaluation prompt by prompt: ``{"step", "sets": {name: PromptOutcomes}}``

Only ``metrics.jsonl`` has to be there: a run that still goes on, or was killed, can be looked at too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tempo_megatron.config.methods import METHODS
from tempo_megatron.errors import TempoError
from tempo_megatron.evaluation.change import PromptOutcomes
from tempo_megatron.telemetry.metrics import METRICS_FILE, read_metrics

CONFIG_FILE = "config.yaml"
INFO_FILE = "run.json"
ROLLOUTS_FILE = "rollouts.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


@dataclass(frozen=True)
class Finished:
    """A run that did all it was asked for: its last step, whose checkpoint it left, and its policy updates."""

    step: int
    policy_updates: int


@dataclass(frozen=True)
class LoggedRollout:
    """One response with the critic's value of every state on its way.

    Attributes:
        values: ``len(tokens) + 1`` of them: before each token, and after the last one; None for NaN.
        outcome: 1 correct, 0 wrong, None where no verifier was asked.
    """

    step: int
    eval_set: str
    record_id: str
    prompt: str
    tokens: list[str]
    values: list[float | None]
    outcome: int | None

    def to_json(self) -> dict[str, Any]:
        """The line of ``rollouts.jsonl``, for ``StepLog.write``."""
        fields = dict(vars(self))
        fields["set"] = fields.pop("eval_set")
        return fields

    @staticmethod
    def from_json(fields: dict[str, Any], where: str) -> LoggedRollout:
        """Raises TempoError, naming ``where``, when a key is missing or of another type."""
        tokens = _typed(fields, where, "tokens", _is_strings, "a list of strings")
        values = _typed(fields, where, "values", _is_numbers, "a list of numbers")
        if len(values) != len(tokens) + 1:
            raise TempoError(f"{where}: values: {len(values)} of them, {len(tokens)} tokens need {len(tokens) + 1}")
        return LoggedRollout(
            step=_typed(fields, where, "step", _is_int, "an integer"),
            eval_set=_typed(fields, where, "set", _is_string, "a string"),
            record_id=_typed(fields, where, "record_id", _is_string, "a string"),
            prompt=_typed(fields, where, "prompt", _is_string, "a string"),
            tokens=tokens,
            values=values,
            outcome=_typed(
                fields, where, "outcome", lambda x: x is None or (_is_int(x) and x in (0, 1)), "0, 1 or null"
            ),
        )


def _typed(fields: dict[str, Any], where: str, key: str, right: Callable[[Any], bool], expected: str) -> Any:
    if key not in fields:
        raise TempoError(f"{where}: {key}: is missing; it must be {expected}")
    if not right(fields[key]):
        raise TempoError(f"{where}: {key}: got {str(fields[key])[:60]!r}; it must be {expected}")
    return fields[key]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(x is None or isinstance(x, float) or _is_int(x) for x in value)


@dataclass(frozen=True)
class RunFolder:
    """One run, read; ``config`` and ``info`` are empty where their file is not there."""

    path: Path
    stage: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    config_text: str
    info: dict[str, Any]

    @property
    def trained_on(self) -> dict[str, bool]:
        """Name of each evaluation set of the configuration: are its prompts D_U too?"""
        sets = (self.config.get("evaluation") or {}).get("sets") or []
        return {str(item.get("name")): bool(item.get("trained_on")) for item in sets if isinstance(item, dict)}

    @property
    def gate(self) -> dict[str, Any]:
        """The calibration gate's settings; empty when it is off, the method has none, or nothing is known of it."""
        gate = (self.config.get("algorithm") or {}).get("gate") or {}
        gated = any(name == self.stage and method.gated for name, method in METHODS.items())
        return gate if gated and gate.get("enabled") else {}

    def rollouts(self) -> Iterator[LoggedRollout]:
        """The logged rollouts in file order; none when there is no such file."""
        path = self.path / ROLLOUTS_FILE
        if path.exists():
            for number, fields in enumerate(read_metrics(path, ignore_torn_tail=True), start=1):
                yield LoggedRollout.from_json(fields, f"{path}: line {number}")

    def outcomes(self, step: int) -> dict[str, PromptOutcomes]:
        """What each prompt of each set came to in the evaluation after ``step``; empty where the run kept none.

        Raises:
            TempoError: the file of them is broken.
        """
        path = self.path / EVALUATIONS_FILE
        if not path.exists():
            return {}
        for number, fields in enumerate(read_metrics(path, ignore_torn_tail=True), start=1):
            if fields["step"] == step:
                try:
                    return {name: PromptOutcomes.from_json(of_set) for name, of_set in fields["sets"].items()}
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise TempoError(f"{path}: line {number}: not an evaluation's outcomes: {error}") from None
        return {}


def load_run(path: Path | str) -> RunFolder:
    """Read a run folder.

    Raises:
        TempoError: no such folder, no metrics in it, or a file in it is broken.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TempoError(f"{folder}: there is no such run folder")
    if not (folder / METRICS_FILE).exists():
        inside = sorted(child.parent.name for child in folder.glob(f"*/{METRICS_FILE}"))
        hint = f"; run folders inside it: {', '.join(inside)}" if inside else ""
        raise TempoError(f"{folder}: not a run folder, it has no {METRICS_FILE}{hint}")
    records = read_metrics(folder / METRICS_FILE, ignore_torn_tail=True)
    if not records:
        raise TempoError(f"{folder / METRICS_FILE}: no record yet, the run has not finished a step")
    config_text, config = _read_config(folder / CONFIG_FILE)
    info = read_info(folder / INFO_FILE)
    stage = info.get("stage") or config.get("stage") or records[-1].get("stage") or folder.name
    return RunFolder(folder, str(stage), records, config, config_text, info)


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TempoError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise TempoError(f"{path}: must be a mapping of settings, got {type(config).__name__}")
    return text, config


def read_info(path: Path) -> dict[str, Any]:
    """A run.json; empty where there is none. TempoError if it is broken."""
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TempoError(f"{path}: not JSON: {error}") from None
    if not isinstance(info, dict):
        raise TempoError(f"{path}: must be a JSON object, got {type(info).__name__}")
    return info


def write_run_info(
    output_dir: Path | str,
    *,
    environment: dict[str, Any],
    stage: str,
    started: str,
    wall_s: float,
    peak_memory_gib: float,
    memory_by_phase: Mapping[str, Mapping[str, float]],
    finished: Finished | None,
) -> None:
    """Write ``run.json``, atomically; called at the start of a run and again, with what came of it, at its end."""
    info = {
        "stage": stage,
        "started": started,
        "wall_s": wall_s,
        "peak_memory_gib": peak_memory_gib,
        "memory_by_phase": memory_by_phase,
        "finished": None if finished is None else asdict(finished),
        "environment": environment,
    }
    write_whole(Path(output_dir) / INFO_FILE, json.dumps(info, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or as it was before.  OSError names it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's names no file
