"""``tempo-megatron evaluate``: one model on its evaluation sets, with vLLM and its weights as training has them."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tempo_megatron.checkpoint.hf_engine import load_initial_weights
from tempo_megatron.checkpoint.load import read_trainer_state
from tempo_megatron.checkpoint.manifest import read_manifest
from tempo_megatron.config.schema import Config
from tempo_megatron.evaluation.plots import write_plots
from tempo_megatron.evaluation.record import (
    BOOTSTRAP,
    FORMAT,
    compare,
    read_evaluation,
    require_common_prompts,
    set_record,
    write_evaluation,
)
from tempo_megatron.evaluation.table import comparison_table, results_table
from tempo_megatron.locate import InitSource
from tempo_megatron.loop.data import PromptData, read_eval_sets
from tempo_megatron.loop.evaluate import EvaluatedSet, Evaluator
from tempo_megatron.loop.runtime import Runtime, await_verifier, claim_output, start_rollout, start_verifier
from tempo_megatron.parallel.distributed import on_rank0, start, world_size
from tempo_megatron.parallel.exchange import to_rank0
from tempo_megatron.telemetry.environment import environment
from tempo_megatron.telemetry.metrics import json_safe

SAMPLES_FILE = "samples.jsonl"
TABLE_WIDTH = 140  # where there is no terminal to ask

_VERSION = 0  # of the weights: there is no other


class EvaluationRuntime(Runtime):
    """Models with their weights and evaluation sets, and nothing that trains; the world is joined before."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, f"evaluate {Path(config.actor.init).name}", len(config.evaluation.sets))
        with self.ledger.phase("data"):
            self.data = PromptData(None, None, {}, read_eval_sets(config, self.tokenizer))
        self.build_engines(trainable=False)
        for role, source in self.sources.items():
            with self.ledger.phase("load", f"the weights of the {role}"):
                load_initial_weights(self.engines[role], source)


def evaluate_model(config: Config, compare_with: Path | None) -> None:
    """Evaluate, write ``evaluation.json``, ``samples.jsonl`` and the plots to ``output_dir``, and print the table.

    Collective. The samples' seeds are those of a training run's evaluation after as many policy updates as are behind
    the checkpoint (an HF folder: 0), so that a run's own figures come out again.

    Raises:
        TempoError: a set, the model or ``compare_with`` cannot be used.
        RunError: sampling or verifying failed, or the folder cannot be written.
    """
    start(config.launch.threads_per_rank, config.launch.timeout_s, config.watchdog, Path(config.output_dir))
    with ExitStack() as closing:
        claim_output(Path(config.output_dir), closing)
        runtime = EvaluationRuntime(config)
        closing.callback(runtime.progress.close)
        other = on_rank0(partial(_comparison, runtime, compare_with))
        step, updates = on_rank0(partial(_progress, runtime.sources["actor"]))
        verifier = start_verifier(runtime, closing)
        engine = start_rollout(runtime)
        closing.callback(engine.close)
        await_verifier(verifier)

        def send_weights() -> None:
            with runtime.ledger.phase("sync"):
                engine.update_weights(runtime.engines["actor"].weight_source(), _VERSION)

        runtime.residency.add_rollout(engine, send_weights)
        send_weights()
        evaluator = Evaluator(runtime, engine, verifier)
        runtime.progress.start()
        record = _header(runtime, step, updates)
        on_rank0(lambda: _samples_file(runtime.output).unlink(missing_ok=True))
        for done, prompts in enumerate(evaluator.sets, start=1):
            with runtime.ledger.phase("evaluate", prompts.settings.name):
                result = evaluator.evaluate(prompts, updates, _VERSION)
                batch = result.batch
                texts = to_rank0(batch.responses, batch.response_bytes, batch.source).texts()
            record["sets"][prompts.settings.name] = on_rank0(partial(_finish_set, runtime, result, texts, done - 1))
            runtime.progress.advance(done, {})
        runtime.progress.close()  # the table comes below it
        on_rank0(lambda: _publish(runtime, record, other, compare_with))


def _comparison(runtime: Runtime, file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    assert isinstance(runtime.data, PromptData)
    other = read_evaluation(file)
    require_common_prompts({p.settings.name: [r.id for r in p.records] for p in runtime.data.eval_sets}, other)
    return other


def _progress(source: InitSource) -> tuple[int, int]:
    """Step and policy updates behind the weights; 0 where nothing is known of them."""
    if source.kind != "checkpoint":
        return 0, 0
    return read_manifest(source.path).step, read_trainer_state(source.path).get("policy_updates", 0)


def _header(runtime: Runtime, step: int, updates: int) -> dict[str, Any]:
    config = runtime.config
    return {
        "format": FORMAT,
        "models": {role: {"path": str(source.path), "kind": source.kind} for role, source in runtime.sources.items()},
        "step": step,
        "policy_updates": updates,
        "seed": config.seed,
        "bootstrap": BOOTSTRAP,
        "environment": {**environment(), "world_size": world_size()},
        "config": config.model_dump(mode="json"),
        "sets": {},
    }


def _samples_file(output: Path) -> Path:
    """Where samples are written until all sets are done."""
    output.mkdir(parents=True, exist_ok=True)
    return output / f"{SAMPLES_FILE}.tmp"


def _finish_set(runtime: Runtime, result: EvaluatedSet, texts: list[str], index: int) -> dict[str, Any]:
    """Rank 0: the set's samples to the file, its figures as the return value."""
    settings = runtime.config.evaluation.sets[index]
    with _samples_file(runtime.output).open("a", encoding="utf-8") as file:
        for line in _sample_lines(settings.name, result, texts):
            file.write(json.dumps(json_safe(line), ensure_ascii=False, allow_nan=False) + "\n")
    return set_record(
        result.samples,
        trained_on=settings.trained_on,
        pass_k=runtime.config.evaluation.pass_k,
        seed=runtime.config.seed,
    )


def _sample_lines(name: str, result: EvaluatedSet, texts: list[str]) -> list[dict[str, Any]]:
    samples, batch = result.samples, result.batch
    n = samples.samples_per_prompt
    return [
        {
            "set": name,
            "record_id": batch.record_ids[row],
            "source": samples.sources[row // n],
            "sample": row % n,
            "response": texts[row],
            "finish_reason": batch.finish_reason[row],
            "tokens": int(samples.response_tokens.flat[row]),
            "extracted": verdict.extracted,
            "answer": int(samples.answers.flat[row]),
            "correct": verdict.correct,
            "verified": verdict.verified,
            "reason": verdict.reason,
            "terminal_value": None if samples.values is None else float(samples.values.flat[row]),
        }
        for row, verdict in enumerate(result.verdicts)
    ]


def _publish(runtime: Runtime, record: dict[str, Any], other: dict[str, Any] | None, compare_with: Path | None) -> None:
    """Rank 0: the files, then the table."""
    pass_k, output = runtime.config.evaluation.pass_k, runtime.output
    if other is not None:
        record["comparison"] = {"with": str(compare_with), "sets": compare(record, other, runtime.config.seed)}
    os.replace(_samples_file(output), output / SAMPLES_FILE)
    written = [write_evaluation(output, record), output / SAMPLES_FILE, *write_plots(record["sets"], output)]
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    title = f"{runtime.config.actor.init}, intervals: 95 % over prompts"
    console.print(results_table(record["sets"], pass_k, title))
    if other is not None:
        console.print(comparison_table(record["comparison"]["sets"], pass_k, str(compare_with)))
    console.print(", ".join(map(str, written)), soft_wrap=True)
