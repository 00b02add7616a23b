"""``evaluation.json``: every figure of an evaluation with its interval, and each prompt's scores for comparisons.

``sets[NAME]`` holds ``trained_on``, ``prompts``, ``samples_per_prompt``, ``figures`` (name -> value, low, high),
``sources`` (each with prompts and figures, where there are several), ``calibration`` (bins of the critic's values) and
``per_prompt`` (record_id, source, scores). ``comparison`` is there where one was asked for. Undefined numbers are null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tempo_megatron.errors import TempoError
from tempo_megatron.evaluation.bootstrap import LEVEL, RESAMPLES, Estimate, PromptBootstrap, paired_differences
from tempo_megatron.evaluation.critic import calibration_curve, critic_figures
from tempo_megatron.evaluation.metrics import curve_ks, prompt_scores
from tempo_megatron.evaluation.samples import Floats, Samples
from tempo_megatron.locate import CHECKPOINTS
from tempo_megatron.telemetry.metrics import json_safe

FORMAT = 1
EVALUATION_FILE = "evaluation.json"

#: How the intervals were made.
BOOTSTRAP = {"method": "percentile", "unit": "prompt", "level": LEVEL, "resamples": RESAMPLES}


def set_record(samples: Samples, *, trained_on: bool, pass_k: int, seed: int) -> dict[str, Any]:
    """Everything that is said of one set, ready for JSON; ``seed`` is the bootstrap's."""
    ks = curve_ks(samples.samples_per_prompt, pass_k)
    bootstrap = PromptBootstrap(samples.prompts, seed=seed)
    scores = prompt_scores(samples, ks)
    sources = sorted(set(samples.sources))
    record: dict[str, Any] = {
        "trained_on": trained_on,
        "prompts": samples.prompts,
        "samples_per_prompt": samples.samples_per_prompt,
        "figures": _figures(samples, scores, bootstrap),
        "sources": {},
    }
    for source in sources if len(sources) > 1 else []:
        part = samples.of_source(source)
        figures = _figures(part, prompt_scores(part, ks), PromptBootstrap(part.prompts, seed=seed))
        record["sources"][source] = {"prompts": part.prompts, "figures": figures}
    if samples.values is not None:
        record["calibration"] = [asdict(b) for b in calibration_curve(samples.correct, samples.values, bootstrap)]
    record["per_prompt"] = {
        "record_id": list(samples.record_ids),
        "source": list(samples.sources),
        "scores": {name: score.tolist() for name, score in scores.items()},
    }
    return json_safe(record)


def _figures(samples: Samples, scores: Mapping[str, Floats], bootstrap: PromptBootstrap) -> dict[str, dict[str, float]]:
    figures: dict[str, Estimate] = bootstrap.means(scores)
    if samples.values is not None:
        figures |= critic_figures(samples.correct, samples.values, bootstrap)
    return {name: asdict(figure) for name, figure in figures.items()}


def require_common_prompts(record_ids: Mapping[str, Iterable[str]], other: Mapping[str, Any]) -> None:
    """TempoError unless ``other`` has a set of the same name with a prompt of it; to be asked before sampling.

    Args:
        record_ids: of each set's prompts.
    """
    for name, ids in record_ids.items():
        if name in other["sets"] and not set(ids).isdisjoint(other["sets"][name]["per_prompt"]["record_id"]):
            return
    raise TempoError(
        f"--compare: its sets ({', '.join(other['sets'])}) and those evaluated here ({', '.join(record_ids)}) "
        "have no prompt in common, by name of the set and id of the record"
    )


def compare(record: Mapping[str, Any], other: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Figures of ``record`` less those of ``other``, for every set, on the prompts that both have."""
    shared = [name for name in record["sets"] if name in other["sets"]]
    sets = {name: _compare_set(record["sets"][name], other["sets"][name], seed) for name in shared}
    return {name: found for name, found in sets.items() if found["prompts"]}


def _compare_set(ours: Mapping[str, Any], theirs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    place = {id_: i for i, id_ in enumerate(theirs["per_prompt"]["record_id"])}
    pairs = [(i, place[id_]) for i, id_ in enumerate(ours["per_prompt"]["record_id"]) if id_ in place]
    if not pairs:
        return {"prompts": 0, "differences": {}}
    at, other_at = map(list, zip(*pairs, strict=True))
    differences = paired_differences(
        {name: np.array(score)[at] for name, score in _comparable(ours).items()},
        {name: np.array(score)[other_at] for name, score in _comparable(theirs).items()},
        PromptBootstrap(len(pairs), seed=seed),
    )
    return {"prompts": len(pairs), "differences": {name: asdict(figure) for name, figure in differences.items()}}


def _comparable(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Scores by a name that does not say how many samples they rest on, where they estimate the same without it."""
    return {"mean" if name.startswith("mean@") else name: s for name, s in record["per_prompt"]["scores"].items()}


def write_evaluation(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write ``evaluation.json``, whole or not at all."""
    path = folder / EVALUATION_FILE
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def check_output(folder: Path, model: Path, compare_with: Path | None) -> None:
    """Before anything is sampled: TempoError where the results would take the place of something else.

    Args:
        folder: of the results. Those of the same model, or of another step of its run, may be replaced.
        model: HF folder or checkpoint to be evaluated.
        compare_with: the ``evaluation.json`` that the results are compared with.
    """
    file = folder / EVALUATION_FILE
    if compare_with is not None and compare_with.resolve() == file.resolve():
        raise TempoError(f"--compare {compare_with}: this evaluation would take its place; give another --output")
    try:
        there = Path(json.loads(file.read_text("utf-8"))["models"]["actor"]["path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # there is none, or nothing that can be read
    if _run_or_model(there) != _run_or_model(model):
        raise TempoError(f"{file}: is the evaluation of {there}, not of {model}; give another --output")


def _run_or_model(path: Path) -> Path:
    whole = path.resolve()
    return whole.parent if whole.parent.name == CHECKPOINTS else whole


def read_evaluation(path: Path) -> dict[str, Any]:
    """An ``evaluation.json``.

    Raises:
        TempoError: it cannot be read, or is something else.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise TempoError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise TempoError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise TempoError(f"{path}: not an {EVALUATION_FILE} of format {FORMAT}, as tempo-megatron evaluate writes it")
    sets = record.get("sets")
    if not isinstance(sets, dict) or not all(_is_set(s) for s in sets.values()):
        raise TempoError(f"{path}: sets: damaged; each needs per_prompt with record_id and as many of every score")
    return record


def _is_set(value: Any) -> bool:
    try:
        ids, scores = value["per_prompt"]["record_id"], value["per_prompt"]["scores"]
        return all(isinstance(i, str) for i in ids) and all(
            len(score) == len(ids) and all(isinstance(x, int | float) for x in score) for score in scores.values()
        )
    except (KeyError, TypeError, AttributeError):
        return False
