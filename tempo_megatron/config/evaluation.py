"""What ``tempo-megatron evaluate`` is asked for -> the settings of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_megatron.checkpoint.manifest import read_manifest
from tempo_megatron.config.load import COMMAND_LINE, load_config
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import CHECKPOINTS, InitSource, resolve_init

NO_CRITIC = "none"


@dataclass(frozen=True)
class EvaluationRequest:
    """The arguments of the command, as written.

    Attributes:
        model: HF folder, checkpoint or run folder.
        config_file: YAML file; without one, the model's run's ``config.yaml`` where there is one.
        critic: as ``model``, or ``none``; without it the model's own critic where it has one.
        sets: ``NAME=FILE[,FILE]`` each; they replace the configuration's.
        trained_on: names of sets whose prompts the model was trained on.
        samples: responses to each prompt, for all sets.
        output: folder of the results; without one ``RUN/evaluation``, or ``runs/evaluation/NAME`` outside a run.
        overrides: ``key=value`` each; they win over everything else.
        name: what messages call ``model``.
    """

    model: str
    config_file: str | None = None
    critic: str | None = None
    sets: Sequence[str] = ()
    trained_on: Sequence[str] = ()
    samples: int | None = None
    output: str | None = None
    overrides: Sequence[str] = ()
    name: str = "MODEL"


def evaluation_config(request: EvaluationRequest) -> Config:
    """The validated settings: a file (or none), the request's arguments over it, its overrides over both.

    Raises:
        TempoError: as ``load_config``; a model or a critic that is not there; a set that is named wrongly.
    """
    source = resolve_init(request.model, request.name)
    run = _run_of(source)
    file = request.config_file or _config_of(run)
    # what a training run must say and an evaluation does not read
    defaults: dict[str, Any] = {"stage": "tempo", "steps": 1, "output_dir": "", "actor": {"init": request.model}}
    settings: dict[str, Any] = {
        "actor.init": request.model,
        "output_dir": request.output or str(_default_output(run, source)),
    }
    critic = _critic(request, source)
    settings["critic" if critic is None else "critic.init"] = critic
    if request.sets or request.trained_on or request.samples is not None:
        settings["evaluation.sets"] = _sets(request, load_config(file, defaults=defaults))
    written = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    return load_config(file, [*written, *request.overrides], defaults)


def _run_of(source: InitSource) -> Path | None:
    """The run folder that a checkpoint lies in."""
    inside = source.kind == "checkpoint" and source.path.parent.name == CHECKPOINTS
    return source.path.parent.parent if inside else None


def _config_of(run: Path | None) -> str | None:
    file = run / "config.yaml" if run is not None else None
    return str(file) if file is not None and file.is_file() else None


def _default_output(run: Path | None, source: InitSource) -> Path:
    return run / "evaluation" if run is not None else Path("runs") / "evaluation" / source.path.resolve().name


def _critic(request: EvaluationRequest, source: InitSource) -> str | None:
    if request.critic is not None:
        return None if request.critic == NO_CRITIC else request.critic
    return request.model if _holds_critic(source) else None


def _holds_critic(source: InitSource) -> bool:
    return source.kind == "checkpoint" and "critic" in read_manifest(source.path).roles


def _sets(request: EvaluationRequest, config: Config) -> list[dict[str, Any]]:
    sets = [s.model_dump() for s in config.evaluation.sets]
    if request.sets:
        sets = [_set(text) for text in request.sets]
    names = [s["name"] for s in sets]
    for name in request.trained_on:
        if name not in names:
            raise TempoError(f"{COMMAND_LINE}: --trained-on {name!r} names no set; sets: {', '.join(names) or 'none'}")
    for s in sets:
        s["trained_on"] = s.get("trained_on", False) or s["name"] in request.trained_on
        if request.samples is not None:
            s["samples_per_prompt"] = request.samples
    return sets


def _set(text: str) -> dict[str, Any]:
    name, equals, files = text.partition("=")
    if not (equals and name and all(files.split(","))):
        raise TempoError(f"{COMMAND_LINE}: --set {text!r} must be NAME=FILE[,FILE], such as aime=data/aime24.parquet")
    return {"name": name, "files": files.split(",")}
